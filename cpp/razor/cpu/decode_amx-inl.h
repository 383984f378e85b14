// SPDX-License-Identifier: Apache-2.0
// decode_runs for rows of bf16 with AMX: both products as tiles of bf16, up to 16 query rows for the price of one.
//
// Logits are exact products of bf16 summed in float32, since the query is taken as it came and scaled afterwards; a
// tile of logits is [16 keys, query rows], for keys are the side that memory holds line by line. Probabilities are
// split, p = high + low, into two bf16 numbers (an error of 2^-17 of p at most); values are interleaved in pairs of
// keys. Every run is summed into zeroed tiles and added once to the state.
// Short runs, other formats and head dims that are no multiple of 32 go to decode_bf16-inl.h.

namespace razor::cpu::RAZOR_ISA_NAMESPACE {
namespace {

constexpr int64_t kTileKeys = 16;        // of a tile of logits
constexpr int64_t kLeastTileWork = 128;  // keys x query rows of a run; less is not worth a tile

// Logits of 4 or 16 query rows: tiles 0 and 1 are logits, 2 queries, 3 keys or values, 4 and 5 probabilities, 6 and 7
// weighted sums.
template <int kRows>
struct alignas(64) DecodeTiles {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t line_bytes[16] = {4 * kRows, 4 * kRows, 4 * kRows, 64, 64, 64, 64, 64};
  uint8_t lines[16] = {16, 16, 16, 16, kRows, kRows, kRows, kRows};
};

// The scratch of a task.
struct DecodeBuffers {
  uint16_t* query;     // [row blocks, head_dim / 32, 16, kRows, 2]: pairs of elements of kRows queries
  uint16_t* key_tail;  // [16, head_dim], the last keys of a run, zeros after them
  uint16_t* value;     // [2, head_dim / 16, 16, 16, 2]: pairs of keys, see interleave_values
  float* logits;       // [kTileColumns, kRows], then probabilities
  uint16_t* weight;    // [2 (high, low), kRows, kTileColumns]
  float* product;      // [kRows, head_dim], in the order of the interleaved values
};

template <int kRows>
inline DecodeBuffers decode_buffers(const DecodeTask& task) {
  const int64_t blocks = (task.rows + kRows - 1) / kRows;
  DecodeBuffers b;
  b.value = reinterpret_cast<uint16_t*>(task.scratch);
  b.key_tail = b.value + kTileColumns * task.head_dim;
  b.query = b.key_tail + kTileKeys * task.head_dim;
  b.logits = reinterpret_cast<float*>(b.query + blocks * kRows * task.head_dim);
  b.weight = reinterpret_cast<uint16_t*>(b.logits + kTileColumns * kRows);
  b.product = reinterpret_cast<float*>(b.weight + 2 * kTileColumns * kRows);
  return b;
}

template <int kRows>
inline void pack_queries(const DecodeTask& task, uint16_t* packed) {
  const int64_t blocks = (task.rows + kRows - 1) / kRows;
  for (int64_t r = 0; r < blocks * kRows; ++r) {
    auto* out = reinterpret_cast<uint32_t*>(packed + r / kRows * kRows * task.head_dim) + r % kRows;
    const uint16_t* query = static_cast<const uint16_t*>(task.query) + r / task.group * task.query_stride[0] +
                            r % task.group * task.query_stride[1];
    alignas(64) uint32_t pairs[kLineElements / 2] = {};
    for (int64_t d = 0; d < task.head_dim; d += kLineElements) {
      if (r < task.rows) _mm512_store_si512(pairs, _mm512_loadu_si512(query + d));
      for (int i = 0; i < kLineElements / 2; ++i) out[(d / 2 + i) * kRows] = pairs[i];
    }
  }
}

// Values of pairs of keys element by element; within 32 elements in the order of the instruction, which
// add_product undoes. Zeros after the last key.
inline void interleave_values(const uint16_t* value, int64_t stride, int64_t count, int64_t head_dim, int64_t lines,
                              uint16_t* out, Ahead& ahead) {
  const int64_t padded = (count + kPairedKeys - 1) / kPairedKeys * kPairedKeys;
  for (int64_t c = 0; c < padded; c += 2) {
    ahead.some(lines);
    uint16_t* line = out + c / kPairedKeys * kPairedKeys * head_dim + c % kPairedKeys * 16;
    for (int64_t d = 0; d < head_dim; d += kLineElements) {
      const __m512i even = c < count ? _mm512_loadu_si512(value + c * stride + d) : _mm512_setzero_si512();
      const __m512i odd = c + 1 < count ? _mm512_loadu_si512(value + (c + 1) * stride + d) : _mm512_setzero_si512();
      _mm512_store_si512(line + d * kPairedKeys, _mm512_unpacklo_epi16(even, odd));
      _mm512_store_si512(line + (d + 16) * kPairedKeys, _mm512_unpackhi_epi16(even, odd));
    }
  }
}

// logits[key][row] of whole tiles of 16 keys.
template <int kRows>
inline void tile_logits(const uint16_t* query, const uint16_t* key, int64_t stride, int64_t tiles, int64_t head_dim,
                        int64_t lines, float* logits, Ahead& ahead) {
  for (int64_t t = 0; t < tiles; t += 2) {
    const bool two = t + 1 < tiles;
    const uint16_t* first = key + t * kTileKeys * stride;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t d = 0; d < head_dim; d += kLineElements) {
      ahead.some(lines);
      _tile_loadd(2, query + d * kRows, 4 * kRows);
      _tile_loadd(3, first + d, 2 * stride);
      _tile_dpbf16ps(0, 3, 2);
      if (!two) continue;
      _tile_loadd(3, first + kTileKeys * stride + d, 2 * stride);
      _tile_dpbf16ps(1, 3, 2);
    }
    _tile_stored(0, logits + t * kTileKeys * kRows, 4 * kRows);
    if (two) _tile_stored(1, logits + (t + 1) * kTileKeys * kRows, 4 * kRows);
  }
}

inline void split_weights(__m512 low_keys, __m512 high_keys, uint16_t* high, uint16_t* low) {
  const auto rounded = [](__m512 a, __m512 b) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)); };
  const auto widened = [](__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); };
  const __m512i both = rounded(low_keys, high_keys);
  _mm512_store_si512(high, both);
  _mm512_store_si512(low, rounded(_mm512_sub_ps(low_keys, widened(_mm512_castsi512_si256(both))),
                                  _mm512_sub_ps(high_keys, widened(_mm512_extracti64x4_epi64(both, 1)))));
}

