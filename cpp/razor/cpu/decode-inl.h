// SPDX-License-Identifier: Apache-2.0
// A few queries against long runs of keys, written once against Vec. With few queries the memory sets the pace, so the
// next run is fetched in small portions all the while: the hardware's own prefetchers end at every 4 KiB, and rest
// during the softmax. Uses attention_tile-inl.h.
//
// Tried, of one thread's 15 GB/s: no fetching ahead 6.9; into L1 11.5, into L2 12.3; every second line, hoping for the
// neighbour, 8.3 to 10.4; loads instead of prefetches 9.5 to 11.8; values during the keys and the next keys during the
// values 11.3; keys and values in turns from 1, 2 or 4 places each 12.8, 12.8, 13.1 (bench/LOG.md).

namespace razor::cpu::RAZOR_ISA_NAMESPACE {
namespace {

constexpr int64_t kLineBytes = 64;

// What is left to fetch of the next run: its keys, then its values.
struct Ahead {
  const char *begin, *end, *next_begin, *next_end;

  void some(int64_t lines) {
    for (int64_t i = 0; i < lines; ++i) {
      if (begin >= end) {
        begin = next_begin, end = next_end;
        next_begin = next_end = nullptr;
        if (begin >= end) return;
      }
      __builtin_prefetch(begin, /*rw=*/0, /*locality=*/2);  // L2: L1 is full of this run
      begin += kLineBytes;
    }
  }
};

inline Ahead ahead_of(const DecodeTask& task, int64_t run) {
  if (run + 1 >= task.num_runs) return {};
  const DecodeRun& next = task.runs[run + 1];
  if (next.key_stride != task.head_dim || next.value_stride != task.head_dim) return {};  // tokens of this call
  const int64_t bytes = next.count * task.head_dim * element_size(task.format);
  const char* key = static_cast<const char*>(next.key);
  const char* value = static_cast<const char*>(next.value);
  return {.begin = key, .end = key + bytes, .next_begin = value, .next_end = value + bytes};
}

template <int kRows, class T>
inline void decode_logits(const AttentionTile& tile, int64_t row, int64_t lines, Ahead& ahead) {
  const float* query = tile.query + row * tile.head_dim;
  const T* key = static_cast<const T*>(tile.key);
  float* logits = tile.logits + row * kTileColumns;
  int64_t c = 0;
  for (; c + Vec::kColumnBlock <= tile.columns; c += Vec::kColumnBlock) {
    ahead.some(lines);
    block_logits<kRows, Vec::kColumnBlock>(query, key + c * tile.key_stride, tile.key_stride, tile.head_dim,
                                           logits + c);
  }
  for (; c < tile.columns; ++c) {
    block_logits<kRows, 1>(query, key + c * tile.key_stride, tile.key_stride, tile.head_dim, logits + c);
  }
}

// weighted[r] = shrink[r] * weighted[r] + sum over columns of p[r][c] * value_c, for kRows rows and kVecs vectors at d.
// The sum is added once, so that one heavy row does not dictate the rounding of all others.
template <int kRows, int kVecs, class T>
inline void decode_values(const AttentionTile& tile, int64_t row, int64_t d, const float* shrink, int64_t lines,
                          Ahead& ahead) {
  const T* value = static_cast<const T*>(tile.value) + d;
  const float* p = tile.logits + row * kTileColumns;
  // Known to be whole vectors when there are several; one vector may be the partial last.
  const int64_t width = kVecs > 1 ? kVecs * Vec::kLanes : tile.head_dim - d;
  Vec total[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVecs; ++i) total[r][i] = Vec::zero();
  }
  for (int64_t c = 0; c < tile.columns; ++c) {
    if (c % Vec::kColumnBlock == 0) ahead.some(lines);
    const T* v = value + c * tile.value_stride;
    Vec x[kVecs];
    for (int i = 0; i < kVecs; ++i) x[i] = load_upto(v + i * Vec::kLanes, width - i * Vec::kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = Vec::fill(p[r * kTileColumns + c]);
      for (int i = 0; i < kVecs; ++i) total[r][i] = fma(weight, x[i], total[r][i]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float* out = tile.weighted + (row + r) * tile.head_dim + d;
    const Vec factor = Vec::fill(shrink[r]);
    for (int i = 0; i < kVecs; ++i) {
      const int64_t lane = i * Vec::kLanes;
      store_upto(fma(factor, load_upto(out + lane, width - lane), total[r][i]), out + lane, width - lane);
    }
  }
}

template <int kRows, class T>
inline void decode_rows(const AttentionTile& tile, int64_t row, int64_t lines, Ahead& ahead) {
  decode_logits<kRows, T>(tile, row, lines, ahead);
  float shrink[kRows];
  for (int r = 0; r < kRows; ++r) shrink[r] = row_softmax(tile, row + r);
  constexpr int64_t kWide = Vec::kColumnBlock * Vec::kLanes;
  int64_t d = 0;
  for (; d + kWide <= tile.head_dim; d += kWide) {
    decode_values<kRows, Vec::kColumnBlock, T>(tile, row, d, shrink, lines, ahead);
  }
  for (; d < tile.head_dim; d += Vec::kLanes) decode_values<kRows, 1, T>(tile, row, d, shrink, lines, ahead);
}

// Query rows as floats, scaled: [rows, head_dim].
template <class T>
inline void scale_queries(const DecodeTask& task, float* out) {
  const Vec scale = Vec::fill(task.scale);
  for (int64_t r = 0; r < task.rows; ++r) {
    const T* query = static_cast<const T*>(task.query) + r / task.group * task.query_stride[0] +
                     r % task.group * task.query_stride[1];
    for (int64_t d = 0; d < task.head_dim; d += Vec::kLanes) {
      const int64_t width = task.head_dim - d;
      store_upto(mul(load_upto(query + d, width), scale), out + r * task.head_dim + d, width);
    }
  }
}

inline int32_t column_of(int64_t token, const DecodeRun& run) {
  const int64_t column = token - run.begin;
  return static_cast<int32_t>(column < 0 ? 0 : column > run.count ? run.count : column);
}

template <class T>
inline void typed_decode(const DecodeTask& task) {
  const int64_t rows = task.rows;
  float* query = task.scratch;
  float* logits = query + rows * task.head_dim;
  float* bias = logits + rows * kTileColumns;
  float* slope = bias + rows;
  auto* first = reinterpret_cast<int32_t*>(slope + rows);
  int32_t* last = first + rows;
  scale_queries<T>(task, query);
  for (int64_t i = 0; i < task.num_runs; ++i) {
    const DecodeRun& run = task.runs[i];
    for (int64_t r = 0; r < rows; ++r) {
      first[r] = column_of(task.first[r], run);
      last[r] = column_of(task.last[r], run);
      slope[r] = task.slope == nullptr ? 0.0f : task.slope[r];
      bias[r] = -slope[r] * static_cast<float>(task.last[r] - 1 - run.begin);
    }
    const AttentionTile tile = {.query = query,
                                .key = run.key,
                                .value = run.value,
                                .first = first,
                                .last = last,
                                .bias = bias,
                                .slope = slope,
                                .maximum = task.maximum,
                                .sum = task.sum,
                                .weighted = task.weighted,
                                .logits = logits,
                                .rows = rows,
                                .columns = run.count,
                                .head_dim = task.head_dim,
                                .key_stride = run.key_stride,
                                .value_stride = run.value_stride};
    Ahead ahead = ahead_of(task, i);
    // Every row block goes over keys and values in portions of kColumnBlock columns; each fetches as much.
    const int64_t row_blocks = rows / Vec::kRowBlock + rows % Vec::kRowBlock;
    const int64_t portions =
        row_blocks * (kTileColumns / Vec::kColumnBlock) * (1 + task.head_dim / (Vec::kColumnBlock * Vec::kLanes));
    const int64_t lines = 2 * kTileColumns * task.head_dim * element_size(task.format) / kLineBytes / portions + 1;
    int64_t row = 0;
    for (; row + Vec::kRowBlock <= rows; row += Vec::kRowBlock) decode_rows<Vec::kRowBlock, T>(tile, row, lines, ahead);
    for (; row < rows; ++row) decode_rows<1, T>(tile, row, lines, ahead);
  }
}

void decode_runs(const DecodeTask& task) {
  switch (task.format) {
    case KvFormat::kF32:
      return typed_decode<float>(task);
    case KvFormat::kBF16:
      return typed_decode<BFloat16>(task);
    case KvFormat::kF16:
      return typed_decode<Float16>(task);
  }
}

}  // namespace
}  // namespace razor::cpu::RAZOR_ISA_NAMESPACE
