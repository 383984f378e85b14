// SPDX-License-Identifier: Apache-2.0
// Attention of many query rows, written once against Vec: kStepKeys keys and values are packed as floats once for all
// rows; then panels of kLeftPanel rows take register tiles of logits, an online softmax, and register tiles of
// probabilities x values, which are summed into zeroed partials and added once to the state, so that one heavy row does
// not dictate the rounding of all others. Tiles that a panel's mask hides are skipped. Uses multiply_panels of
// products-inl.h.
//
// Tried, see bench/LOG.md: sums of a register tile in the caller's array (GCC kept them in memory: 78 GFLOP/s of one
// thread instead of 190), 128 keys per step (4 % slower), 12 rows per panel (the same).

namespace razor::cpu::RAZOR_ISA_NAMESPACE {
namespace {

constexpr int64_t kStepKeys = 256 / kRightPanel * kRightPanel;  // packed together, with values; they fit the L2 cache
constexpr int64_t kStepStride = kStepKeys + 16;  // between rows of logits; no power of two, for the caches

// Of AttentionBlock::scratch.
struct StepScratch {
  float* logits;  // [kLeftPanel, kStepStride]
  float* key;     // panels of [head_dim, kRightPanel]
  float* value;   // slices of [kStepKeys, kRightPanel]

  explicit StepScratch(const AttentionBlock& b)
      : logits(b.scratch), key(logits + kLeftPanel * kStepStride), value(key + kStepKeys * b.head_dim) {}
};
static_assert(kLeftPanel <= kMostPanelRows && kRightPanel <= kMostPanelRows && kStepStride <= 256 + 16);

inline float scale_of(const float* scales, int64_t i) { return scales != nullptr ? scales[i] : 1.0f; }

// Panels of [head_dim, kRows]: element d of kRows rows side by side, times their scales (nullable: 1); copies of the
// last row fill up the last panel.
template <int kRows, class T>
inline void pack_rows(const void* const* rows, const float* scales, int64_t count, int64_t head_dim, float* panels) {
  for (int64_t r = 0; r < count; r += kRows, panels += kRows * head_dim) {
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t source = r + i < count ? r + i : count - 1;
      const T* row = static_cast<const T*>(rows[source]);
      const float scale = scale_of(scales, source);
      float* out = panels + i;
      int64_t d = 0;
      for (; d + Vec::kLanes <= head_dim; d += Vec::kLanes) {
        float lanes[Vec::kLanes];  // converted together
        mul(Vec::load(row + d), Vec::fill(scale)).store(lanes);
        for (float x : lanes) *out = x, out += kRows;
      }
      for (; d < head_dim; ++d, out += kRows) *out = to_float(row[d]) * scale;
    }
  }
}

// At most kStepKeys values times their scales in slices of kRightPanel columns, the last one with zeros.
template <class T>
inline void pack_slices(const void* const* rows, const float* scales, int64_t count, int64_t head_dim, float* slices) {
  for (int64_t d = 0; d < head_dim; d += Vec::kLanes) {
    float* out = slices + d / kRightPanel * kRightPanel * kStepKeys + d % kRightPanel;
    for (int64_t c = 0; c < count; ++c) {
      const Vec x = load_upto(static_cast<const T*>(rows[c]) + d, head_dim - d);
      mul(x, Vec::fill(scale_of(scales, c))).store(out + c * kRightPanel);
    }
  }
}

// One panel of rows against the keys of one step.
struct StepPanel {
  const AttentionBlock& block;
  const StepScratch& scratch;
  int64_t row, rows;                       // first row, at most kLeftPanel
  int64_t shift;                           // the block's column that is the first of the step
  int64_t begin, end;                      // columns of the step that some row sees
  int64_t all_from, all_to;                // columns of the step that every row sees
  Vec largest[kLeftPanel];                 // of the logits so far
  float shrink[kLeftPanel + Vec::kLanes];  // factor of the old state

  float* logits(int64_t r) const { return scratch.logits + r * kStepStride; }
  int64_t first(int64_t r) const { return block.first[row + r] - shift; }
  int64_t last(int64_t r) const { return block.last[row + r] - shift; }

  // Which of the step's columns do the rows see? False: none.
  bool find_columns(int64_t columns) {
    begin = all_to = columns;
    end = all_from = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t from = first(r), to = last(r);
      if (from < to && from < begin) begin = from;
      if (from < to && to > end) end = to;
      if (from > all_from) all_from = from;
      if (to < all_to) all_to = to;
    }
    if (begin < 0) begin = 0;
    if (end > columns) end = columns;
    return begin < end;
  }

  void multiply_keys() {
    for (Vec& x : largest) x = Vec::fill(kMinusInfinity);
    for (int64_t c = begin / kRightPanel * kRightPanel; c < end; c += kRightPanel) {
      Vec total[kLeftPanel][Vec::kProductVecs];
      multiply_panels</*kRowStride=*/1, /*kColumnStride=*/kLeftPanel>(
          block.query + row * block.head_dim, scratch.key + c * block.head_dim, block.head_dim, total);
      const Vec scale = Vec::fill(block.scale);
      for (int r = 0; r < kLeftPanel; ++r) {
        for (int i = 0; i < Vec::kProductVecs; ++i) mul(total[r][i], scale).store(logits(r) + c + i * Vec::kLanes);
      }
      if (block.slope != nullptr || c < all_from || c + kRightPanel > all_to) {
        for (int64_t r = 0; r < rows; ++r) mask_row(r, c);
      }
      for (int r = 0; r < kLeftPanel; ++r) {
        for (int i = 0; i < Vec::kProductVecs; ++i) {
          largest[r] = max(largest[r], Vec::load(logits(r) + c + i * Vec::kLanes));
        }
      }
    }
  }

