// SPDX-License-Identifier: Apache-2.0
// Some query rows against some consecutive keys, the steps that decode is made of, written once against Vec: logits of
// a block of query rows x keys held in registers, and online softmax per row.
//
// Tried: one horizontal sum per logit (35 GFLOP/s on one thread at head_dim 128; a block of them by one tree of
// shuffles: 54, see bench/LOG.md). Callers pass stored tokens only, so that unused rows, NaN or not, are never read.

namespace razor::cpu::RAZOR_ISA_NAMESPACE {
namespace {

constexpr float kMinusInfinity = -__builtin_huge_valf();

// Some query rows against some consecutive keys. logit[r][c] = query_r . key_c + bias[r] + slope[r] * c for the visible
// columns first[r] <= c < last[r]; the softmax state of each row takes them in.
struct AttentionTile {
  const float* query;    // [rows, head_dim], already multiplied by the softmax scale
  const void* key;       // [columns, head_dim] of format, key_stride apart
  const void* value;     // [columns, head_dim] of format, value_stride apart
  const int32_t* first;  // [rows] first visible column
  const int32_t* last;   // [rows] one past the last visible column
  const float* bias;     // [rows]
  const float* slope;    // [rows] logit per column
  float* maximum;        // [rows] state: largest logit so far, -inf at the start
  float* sum;            // [rows] state: sum of exp(logit - maximum)
  float* weighted;       // [rows, head_dim] state: sum of exp(logit - maximum) * value
  float* logits;         // [rows, kTileColumns] scratch
  int64_t rows, columns, head_dim;
  int64_t key_stride, value_stride;  // elements
};

// Loads `count` < kLanes elements, zeros after them.
template <class T>
inline Vec load_tail(const T* p, int64_t count) {
  T lanes[Vec::kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return Vec::load(lanes);
}

template <class T>
inline void store_tail(Vec x, T* p, int64_t count) {
  T lanes[Vec::kLanes];
  x.store(lanes);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// As many of the `width` elements from p on as fit.
template <class T>
inline Vec load_upto(const T* p, int64_t width) {
  return width >= Vec::kLanes ? Vec::load(p) : load_tail(p, width);
}

template <class T>
inline void store_upto(Vec x, T* p, int64_t width) {
  if (width >= Vec::kLanes) {
    x.store(p);
  } else {
    store_tail(x, p, width);
  }
}

// logits[r][c] = query_r . key_c for a kRows x kColumns block.
template <int kRows, int kColumns, class T>
inline void block_logits(const float* query, const T* key, int64_t key_stride, int64_t head_dim, float* logits) {
  Vec total[kRows][kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) total[r][c] = Vec::zero();
  }
  const int64_t whole = head_dim - head_dim % Vec::kLanes;
  for (int64_t d = 0; d < whole; d += Vec::kLanes) {
    Vec k[kColumns];
    for (int c = 0; c < kColumns; ++c) k[c] = Vec::load(key + c * key_stride + d);
    for (int r = 0; r < kRows; ++r) {
      const Vec q = Vec::load(query + r * head_dim + d);
      for (int c = 0; c < kColumns; ++c) total[r][c] = fma(q, k[c], total[r][c]);
    }
  }
  if (whole < head_dim) {
    for (int r = 0; r < kRows; ++r) {
      const Vec q = load_tail(query + r * head_dim + whole, head_dim - whole);
      for (int c = 0; c < kColumns; ++c) {
        total[r][c] = fma(q, load_tail(key + c * key_stride + whole, head_dim - whole), total[r][c]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kColumns == Vec::kColumnBlock) {
      Vec::sums(total[r], logits + r * kTileColumns);
    } else {
      for (int c = 0; c < kColumns; ++c) logits[r * kTileColumns + c] = total[r][c].sum();
    }
  }
}

// Biases and masks one row of logits, moves its state to the new maximum and turns the logits into probabilities
// relative to it. Returns the factor by which the old state shrinks; the probability of a masked column is 0.
inline float row_softmax(const AttentionTile& tile, int64_t row) {
  float* logits = tile.logits + row * kTileColumns;
  const int64_t first = tile.first[row] > 0 ? tile.first[row] : 0;
  const int64_t last = tile.last[row] < tile.columns ? tile.last[row] : tile.columns;
  const int64_t padded = (tile.columns + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes;
  if (first >= last) {
    for (int64_t c = 0; c < tile.columns; ++c) logits[c] = 0.0f;
    return 1.0f;
  }
  for (int64_t c = 0; c < first; ++c) logits[c] = kMinusInfinity;
  for (int64_t c = last; c < padded; ++c) logits[c] = kMinusInfinity;

  const Vec slope = Vec::fill(tile.slope[row]);
  Vec largest = Vec::fill(kMinusInfinity);
  for (int64_t c = 0; c < padded; c += Vec::kLanes) {
    const Vec column = add(Vec::iota(), Vec::fill(static_cast<float>(c)));
    const Vec biased = add(Vec::load(logits + c), fma(slope, column, Vec::fill(tile.bias[row])));
    biased.store(logits + c);
    largest = max(largest, biased);
  }
  const float before = tile.maximum[row];
  const float tile_maximum = largest.largest();
  const float maximum = before > tile_maximum ? before : tile_maximum;
  bool nan = false;  // the maximum may have lost it; exp has not
  for (int64_t c = first; maximum == kMinusInfinity && c < last; ++c) nan = nan || logits[c] != logits[c];
  if (maximum == kMinusInfinity && !nan) {  // every visible logit is -inf: no weight anywhere
    for (int64_t c = 0; c < tile.columns; ++c) logits[c] = 0.0f;
    return 1.0f;
  }
  const Vec shift = Vec::fill(-maximum);
  Vec total = Vec::zero();
  for (int64_t c = 0; c < padded; c += Vec::kLanes) {
    const Vec p = add(Vec::load(logits + c), shift).exp();
    p.store(logits + c);
    total = add(total, p);
  }
  const float shrink = before == kMinusInfinity ? 0.0f : __builtin_expf(before - maximum);
  tile.maximum[row] = maximum;
  tile.sum[row] = tile.sum[row] * shrink + total.sum();
  return shrink;
}

}  // namespace
}  // namespace razor::cpu::RAZOR_ISA_NAMESPACE
