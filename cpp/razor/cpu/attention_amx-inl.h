// SPDX-License-Identifier: Apache-2.0
// Attention of many query rows in bf16 tiles: kStep keys and values are packed once for all rows; then panels of 32
// rows take tile products for their logits, a softmax in float32, and tile products of probabilities x values, which
// are summed into zeroed partials and added once to the state. Tiles that a panel's mask hides are skipped.
//
// A probability enters as the sum of two bf16 numbers and so keeps 16 bits: one of them alone is off by 2^-9, which is
// more than a rounded result may differ by. Queries, keys and values are exact; scales multiply float32 logits and
// probabilities. Subnormal bf16 numbers count as zero, as the tiles take them. Uses transpose and TileConfig of
// products_amx-inl.h.
//
// Tried, see bench/LOG.md: the softmax of one panel between the products of another (no faster: vectors and tiles share
// a port), software prefetch of packed tiles (slower), 128 to 512 keys per step (the same).

namespace razor::cpu::RAZOR_ISA_NAMESPACE {
namespace {

constexpr int64_t kMostColumns = INT32_MAX;
constexpr int64_t kStep = 256;                     // keys packed together
constexpr int64_t kLogitStride = kStep + 16;       // elements; not a power of two, for the sake of the caches
constexpr int64_t kLogitBytes = 4 * kLogitStride;  // a row of logits turns into probabilities in place

constexpr int64_t whole_panels(int64_t x) { return (x + kSide - 1) / kSide * kSide; }

// Of AttentionBlock::scratch.
struct BlockScratch {
  float* logits;       // [kSide, kLogitStride]
  float* products;     // [2][kSide, kSide]
  float* key_scale;    // [kStep], zeros for columns that are not there; unused without scales
  float* value_scale;  // likewise
  uint16_t* key;       // [strip][head_dim / 32][2] tiles
  uint16_t* value;     // [head_dim / 32][strip][2] tiles