// x[i] lane j of 16 keys: for 4 rows, x[i] holds keys 4i to 4i + 3; for 16, key i. Afterwards x[r] is row r.
inline void to_rows(__m512 (&x)[4]) {
  const __m512 a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpackhi_ps(x[0], x[1]);
  const __m512 c = _mm512_unpacklo_ps(x[2], x[3]), d = _mm512_unpackhi_ps(x[2], x[3]);
  const auto low = [](__m512 p, __m512 q) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(p), _mm512_castps_pd(q)));
  };
  const auto high = [](__m512 p, __m512 q) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(p), _mm512_castps_pd(q)));
  };
  // Lane 4i + j of what comes out is key 4j + i.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  x[0] = _mm512_permutexvar_ps(order, low(a, c)), x[1] = _mm512_permutexvar_ps(order, high(a, c));
  x[2] = _mm512_permutexvar_ps(order, low(b, d)), x[3] = _mm512_permutexvar_ps(order, high(b, d));
}

// weight[high | low][row][key] of the first `keys` probabilities[key][row].
template <int kRows>
inline void pack_weights(const float* probability, int64_t keys, uint16_t* weight) {
  for (int64_t c = 0; c < keys; c += kPairedKeys) {
    __m512 x[2][kRows];
    for (int half = 0; half < 2; ++half) {
      const float* from = probability + (c + half * kTileKeys) * kRows;
      if constexpr (kRows == 4) {
        for (int i = 0; i < 4; ++i) x[half][i] = _mm512_load_ps(from + i * Vec::kLanes);
        to_rows(x[half]);
      } else {
        const __m512i stride =
            _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
        for (int r = 0; r < kRows; ++r) x[half][r] = _mm512_i32gather_ps(stride, from + r, 4);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      uint16_t* high = weight + r * kTileColumns + c;
      split_weights(x[0][r], x[1][r], high, high + kRows * kTileColumns);
    }
  }
}

// product[row][element] = probabilities x values.
template <int kRows>
inline void tile_values(const uint16_t* weight, const uint16_t* value, int64_t keys, int64_t head_dim, int64_t lines,
                        float* product, Ahead& ahead) {
  for (int64_t d = 0; d < head_dim; d += 2 * Vec::kLanes) {
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t c = 0; c < keys; c += kPairedKeys) {
      ahead.some(lines);
      const uint16_t* tile = value + c * head_dim + d * kPairedKeys;
      _tile_loadd(4, weight + c, 2 * kTileColumns);
      _tile_loadd(5, weight + kRows * kTileColumns + c, 2 * kTileColumns);
      _tile_loadd(3, tile, 64);
      _tile_dpbf16ps(6, 4, 3);
      _tile_dpbf16ps(6, 5, 3);
      _tile_loadd(3, tile + 16 * kPairedKeys, 64);
      _tile_dpbf16ps(7, 4, 3);
      _tile_dpbf16ps(7, 5, 3);
    }
    _tile_stored(6, product + d, 4 * head_dim);
    _tile_stored(7, product + d + Vec::kLanes, 4 * head_dim);
  }
}