  // Biases and masks the logits [c, c + kRightPanel).
  void mask_row(int64_t r, int64_t c) const {
    float* x = logits(r) + c;
    if (block.slope != nullptr) {
      const Vec slope = Vec::fill(block.slope[row + r]);
      for (int64_t i = 0; i < kRightPanel; i += Vec::kLanes) {
        const Vec column = add(Vec::iota(), Vec::fill(static_cast<float>(shift + c + i) - block.origin[row + r]));
        fma(slope, column, Vec::load(x + i)).store(x + i);
      }
    }
    for (int64_t i = 0; i < kRightPanel && i < first(r) - c; ++i) x[i] = kMinusInfinity;
    for (int64_t i = last(r) > c ? last(r) - c : 0; i < kRightPanel; ++i) x[i] = kMinusInfinity;
  }

  // Logits to probabilities relative to the maximum.
  void softmax() {
    float added[kLeftPanel];
    for (int64_t r = 0; r < rows; ++r) {
      const float before = block.maximum[row + r], found = largest[r].largest();
      const float maximum = before > found ? before : found;
      const Vec below = Vec::fill(maximum == kMinusInfinity ? 0.0f : -maximum);
      Vec sum = Vec::zero();
      for (int64_t c = begin / Vec::kLanes * Vec::kLanes; c < end; c += Vec::kLanes) {
        const Vec p = add(Vec::load(logits(r) + c), below).exp();
        p.store(logits(r) + c);
        sum = add(sum, p);
      }
      added[r] = sum.sum();
      shrink[r] = before == maximum ? 0.0f : before - maximum;
      block.maximum[row + r] = maximum;
    }
    for (int64_t r = 0; r < rows; r += Vec::kLanes) Vec::load(shrink + r).exp().store(shrink + r);
    for (int64_t r = 0; r < rows; ++r) block.sum[row + r] = block.sum[row + r] * shrink[r] + added[r];
  }

  void multiply_values() const {
    for (int64_t d = 0; d < block.head_dim; d += kRightPanel) add_values<Vec::kProductVecs>(d);
  }

  // The slice at d, of which kVecs vectors or fewer are in use.
  template <int kVecs>
  void add_values(int64_t d) const {
    if constexpr (kVecs > 1) {
      if (block.head_dim - d <= (kVecs - 1) * Vec::kLanes) return add_values<kVecs - 1>(d);
    }
    Vec total[kLeftPanel][kVecs];
    multiply_panels</*kRowStride=*/kStepStride, /*kColumnStride=*/1>(
        logits(0) + begin, scratch.value + d * kStepKeys + begin * kRightPanel, end - begin, total);
    for (int64_t r = 0; r < rows; ++r) {
      float* weighted = block.weighted + (row + r) * block.head_dim + d;
      for (int i = 0; i < kVecs; ++i) {
        const int64_t lane = i * Vec::kLanes, width = block.head_dim - d - lane;
        const Vec old = load_upto(weighted + lane, width);
        store_upto(fma(Vec::fill(shrink[r]), old, total[r][i]), weighted + lane, width);
      }
    }
  }
};

inline void pack_step(const AttentionBlock& b, int64_t shift, int64_t count, bool with_values, const StepScratch& to) {
  const auto pack = [&]<class T>(const T*) {
    const auto scales = [&](const float* all) { return all != nullptr ? all + shift : nullptr; };
    pack_rows<kRightPanel, T>(b.key_rows + shift, scales(b.key_scale), count, b.head_dim, to.key);
    if (with_values) pack_slices<T>(b.value_rows + shift, scales(b.value_scale), count, b.head_dim, to.value);
  };
  switch (b.format) {
    case KvFormat::kF32:
      return pack(static_cast<const float*>(nullptr));
    case KvFormat::kBF16:
      return pack(static_cast<const BFloat16*>(nullptr));
    case KvFormat::kF16:
      return pack(static_cast<const Float16*>(nullptr));
  }
}

template <bool kWithValues>
inline void block_of_steps(const AttentionBlock& b) {
  const StepScratch scratch(b);
  for (int64_t shift = 0; shift < b.columns; shift += kStepKeys) {
    const int64_t columns = b.columns - shift < kStepKeys ? b.columns - shift : kStepKeys;
    pack_step(b, shift, columns, kWithValues, scratch);
    for (int64_t row = 0; row < b.rows; row += kLeftPanel) {
      StepPanel panel{.block = b,
                      .scratch = scratch,
                      .row = row,
                      .rows = b.rows - row < kLeftPanel ? b.rows - row : kLeftPanel,
                      .shift = shift};
      if (!panel.find_columns(columns)) continue;
      panel.multiply_keys();
      panel.softmax();
      if constexpr (kWithValues) panel.multiply_values();
    }
  }
}

void attention_block(const AttentionBlock& block) { block_of_steps</*kWithValues=*/true>(block); }

void score_block(const AttentionBlock& block) { block_of_steps</*kWithValues=*/false>(block); }

void pack_queries(const void* const* rows, int64_t count, int64_t head_dim, KvFormat format, float* packed) {
  switch (format) {
    case KvFormat::kF32:
      return pack_rows<kLeftPanel, float>(rows, /*scales=*/nullptr, count, head_dim, packed);
    case KvFormat::kBF16:
      return pack_rows<kLeftPanel, BFloat16>(rows, /*scales=*/nullptr, count, head_dim, packed);
    case KvFormat::kF16:
      return pack_rows<kLeftPanel, Float16>(rows, /*scales=*/nullptr, count, head_dim, packed);
  }
}

}  // namespace
}  // namespace razor::cpu::RAZOR_ISA_NAMESPACE