  explicit BlockScratch(const AttentionBlock& b)
      : logits(b.scratch),
        products(logits + kSide * kLogitStride),
        key_scale(products + 2 * kSide * kSide),
        value_scale(key_scale + kStep) {
    key = reinterpret_cast<uint16_t*>(value_scale + kStep);
    value = key + kStep * whole_panels(b.head_dim);
  }
};
static_assert(kSide * kLogitStride + 2 * kSide * kSide + 2 * kStep + kStep * kSide <= block_scratch(1));

// exp(x) for x <= 0: a power of 2 times a polynomial of degree 5, off by 1.5e-7; 0 for -inf, NaN stays. The terms are
// paired: the scheduler holds about three of these at a time, so that their latency counts.
inline __m512 exp_of(__m512 x) {
  const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  const __m512 r = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __m512 rr = _mm512_mul_ps(r, r);
  const __m512 p0 = _mm512_fmadd_ps(_mm512_set1_ps(0.69315308f), r, _mm512_set1_ps(0.99999994f));
  const __m512 p2 = _mm512_fmadd_ps(_mm512_set1_ps(0.055826318f), r, _mm512_set1_ps(0.24015361f));
  const __m512 p4 = _mm512_fmadd_ps(_mm512_set1_ps(0.0018775767f), r, _mm512_set1_ps(0.0089893406f));
  return _mm512_scalef_ps(_mm512_fmadd_ps(_mm512_fmadd_ps(p4, rr, p2), rr, p0), y);
}

// 32 elements of row i from column d on, zeros beyond the rows and beyond head_dim.
inline __m512i load_32(const void* const* rows, int64_t i, int64_t count, int64_t d, int64_t head_dim) {
  if (i >= count) return _mm512_setzero_si512();
  const __mmask32 there = head_dim - d >= 32 ? ~0u : (1u << (head_dim - d)) - 1;
  return _mm512_maskz_loadu_epi16(there, static_cast<const uint16_t*>(rows[i]) + d);
}

// At most kStep keys; a line of a tile is two columns of 16 keys.
inline void pack_keys(const void* const* rows, int64_t count, int64_t head_dim, uint16_t* tiles) {
  for (int64_t key = 0; key < count; key += kSide) {
    for (int64_t d = 0; d < head_dim; d += kTileDepth) {
      for (int64_t half = 0; half < kSide; half += kTileRows) {
        __m512i lines[kTileRows];
        for (int64_t i = 0; i < kTileRows; ++i) lines[i] = load_32(rows, key + half + i, count, d, head_dim);
        transpose(lines);
        for (int64_t i = 0; i < kTileRows; ++i) _mm512_store_si512(tiles + i * kTileDepth, lines[i]);
        tiles += kTileElements;
      }
    }
  }
}

// At most kStep values; a line of a tile is two values in 16 columns, of those 16 apart in a strip of 32.
inline void pack_values(const void* const* rows, int64_t count, int64_t head_dim, uint16_t* tiles) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // so that halves of lanes unpack to halves of rows
  for (int64_t strip = 0; strip < count; strip += kSide) {
    for (int64_t i = strip; i < strip + kTileRows; ++i) {
      for (int64_t d = 0; d < head_dim; d += kTileDepth) {
        const __m512i even = _mm512_permutexvar_epi64(order, load_32(rows, i, count, d, head_dim));
        const __m512i odd = _mm512_permutexvar_epi64(order, load_32(rows, i + kTileRows, count, d, head_dim));
        uint16_t* line = tiles + d * kStep + strip * kSide + (i - strip) * kTileDepth;
        _mm512_store_si512(line, _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(line + kTileElements, _mm512_unpackhi_epi16(even, odd));
      }
    }
  }
}

// At most kStep scales.
inline void pack_scales(const float* scales, int64_t count, float* packed) {
  for (int64_t c = 0; c < kStep; c += Vec::kLanes) {
    (c < count ? load_upto(scales + c, count - c) : Vec::zero()).store(packed + c);
  }
}

// Rows [begin, end) into the L2 cache; there may be fewer of them.
inline void prefetch_rows(const void* const* rows, int64_t begin, int64_t end, int64_t count, int64_t head_dim) {
  for (int64_t i = begin; i < end && i < count; ++i) {
    for (int64_t d = 0; d < head_dim; d += kTileDepth) {
      _mm_prefetch(static_cast<const char*>(rows[i]) + 2 * d, _MM_HINT_T1);
    }
  }
}

inline void zero_products() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Two tiles that are not needed again soon.
inline void load_right(const uint16_t* right) {
  _tile_stream_loadd(6, right, 64);
  _tile_stream_loadd(7, right + kTileElements, 64);
}

// Adds to tiles 0 to 3: 32 rows of 32 columns, `stride` bytes apart, times what load_right has loaded.
inline void multiply_left(const void* left, int64_t stride) {
  _tile_loadd(4, left, stride);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, static_cast<const char*>(left) + kTileRows * stride, stride);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

inline void store_products(float* out, int64_t stride) {  // stride in bytes
  char* lower = reinterpret_cast<char*>(out) + kTileRows * stride;
  _tile_stored(0, out, stride);
  _tile_stored(1, out + kTileRows, stride);
  _tile_stored(2, lower, stride);
  _tile_stored(3, lower + 4 * kTileRows, stride);
  asm volatile("" ::: "memory");  // GCC knows neither that these write memory nor that tile loads read it
}

// 32 probabilities as 32 bf16, the first 16 in the lower halves of the lanes, then what these have lost, in the same
// way.
inline void store_split(__m512 low, __m512 high, float* out) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(-0x10000);
  const auto rounded = [&](__m512 x) {
    return _mm512_add_epi32(_mm512_castps_si512(x), half);
  };  // to nearest, in upper
  const __m512i low_upper = _mm512_and_si512(rounded(low), upper);
  const __m512i high_upper = _mm512_and_si512(rounded(high), upper);
  const __m512i low_rest = rounded(_mm512_sub_ps(low, _mm512_castsi512_ps(low_upper)));
  const __m512i high_rest = rounded(_mm512_sub_ps(high, _mm512_castsi512_ps(high_upper)));
  constexpr int kSelect = 0xb8;  // bits of the third where the second has ones, else of the first
  _mm512_storeu_si512(out, _mm512_or_si512(_mm512_srli_epi32(low_upper, 16), high_upper));
  _mm512_storeu_si512(out + Vec::kLanes,
                      _mm512_ternarylogic_epi32(_mm512_srli_epi32(low_rest, 16), upper, high_rest, kSelect));
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// One panel of rows against the packed keys [begin, end), both multiples of 32.
struct Panel {
  const AttentionBlock& block;
  const BlockScratch& scratch;
  int64_t row, rows;         // first row, at most kSide
  int64_t shift;             // the block's column that is the first of the packed ones
  int64_t begin, end;        // packed columns
  int64_t all_from, all_to;  // packed columns that every row sees
  float maximum[kSide];      // of the state, this step included
  float shrink[kSide];       // factor of the old state
  Vec largest[kSide];        // logits so far, then sums of probabilities

