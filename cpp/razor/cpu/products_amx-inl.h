// SPDX-License-Identifier: Apache-2.0
// The same largest product, bit for bit, with AMX: tiles of bf16 products say where it cannot be, products-inl.h
// computes the few blocks that are left.
//
// Why that is exact. With q', k' the rows rounded to bf16 (relative error u = 2^-8 of an element) and s' their product
// in float32, Cauchy-Schwarz gives for the product s that products-inl.h computes in float32
//     |s - s'| <= (2u + u^2 + n 2^-22) |q| |k|      for n columns; the last term holds the rounding of both sums
// and without the terms in u where rows are bf16 already. AMX takes subnormals for zero, which loses at most
// n 2^-125 (1 + |q| + |k|): much less than the margin, since norms are taken 2^-50 at least. So no product of a block
// exceeds upper = max s' + margin of the largest norms in it. The block with the largest upper is computed; after it,
// only those whose upper is larger than what was found. Rows with NaN, inf or norms whose product could overflow leave
// the whole call to products-inl.h, which tells NaN from numbers.

namespace razor::cpu::RAZOR_ISA_NAMESPACE {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileDepth = 32;                         // columns: a line of a tile is 64 bytes
constexpr int kSide = 2 * kTileRows;                   // rows of a panel; a block is one panel by another
constexpr int kTileElements = kTileRows * kTileDepth;  // of bf16
constexpr int kBlockProducts = kSide * kSide;
constexpr int kRightGroup = 4;              // right panels in the L1 cache together
constexpr float kMostNorm = 1.1529215e18f;  // 2^60
constexpr int64_t kMostScreenedCols = 4096;
static_assert(kRightGroup * kSide <= 2 * kMostPanelRows);

// x[i] lane j <-> x[j] lane i
inline void transpose(__m512i (&x)[kTileRows]) {
  __m512i y[kTileRows];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // 4 x 4 squares are done: now the squares change places
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
    x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
  }
}

// Elements p[0], p[stride], ..., zeros after `count` of them.
template <class T>
inline Vec load_line(const T* p, int64_t stride, int64_t count) {
  if (stride == 1 && count >= Vec::kLanes) return Vec::load(p);
  float lanes[Vec::kLanes] = {};
  for (int64_t i = 0; i < Vec::kLanes && i < count; ++i) lanes[i] = to_float(p[i * stride]);
  return Vec::load(lanes);
}

// even in the lower half of each lane, odd in the upper
inline __m512i interleave(Vec even, Vec odd) {
  const __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(even.v)));
  const __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(odd.v)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// At most kSide rows rounded to bf16: panel[column / 32][row / 16] is a tile, zeros where rows or columns end. A line
// of a left tile is 32 columns of one row; of a right tile, two columns of 16 rows. Returns the largest norm, NaN if a
// row is not finite.
template <bool kLeft, class T>
inline float pack_tiles(const T* rows, int64_t row_stride, int64_t col_stride, int64_t count, int64_t cols,
                        uint16_t* panel) {
  float largest = 0.0f;
  for (int half = 0; half < 2; ++half) {
    const T* first = rows + half * kTileRows * row_stride;
    const int64_t held = count - half * kTileRows;
    Vec squares[kTileRows];
    for (Vec& x : squares) x = Vec::zero();
    for (int64_t c = 0; c < cols; c += kTileDepth) {
      __m512i lines[kTileRows];
      if (row_stride == 1) {  // a head of a transposed weight
        for (int i = 0; i < kTileRows; ++i) {
          const int64_t column = c + 2 * i;
          const Vec even = load_line(first + column * col_stride, 1, column < cols ? held : 0);
          const Vec odd = load_line(first + (column + 1) * col_stride, 1, column + 1 < cols ? held : 0);
          squares[i] = fma(even, even, fma(odd, odd, squares[i]));
          lines[i] = interleave(even, odd);
          __builtin_prefetch(first + column * col_stride + kSide);  // of the next panel, since columns lie far apart
          __builtin_prefetch(first + (column + 1) * col_stride + kSide);
        }
      } else {
        for (int i = 0; i < kTileRows; ++i) {
          const T* row = first + i * row_stride + c * col_stride;
          const int64_t left = i < held ? cols - c : 0;
          const Vec low = load_line(row, col_stride, left);
          const Vec high = load_line(row + Vec::kLanes * col_stride, col_stride, left - Vec::kLanes);
          squares[i] = fma(low, low, fma(high, high, squares[i]));
          lines[i] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
        }
      }
      if (kLeft == (row_stride == 1)) transpose(lines);
      uint16_t* tile = panel + (c / kTileDepth * 2 + half) * kTileElements;
      for (int i = 0; i < kTileRows; ++i) _mm512_store_si512(tile + i * kTileDepth, lines[i]);
    }
    float sums[kTileRows];
    if (row_stride == 1) {  // lanes are rows
      for (int i = 1; i < kTileRows; ++i) squares[0] = add(squares[0], squares[i]);
      squares[0].store(sums);
    } else {
      for (int i = 0; i < kTileRows; ++i) sums[i] = squares[i].sum();
    }
    for (float sum : sums) largest = largest != largest || largest > sum ? largest : sum;
  }
  return __builtin_sqrtf(largest + 7.8886091e-31f);  // 2^-100
}

