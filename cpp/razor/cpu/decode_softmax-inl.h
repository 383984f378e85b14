// SPDX-License-Identifier: Apache-2.0
// Softmax of logits that lie [key, row], as decode_bf16-inl.h and decode_amx-inl.h leave them: that of up to four rows
// (16 with tiles) takes no more steps than that of one.

namespace razor::cpu::RAZOR_ISA_NAMESPACE {
namespace {

constexpr int64_t kLineElements = 32;  // of bf16
constexpr int64_t kPairedKeys = 32;    // of a tile of probabilities

// The largest or the sum over the keys that share a vector: every lane of a row gets it.
template <int kRows>
inline __m512 largest_by_row(__m512 x) {
  if constexpr (kRows <= 4) {
    x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
    x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
  }
  if constexpr (kRows <= 2) x = _mm512_max_ps(x, _mm512_permute_ps(x, 0x4e));
  if constexpr (kRows == 1) x = _mm512_max_ps(x, _mm512_permute_ps(x, 0xb1));
  return x;
}

template <int kRows>
inline __m512 sum_by_row(__m512 x) {
  if constexpr (kRows <= 4) {
    x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
    x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
  }
  if constexpr (kRows <= 2) x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4e));
  if constexpr (kRows == 1) x = _mm512_add_ps(x, _mm512_permute_ps(x, 0xb1));
  return x;
}

// A number of each row in the lanes of its logits, `other` in those of rows that do not exist.
template <int kRows>
inline __m512 spread(const float* x, int64_t rows, float other) {
  const __m512 held = _mm512_mask_loadu_ps(_mm512_set1_ps(other), (1u << rows) - 1, x);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return kRows == Vec::kLanes ? held
                              : _mm512_permutexvar_ps(_mm512_and_si512(lane, _mm512_set1_epi32(kRows - 1)), held);
}

// x[key][row] *= scales[key].
template <int kRows>
inline void scale_keys(const float* scales, int64_t count, float* x) {
  constexpr int kKeys = Vec::kLanes / kRows;  // in a vector
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i key = _mm512_srli_epi32(lane, __builtin_ctz(kRows));
  for (int64_t c = 0; c < count; c += kKeys) {
    const __m512 scale = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << kKeys) - 1), scales + c);
    _mm512_store_ps(x + c * kRows, _mm512_mul_ps(_mm512_load_ps(x + c * kRows), _mm512_permutexvar_ps(key, scale)));
  }
}

// Logits become probabilities relative to the new maximum; zeros for what is not visible. As row_softmax of
// attention_tile-inl.h, for up to kRows rows at once. Returns the factors by which their states shrink.
template <int kRows>
inline __m512 tile_softmax(const DecodeTask& task, const DecodeRun& run, int64_t row, float* logits) {
  constexpr int kKeys = Vec::kLanes / kRows;  // in a vector
  const int64_t rows = task.rows - row < kRows ? task.rows - row : kRows;
  const int64_t padded = (run.count + kPairedKeys - 1) / kPairedKeys * kPairedKeys;
  float first[kRows] = {}, last[kRows] = {}, distance[kRows] = {}, slope[kRows] = {};
  bool masked = padded != run.count;
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t f = column_of(task.first[row + r], run), l = column_of(task.last[row + r], run);
    masked = masked || f > 0 || l < run.count;
    first[r] = static_cast<float>(f);
    last[r] = static_cast<float>(l);
    if (task.slope == nullptr) continue;
    slope[r] = task.slope[row + r];
    distance[r] = static_cast<float>(task.last[row + r] - 1 - run.begin);
  }
  alignas(64) float offsets[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) offsets[i] = static_cast<float>(i / kRows);
  const __m512 offset = _mm512_load_ps(offsets), scale = _mm512_set1_ps(task.scale);
  const __m512 from = spread<kRows>(first, kRows, 0.0f), to = spread<kRows>(last, kRows, 0.0f);
  const __m512 far = spread<kRows>(distance, kRows, 0.0f), slopes = spread<kRows>(slope, kRows, 0.0f);
  const __m512 nothing = _mm512_set1_ps(kMinusInfinity);

  __m512 largest = nothing;
  for (int64_t c = 0; c < padded; c += kKeys) {
    __m512 x = _mm512_mul_ps(_mm512_load_ps(logits + c * kRows), scale);
    if (masked || task.slope != nullptr) {
      const __m512 column = _mm512_add_ps(offset, _mm512_set1_ps(static_cast<float>(c)));
      if (task.slope != nullptr) x = _mm512_fnmadd_ps(slopes, _mm512_sub_ps(far, column), x);
      const __mmask16 visible =
          _mm512_cmp_ps_mask(column, from, _CMP_GE_OQ) & _mm512_cmp_ps_mask(column, to, _CMP_LT_OQ);
      x = _mm512_mask_mov_ps(nothing, visible, x);
    }
    _mm512_store_ps(logits + c * kRows, x);
    largest = _mm512_max_ps(largest, x);
  }
  const __m512 before = spread<kRows>(task.maximum + row, rows, kMinusInfinity);
  const __m512 maximum = _mm512_max_ps(before, largest_by_row<kRows>(largest));
  // Without any weight so far nothing is subtracted: exp(-inf) is 0, and NaN stays.
  const __mmask16 empty = _mm512_cmp_ps_mask(maximum, nothing, _CMP_EQ_OQ);
  const __m512 shift = _mm512_mask_mov_ps(maximum, empty, _mm512_setzero_ps());
  __m512 total = _mm512_setzero_ps();
  for (int64_t c = 0; c < padded; c += kKeys) {
    const Vec p = Vec{_mm512_sub_ps(_mm512_load_ps(logits + c * kRows), shift)}.exp();
    p.store(logits + c * kRows);
    total = _mm512_add_ps(total, p.v);
  }
  // 0 for the first run: what a state without weight holds is zero.
  const __m512 shrink = Vec{_mm512_sub_ps(before, shift)}.exp().v;
  const __m512 sum = _mm512_fmadd_ps(spread<kRows>(task.sum + row, rows, 0.0f), shrink, sum_by_row<kRows>(total));
  const auto held = static_cast<__mmask16>((1u << rows) - 1);
  _mm512_mask_storeu_ps(task.maximum + row, held, maximum);
  _mm512_mask_storeu_ps(task.sum + row, held, sum);
  return shrink;
}

}  // namespace
}  // namespace razor::cpu::RAZOR_ISA_NAMESPACE