  float* logits(int64_t r) const { return scratch.logits + r * kLogitStride; }
  int64_t first(int64_t r) const { return block.first[row + r] - shift; }
  int64_t last(int64_t r) const { return block.last[row + r] - shift; }
  // ALiBi and odd scales are applied to the logits in place; otherwise the scale is a factor in what reads them.
  bool in_place() const { return block.slope != nullptr || !(block.scale > 0.0f); }

  // Which packed columns do the rows see? False: none.
  bool find_columns(int64_t columns) {
    int64_t least_first = kMostColumns, most_last = 0, most_first = 0, least_last = kMostColumns;
    for (int64_t r = 0; r < rows; r += Vec::kLanes) {
      const auto lanes = static_cast<__mmask16>(rows - r >= Vec::kLanes ? 0xffff : (1 << (rows - r)) - 1);
      const __m512i from = _mm512_maskz_loadu_epi32(lanes, block.first + row + r);
      const __m512i to = _mm512_maskz_loadu_epi32(lanes, block.last + row + r);
      const __mmask16 sees = _mm512_mask_cmplt_epi32_mask(lanes, from, to);
      least_first = least(least_first, _mm512_mask_reduce_min_epi32(sees, from));
      most_last = most(most_last, _mm512_mask_reduce_max_epi32(sees, to));
      most_first = most(most_first, _mm512_mask_reduce_max_epi32(lanes, from));
      least_last = least(least_last, _mm512_mask_reduce_min_epi32(lanes, to));
    }
    begin = most(least_first - shift, 0) / kSide * kSide;
    end = whole_panels(least(most_last - shift, columns));
    all_from = most_first - shift;
    all_to = least_last - shift;
    return begin < end;
  }

  // One strip is masked while the tiles multiply the next.
  void multiply_keys() {
    for (Vec& x : largest) x = Vec::fill(kMinusInfinity);
    const int64_t depth = whole_panels(block.head_dim);
    const auto* query = reinterpret_cast<const uint16_t*>(block.query) + row * depth;
    for (int64_t c = begin; c < end; c += kSide) {
      const uint16_t* key = scratch.key + c * depth;
      zero_products();
      for (int64_t d = 0; d < depth; d += kTileDepth, key += 2 * kTileElements) {
        load_right(key);
        multiply_left(query + d, 2 * depth);
      }
      store_products(scratch.logits + c, kLogitBytes);
      if (c > begin) mask_strip(c - kSide);
    }
    mask_strip(end - kSide);
  }

  // Scales by key, biases and masks 32 logits of each row and takes them into `largest`.
  void mask_strip(int64_t c) {
    if (in_place() || c < all_from || c + kSide > all_to) {
      for (int64_t r = 0; r < rows; ++r) mask_row(r, c);
    } else if (block.key_scale != nullptr) {
      return scale_strip(c);
    }
    for (int64_t r = 0; r < rows; ++r) {
      largest[r] = max(largest[r], max(Vec::load(logits(r) + c), Vec::load(logits(r) + c + Vec::kLanes)));
    }
  }

  void scale_strip(int64_t c) {
    const Vec low_scale = Vec::load(scratch.key_scale + c), high_scale = Vec::load(scratch.key_scale + c + Vec::kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      float* x = logits(r) + c;
      const Vec low = mul(Vec::load(x), low_scale), high = mul(Vec::load(x + Vec::kLanes), high_scale);
      low.store(x);
      high.store(x + Vec::kLanes);
      largest[r] = max(largest[r], max(low, high));
    }
  }

