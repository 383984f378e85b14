// SPDX-License-Identifier: Apache-2.0
// The largest product of two sets of rows, written once against Vec: a matrix product whose result is never stored.
// Left rows are packed once per call, right rows a panel at a time (it stays in the L1 cache while all left panels pass
// by); the sums of a tile live in registers and end in one running maximum. Each product is one chain of fma over its
// columns, so that its bits do not depend on blocks, threads or on which side a row stands.

namespace razor::cpu::RAZOR_ISA_NAMESPACE {
namespace {

constexpr int kLeftPanel = Vec::kProductRows;                 // rows of a packed panel
constexpr int kRightPanel = Vec::kProductVecs * Vec::kLanes;  // rows of a packed panel
static_assert(kLeftPanel <= kMostPanelRows && kRightPanel <= kMostPanelRows);

// panel[c][r] = element c of row r. Copies of the last row fill up a panel of fewer than kRows rows: they add no
// product that is not there already.
template <int kRows, class T>
inline void pack_panel(const T* rows, int64_t row_stride, int64_t col_stride, int64_t count, int64_t cols,
                       float* panel) {
  if (count >= kRows && row_stride == 1) {  // a head of a transposed weight
    for (int64_t c = 0; c < cols; ++c) {
      const T* in = rows + c * col_stride;
      float* out = panel + c * kRows;
      int r = 0;
      for (; r + Vec::kLanes <= kRows; r += Vec::kLanes) Vec::load(in + r).store(out + r);
      for (; r < kRows; ++r) out[r] = to_float(in[r]);
    }
    return;
  }
  for (int r = 0; r < kRows; ++r) {
    const T* row = rows + (r < count ? r : count - 1) * row_stride;
    for (int64_t c = 0; c < cols; ++c) panel[c * kRows + r] = to_float(row[c * col_stride]);
  }
}

// total[r][i] = sum over c of left[r][c] * right[c][lanes of i], rows of `right` kRightPanel apart, the elements of
// `left` kRowStride and kColumnStride.
template <int kRowStride, int kColumnStride, int kVecs>
inline void multiply_panels(const float* left, const float* right, int64_t cols, Vec (&total)[kLeftPanel][kVecs]) {
  Vec sum[kLeftPanel][kVecs];  // in registers, which GCC does not give to what others index
  for (int r = 0; r < kLeftPanel; ++r) {
    for (int i = 0; i < kVecs; ++i) sum[r][i] = Vec::zero();
  }
  for (int64_t c = 0; c < cols; ++c) {
    Vec x[kVecs];
    for (int i = 0; i < kVecs; ++i) x[i] = Vec::load(right + c * kRightPanel + i * Vec::kLanes);
    for (int r = 0; r < kLeftPanel; ++r) {
      const Vec y = Vec::fill(left[c * kColumnStride + r * kRowStride]);
      for (int i = 0; i < kVecs; ++i) sum[r][i] = fma(x[i], y, sum[r][i]);
    }
  }
  for (int r = 0; r < kLeftPanel; ++r) {
    for (int i = 0; i < kVecs; ++i) total[r][i] = sum[r][i];
  }
}

// The larger of `largest` and of the products of two panels, lane by lane; NaN if one of them is.
inline Vec tile_maximum(const float* left, const float* right, int64_t cols, Vec largest) {
  Vec total[kLeftPanel][Vec::kProductVecs];
  multiply_panels</*kRowStride=*/1, /*kColumnStride=*/kLeftPanel>(left, right, cols, total);
  for (int r = 0; r < kLeftPanel; ++r) {
    for (int i = 0; i < Vec::kProductVecs; ++i) largest = max_or_nan(largest, total[r][i]);
  }
  return largest;
}

template <class T>
inline float typed_largest_product(const ProductBlock& b) {
  const T* left = static_cast<const T*>(b.left);
  const T* right = static_cast<const T*>(b.right);
  float* right_panel = b.scratch;
  float* left_panels = b.scratch + kRightPanel * b.cols;
  for (int64_t i = 0; i < b.left_rows; i += kLeftPanel) {
    pack_panel<kLeftPanel>(left + i * b.left_stride[0], b.left_stride[0], b.left_stride[1], b.left_rows - i, b.cols,
                           left_panels + i * b.cols);
  }
  Vec largest = Vec::fill(kMinusInfinity);
  for (int64_t j = 0; j < b.right_rows; j += kRightPanel) {
    pack_panel<kRightPanel>(right + j * b.right_stride[0], b.right_stride[0], b.right_stride[1], b.right_rows - j,
                            b.cols, right_panel);
    for (int64_t i = 0; i < b.left_rows; i += kLeftPanel) {
      largest = tile_maximum(left_panels + i * b.cols, right_panel, b.cols, largest);
    }
  }
  float lanes[Vec::kLanes];
  largest.store(lanes);
  for (float lane : lanes) lanes[0] = lanes[0] != lanes[0] || lanes[0] > lane ? lanes[0] : lane;
  return lanes[0];
}

float largest_product(const ProductBlock& block) {
  switch (block.format) {
    case KvFormat::kF32:
      return typed_largest_product<float>(block);
    case KvFormat::kBF16:
      return typed_largest_product<BFloat16>(block);
    case KvFormat::kF16:
      return typed_largest_product<Float16>(block);
  }
  return 0.0f;
}

}  // namespace
}  // namespace razor::cpu::RAZOR_ISA_NAMESPACE