// The largest of the bf16 products of two panels, of which `products` is to hold [kSide * kSide].
// Tried: taking the maximum of one block while the tiles of the next multiply; no faster.
inline float block_maximum(const uint16_t* left, const uint16_t* right, int64_t cols, float* products) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t c = 0; c < cols; c += kTileDepth) {
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + kTileElements, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + kTileElements, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    left += 2 * kTileElements;
    right += 2 * kTileElements;
  }
  _tile_stored(0, products, 64);
  _tile_stored(1, products + kBlockProducts / 4, 64);
  _tile_stored(2, products + kBlockProducts / 2, 64);
  _tile_stored(3, products + kBlockProducts / 4 * 3, 64);
  Vec largest[4];
  for (int i = 0; i < 4; ++i) largest[i] = Vec::load(products + i * Vec::kLanes);
  for (int p = 4 * Vec::kLanes; p < kBlockProducts; p += 4 * Vec::kLanes) {
    for (int i = 0; i < 4; ++i) largest[i] = max(largest[i], Vec::load(products + p + i * Vec::kLanes));
  }
  return max(max(largest[0], largest[1]), max(largest[2], largest[3])).largest();
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 2u + u^2, or nothing for rows that bf16 holds exactly
template <class T>
constexpr float kRounding = 0.0078125f + 3.0517578e-5f;
template <>
constexpr float kRounding<BFloat16> = 3.0517578e-5f;

template <class T>
inline float screened_largest_product(const ProductBlock& b) {
  if (b.cols > kMostScreenedCols) return largest_product(b);
  const T* left = static_cast<const T*>(b.left);
  const T* right = static_cast<const T*>(b.right);
  const int64_t left_panels = (b.left_rows + kSide - 1) / kSide, right_panels = (b.right_rows + kSide - 1) / kSide;
  const int64_t panel_elements = (b.cols + kTileDepth - 1) / kTileDepth * 2 * kTileElements;
  auto* left_tiles = reinterpret_cast<uint16_t*>(b.scratch);          // [left_panels, panel_elements]
  uint16_t* right_tiles = left_tiles + left_panels * panel_elements;  // [kRightGroup, panel_elements]
  float* products = reinterpret_cast<float*>(right_tiles + kRightGroup * panel_elements);  // [kBlockProducts]
  float* exact_scratch = products + kBlockProducts;                                        // for one block
  float* left_norm = exact_scratch + (2 * kMostPanelRows + kSide) * b.cols;                // [left_panels]
  float* upper = left_norm + left_panels;  // [right_panels, left_panels]

  for (int64_t i = 0; i < left_panels; ++i) {
    left_norm[i] = pack_tiles</*kLeft=*/true>(left + i * kSide * b.left_stride[0], b.left_stride[0], b.left_stride[1],
                                              b.left_rows - i * kSide, b.cols, left_tiles + i * panel_elements);
    if (!(left_norm[i] <= kMostNorm)) return largest_product(b);
  }
  const float error = kRounding<T> + static_cast<float>(b.cols + 8) * 4.7683716e-7f;  // 2^-21
  const TileConfig config;
  _tile_loadconfig(&config);
  int64_t likely = 0;  // block with the largest upper
  for (int64_t group = 0; group < right_panels; group += kRightGroup) {
    const int64_t panels = right_panels - group < kRightGroup ? right_panels - group : kRightGroup;
    float right_norm[kRightGroup];
    for (int64_t j = 0; j < panels; ++j) {
      const int64_t row = (group + j) * kSide;
      right_norm[j] = pack_tiles</*kLeft=*/false>(right + row * b.right_stride[0], b.right_stride[0], b.right_stride[1],
                                                  b.right_rows - row, b.cols, right_tiles + j * panel_elements);
      if (!(right_norm[j] <= kMostNorm)) {
        _tile_release();
        return largest_product(b);
      }
    }
    asm volatile("" ::: "memory");  // GCC does not know that tile loads read memory
    for (int64_t i = 0; i < left_panels; ++i) {
      for (int64_t j = 0; j < panels; ++j) {
        const int64_t block = (group + j) * left_panels + i;
        upper[block] =
            block_maximum(left_tiles + i * panel_elements, right_tiles + j * panel_elements, b.cols, products) +
            error * left_norm[i] * right_norm[j];
        if (upper[block] > upper[likely]) likely = block;
      }
    }
  }
  _tile_release();

  const auto exact = [&](int64_t block) {
    const int64_t i = block % left_panels * kSide, j = block / left_panels * kSide;
    return typed_largest_product<T>({.left = left + i * b.left_stride[0],
                                     .right = right + j * b.right_stride[0],
                                     .scratch = exact_scratch,
                                     .left_stride = {b.left_stride[0], b.left_stride[1]},
                                     .right_stride = {b.right_stride[0], b.right_stride[1]},
                                     .left_rows = b.left_rows - i < kSide ? b.left_rows - i : kSide,
                                     .right_rows = b.right_rows - j < kSide ? b.right_rows - j : kSide,
                                     .cols = b.cols,
                                     .format = b.format});
  };
  float largest = exact(likely);
  for (int64_t block = 0; block < left_panels * right_panels; ++block) {
    if (upper[block] <= largest || block == likely) continue;
    const float found = exact(block);
    if (found > largest) largest = found;
  }
  return largest;
}

float largest_product_amx(const ProductBlock& block) {
  switch (block.format) {
    case KvFormat::kF32:
      return screened_largest_product<float>(block);
    case KvFormat::kBF16:
      return screened_largest_product<BFloat16>(block);
    case KvFormat::kF16:
      return screened_largest_product<Float16>(block);
  }
  return 0.0f;
}

}  // namespace
}  // namespace razor::cpu::RAZOR_ISA_NAMESPACE