  void mask_row(int64_t r, int64_t begin_column) const {
    for (int64_t c = begin_column; c < begin_column + kSide; c += Vec::kLanes) {
      Vec x = Vec::load(logits(r) + c);
      if (block.key_scale != nullptr) x = mul(x, Vec::load(scratch.key_scale + c));
      if (in_place()) {
        x = mul(x, Vec::fill(block.scale));
        if (block.slope != nullptr) {
          const Vec column = add(Vec::iota(), Vec::fill(static_cast<float>(c)));
          const Vec distance = add(column, Vec::fill(static_cast<float>(shift) - block.origin[row + r]));
          x = fma(Vec::fill(block.slope[row + r]), distance, x);
        }
      }
      const __m512i column = _mm512_add_epi32(_mm512_cvtps_epi32(Vec::iota().v), _mm512_set1_epi32(c));
      const __mmask16 seen = _mm512_cmpge_epi32_mask(column, _mm512_set1_epi32(first(r))) &
                             _mm512_cmplt_epi32_mask(column, _mm512_set1_epi32(last(r)));
      Vec{_mm512_mask_mov_ps(_mm512_set1_ps(kMinusInfinity), seen, x.v)}.store(logits(r) + c);
    }
  }

  // Does a row whose maximum is -inf have a NaN that the maximum has lost?
  bool has_nan(int64_t r) const {
    for (int64_t c = begin; c < end; ++c) {
      if (logits(r)[c] != logits(r)[c]) return true;
    }
    return false;
  }

  // Logits to probabilities relative to the maximum, of which `largest` then holds the sums. What multiplies the values
  // are the probabilities times value_scale.
  template <bool kWithValues, bool kScaled>
  void find_probabilities(const float* below) {
    const __m512 factor = _mm512_set1_ps(in_place() ? 1.0f : block.scale);
    const int64_t count = end - begin;
    float* x = scratch.logits + begin;
    const float* scale = scratch.value_scale + begin;
    for (int64_t r = 0; r < rows; ++r, x += kLogitStride) {
      const __m512 offset = _mm512_set1_ps(below[r]);
      Vec even = Vec::zero(), odd = Vec::zero();
      for (int64_t c = 0; c < count; c += kTileDepth) {
        __m512 p0 = exp_of(_mm512_fmadd_ps(_mm512_loadu_ps(x + c), factor, offset));
        __m512 p1 = exp_of(_mm512_fmadd_ps(_mm512_loadu_ps(x + c + Vec::kLanes), factor, offset));
        even = add(even, Vec{p0});
        odd = add(odd, Vec{p1});
        if constexpr (kScaled) {
          p0 = _mm512_mul_ps(p0, _mm512_loadu_ps(scale + c));
          p1 = _mm512_mul_ps(p1, _mm512_loadu_ps(scale + c + Vec::kLanes));
        }
        if constexpr (kWithValues) store_split(p0, p1, x + c);
      }
      largest[r] = add(even, odd);
    }
  }

  template <bool kWithValues>
  void softmax() {
    float below[kSide];
    for (int64_t r = 0; r < rows; ++r) {
      const float before = block.maximum[row + r];
      const float found = in_place() ? largest[r].largest() : largest[r].largest() * block.scale;
      maximum[r] = before > found ? before : found;
      shrink[r] = before == maximum[r] ? 0.0f : before - maximum[r];
      block.maximum[row + r] = maximum[r];
      below[r] = maximum[r] == kMinusInfinity && !has_nan(r) ? 0.0f : -maximum[r];
    }
    for (int64_t r = 0; r < kSide; r += Vec::kLanes) Vec::load(shrink + r).exp().store(shrink + r);
    const bool scaled = kWithValues && block.value_scale != nullptr;
    scaled ? find_probabilities<kWithValues, /*kScaled=*/kWithValues>(below)
           : find_probabilities<kWithValues, false>(below);
    for (int64_t r = 0; r < rows; ++r) {
      float& sum = block.sum[row + r];
      sum = sum * shrink[r] + largest[r].sum();
    }
    asm volatile("" ::: "memory");
  }