// weighted = shrink * weighted + product, the elements in their own order again.
inline void add_product(const float* product, int64_t rows, int64_t head_dim, __m512 shrink, float* weighted) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  alignas(64) float factors[Vec::kLanes];
  _mm512_store_ps(factors, shrink);
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 factor = _mm512_set1_ps(factors[r]);
    for (int64_t d = 0; d < head_dim; d += 2 * Vec::kLanes) {
      const __m512 a = _mm512_load_ps(product + r * head_dim + d);
      const __m512 b = _mm512_load_ps(product + r * head_dim + d + Vec::kLanes);
      float* out = weighted + r * head_dim + d;
      _mm512_storeu_ps(out, _mm512_fmadd_ps(factor, _mm512_loadu_ps(out), _mm512_permutex2var_ps(a, low, b)));
      out += Vec::kLanes;
      _mm512_storeu_ps(out, _mm512_fmadd_ps(factor, _mm512_loadu_ps(out), _mm512_permutex2var_ps(a, high, b)));
    }
  }
}

template <int kRows>
inline void decode_run(const DecodeTask& task, const DecodeRun& run, const DecodeBuffers& buffers, Ahead ahead) {
  const int64_t head_dim = task.head_dim, blocks = (task.rows + kRows - 1) / kRows;
  const auto* key = static_cast<const uint16_t*>(run.key);
  const int64_t whole = run.count / kTileKeys, tail = run.count % kTileKeys;
  const int64_t keys = (run.count + kPairedKeys - 1) / kPairedKeys * kPairedKeys;
  // Portions of the next run: a quarter goes with the values being interleaved, the rest with the products.
  const int64_t all = 2 * kTileColumns * head_dim * 2 / kLineBytes;
  const int64_t lines = all * 3 / 4 / (blocks * 4 * (head_dim / kLineElements)) + 1;
  interleave_values(static_cast<const uint16_t*>(run.value), run.value_stride, run.count, head_dim,
                    all / 4 / (kTileColumns / 2), buffers.value, ahead);
  for (int64_t c = 0; tail > 0 && c < kTileKeys; ++c) {
    const uint16_t* from = key + (whole * kTileKeys + c) * run.key_stride;
    for (int64_t d = 0; d < head_dim; d += kLineElements) {
      const __m512i line = c < tail ? _mm512_loadu_si512(from + d) : _mm512_setzero_si512();
      _mm512_store_si512(buffers.key_tail + c * head_dim + d, line);
    }
  }
  for (int64_t row = 0; row < task.rows; row += kRows) {
    const uint16_t* query = buffers.query + row * head_dim;
    asm volatile("" ::: "memory");  // GCC does not know that tile loads read memory
    tile_logits<kRows>(query, key, run.key_stride, whole, head_dim, lines, buffers.logits, ahead);
    if (tail > 0) {
      tile_logits<kRows>(query, buffers.key_tail, head_dim, 1, head_dim, 0, buffers.logits + whole * kTileKeys * kRows,
                         ahead);
    }
    asm volatile("" ::: "memory");
    const __m512 shrink = tile_softmax<kRows>(task, run, row, buffers.logits);
    pack_weights<kRows>(buffers.logits, keys, buffers.weight);
    asm volatile("" ::: "memory");
    tile_values<kRows>(buffers.weight, buffers.value, keys, head_dim, lines, buffers.product, ahead);
    asm volatile("" ::: "memory");
    const int64_t rows = task.rows - row < kRows ? task.rows - row : kRows;
    add_product(buffers.product, rows, head_dim, shrink, task.weighted + row * head_dim);
  }
}

template <int kRows>
inline void decode_tiles(const DecodeTask& task) {
  const DecodeBuffers buffers = decode_buffers<kRows>(task);
  pack_queries<kRows>(task, buffers.query);
  const DecodeTiles<kRows> tiles;
  _tile_loadconfig(&tiles);
  for (int64_t i = 0; i < task.num_runs; ++i) decode_run<kRows>(task, task.runs[i], buffers, ahead_of(task, i));
  _tile_release();
}

void decode_runs_amx(const DecodeTask& task) {
  const bool fits = task.format == KvFormat::kBF16 && task.head_dim % kLineElements == 0;
  const auto in_tiles = [&](int64_t i) { return fits && task.runs[i].count * task.rows >= kLeastTileWork; };
  DecodeTask part = task;
  for (int64_t i = 0; i < task.num_runs; i += part.num_runs) {
    part.runs = task.runs + i;
    part.num_runs = 1;
    while (i + part.num_runs < task.num_runs && in_tiles(i) == in_tiles(i + part.num_runs)) ++part.num_runs;
    if (!in_tiles(i)) {
      decode_runs(part);
    } else if (task.rows <= 4) {
      decode_tiles<4>(part);
    } else {
      decode_tiles<16>(part);
    }
  }
}

}  // namespace
}  // namespace razor::cpu::RAZOR_ISA_NAMESPACE