  // The state takes in one part while the tiles multiply the next.
  void multiply_values() const {
    for (int64_t d = 0; d < block.head_dim; d += kSide) {
      zero_products();
      for (int64_t c = begin; c < end; c += kTileDepth) {
        load_right(scratch.value + d * kStep + c * kSide);
        multiply_left(scratch.logits + c, kLogitBytes);
        multiply_left(scratch.logits + c + kTileDepth / 2, kLogitBytes);
        if (c == begin && d > 0) add_products(d - kSide);
      }
      store_products(products(d), 4 * kSide);
    }
    add_products(whole_panels(block.head_dim) - kSide);
  }

  float* products(int64_t d) const { return scratch.products + d / kSide % 2 * kSide * kSide; }

  void add_products(int64_t d) const {
    for (int64_t r = 0; r < rows; ++r) {
      float* weighted = block.weighted + (row + r) * block.head_dim + d;
      const float* product = products(d) + r * kSide;
      for (int64_t i = 0; i < kSide && d + i < block.head_dim; i += Vec::kLanes) {
        const int64_t width = block.head_dim - d - i;
        const Vec old = load_upto(weighted + i, width);
        store_upto(fma(Vec::fill(shrink[r]), old, Vec::load(product + i)), weighted + i, width);
      }
    }
  }
};

template <bool kWithValues>
inline void block_of_tiles(const AttentionBlock& b) {
  const BlockScratch scratch(b);
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t shift = 0; shift < b.columns; shift += kStep) {
    const int64_t columns = b.columns - shift < kStep ? b.columns - shift : kStep;
    pack_keys(b.key_rows + shift, columns, b.head_dim, scratch.key);
    if constexpr (kWithValues) pack_values(b.value_rows + shift, columns, b.head_dim, scratch.value);
    if (b.key_scale != nullptr) pack_scales(b.key_scale + shift, columns, scratch.key_scale);
    if (kWithValues && b.value_scale != nullptr) pack_scales(b.value_scale + shift, columns, scratch.value_scale);
    asm volatile("" ::: "memory");  // see store_products
    const int64_t panels = (b.rows + kSide - 1) / kSide, share = (kStep + panels - 1) / panels;
    for (int64_t row = 0; row < b.rows; row += kSide) {
      const int64_t next = shift + kStep + row / kSide * share;  // of the next step's rows, which are slow to come
      prefetch_rows(b.key_rows, next, next + share, b.columns, b.head_dim);
      if constexpr (kWithValues) prefetch_rows(b.value_rows, next, next + share, b.columns, b.head_dim);
      Panel panel{.block = b,
                  .scratch = scratch,
                  .row = row,
                  .rows = b.rows - row < kSide ? b.rows - row : kSide,
                  .shift = shift};
      if (!panel.find_columns(columns)) continue;
      panel.multiply_keys();
      panel.softmax<kWithValues>();
      if constexpr (kWithValues) panel.multiply_values();
    }
  }
  _tile_release();
}

void attention_block_amx(const AttentionBlock& block) {
  if (block.format != KvFormat::kBF16) return attention_block(block);
  block_of_tiles</*kWithValues=*/true>(block);
}

void score_block_amx(const AttentionBlock& block) {
  if (block.format != KvFormat::kBF16) return score_block(block);
  block_of_tiles</*kWithValues=*/false>(block);
}

// bf16 as it is: [count, head_dim], both rounded up to kSide by zeros.
void pack_queries_amx(const void* const* rows, int64_t count, int64_t head_dim, KvFormat format, float* packed) {
  if (format != KvFormat::kBF16) return pack_queries(rows, count, head_dim, format, packed);
  auto* out = reinterpret_cast<uint16_t*>(packed);
  for (int64_t r = 0; r < whole_panels(count); ++r) {
    for (int64_t d = 0; d < head_dim; d += kTileDepth, out += kTileDepth) {
      _mm512_store_si512(out, load_32(rows, r, count, d, head_dim));
    }
  }
}

}  // namespace
}  // namespace razor::cpu::RAZOR_ISA_NAMESPACE
