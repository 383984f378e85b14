// SPDX-License-Identifier: Apache-2.0
// decode_runs for rows of bf16 with AMX: both products as tiles of bf16, up to 16 query rows for the price of one.
//
// Logits are exact products of bf16 summed in float32, since the query is taken as it came and scaled afterwards; a
// tile of logits is [16 keys, query rows], for keys are the side that memory holds line by line. Probabilities are
// split, p = high + low, into two bf16 numbers (an error of 2^-17 of p at most); values are interleaved in pairs of
// keys. Every run is summed into zeroed tiles and added once to the state.
// Short runs, other formats and head dims that are no multiple of 32 go to decode-inl.h.

namespace razor::cpu::RAZOR_ISA_NAMESPACE {
namespace {

constexpr int64_t kTileKeys = 16;        // of a tile of logits
constexpr int64_t kLeastTileWork = 128;  // keys x query rows of a run; less is not worth a tile

// Of 4 or 16 query rows. Tiles 0 to 3 are logits of 64 keys, 4 queries, 5 keys or values, 6 probabilities, 7 weighted
// sums. Of 4 rows the high and low parts of probabilities share a tile, and so do their sums.
template <int kRows>
struct alignas(64) DecodeTiles {
  static constexpr uint8_t kWeights = kRows == 4 ? 8 : 16;
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t line_bytes[16] = {4 * kRows, 4 * kRows, 4 * kRows, 4 * kRows, 4 * kRows, 64, 64, 64};
  uint8_t lines[16] = {16, 16, 16, 16, 16, 16, kWeights, kWeights};
};

// The scratch of a task.
struct DecodeBuffers {
  uint16_t* query;     // [row blocks, head_dim / 32, 16, kRows, 2]: pairs of elements of kRows queries
  uint16_t* key;       // [kTileColumns, head_dim] of a run of codes
  uint16_t* key_tail;  // [16, head_dim], the last keys of a run, zeros after them
  uint16_t* value;     // [2, head_dim / 16, 16, 16, 2]: pairs of keys, see interleave_values
  float* logits;       // [kTileColumns, kRows], then probabilities
  uint16_t* weight;    // [2 (high, low), kRows, kTileColumns]
  float* product;      // [8 or 16, head_dim], in the order of the interleaved values
  float* key_scale;    // [kTileColumns] of int8, zeros after the last
  float* value_scale;  // [kTileColumns]
};

template <int kRows>
inline DecodeBuffers decode_buffers(const DecodeTask& task) {
  const int64_t blocks = (task.rows + kRows - 1) / kRows;
  DecodeBuffers b;
  b.value = reinterpret_cast<uint16_t*>(task.scratch);
  b.key = b.value + kTileColumns * task.head_dim;
  b.key_tail = b.key + kTileColumns * task.head_dim;
  b.query = b.key_tail + kTileKeys * task.head_dim;
  b.logits = reinterpret_cast<float*>(b.query + blocks * kRows * task.head_dim);
  b.weight = reinterpret_cast<uint16_t*>(b.logits + kTileColumns * kRows);
  b.key_scale = reinterpret_cast<float*>(b.weight + 2 * kTileColumns * kRows);
  b.value_scale = b.key_scale + kTileColumns;
  b.product = b.value_scale + kTileColumns;
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

// logits[key][row] of up to 4 whole tiles of 16 keys: enough sums for one product to end while the others begin.
template <int kRows>
inline void tile_logits(const uint16_t* query, const uint16_t* key, int64_t stride, int64_t tiles, int64_t head_dim,
                        int64_t lines, float* logits, Ahead& ahead) {
  const int64_t step = kTileKeys * stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t d = 0; d < head_dim; d += kLineElements) {
    ahead.some(lines);
    _tile_loadd(4, query + d * kRows, 4 * kRows);
    _tile_loadd(5, key + d, 2 * stride);
    _tile_dpbf16ps(0, 5, 4);
    if (tiles < 2) continue;
    _tile_loadd(5, key + step + d, 2 * stride);
    _tile_dpbf16ps(1, 5, 4);
    if (tiles < 3) continue;
    _tile_loadd(5, key + 2 * step + d, 2 * stride);
    _tile_dpbf16ps(2, 5, 4);
    if (tiles < 4) continue;
    _tile_loadd(5, key + 3 * step + d, 2 * stride);
    _tile_dpbf16ps(3, 5, 4);
  }
  _tile_stored(0, logits, 4 * kRows);
  if (tiles > 1) _tile_stored(1, logits + kTileKeys * kRows, 4 * kRows);
  if (tiles > 2) _tile_stored(2, logits + 2 * kTileKeys * kRows, 4 * kRows);
  if (tiles > 3) _tile_stored(3, logits + 3 * kTileKeys * kRows, 4 * kRows);
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

// product[row][element] = probabilities x values; of 4 rows those of the high parts, then those of the low ones.
template <int kRows>
inline void tile_values(const uint16_t* weight, const uint16_t* value, int64_t keys, int64_t head_dim, int64_t lines,
                        float* product, Ahead& ahead) {
  for (int64_t d = 0; d < head_dim; d += Vec::kLanes) {
    _tile_zero(7);
    ahead.some(lines);
    for (int64_t c = 0; c < keys; c += kPairedKeys) {
      _tile_loadd(5, value + c * head_dim + d * kPairedKeys, 64);
      _tile_loadd(6, weight + c, 2 * kTileColumns);
      _tile_dpbf16ps(7, 6, 5);
      if constexpr (kRows > 4) {
        _tile_loadd(6, weight + kRows * kTileColumns + c, 2 * kTileColumns);
        _tile_dpbf16ps(7, 6, 5);
      }
    }
    _tile_stored(7, product + d, 4 * head_dim);
  }
}

// weighted = shrink * weighted + product, the elements in their own order again, if they had left it.
template <int kRows>
inline void add_product(const float* product, int64_t rows, int64_t head_dim, __m512 shrink, bool in_order,
                        float* weighted) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(Vec::kLanes));
  const __m512i low = in_order ? first : _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high =
      in_order ? second : _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  alignas(64) float factors[Vec::kLanes];
  _mm512_store_ps(factors, shrink);
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 factor = _mm512_set1_ps(factors[r]);
    const auto summed = [&](int64_t d) {
      const __m512 high = _mm512_load_ps(product + r * head_dim + d);
      return kRows > 4 ? high : _mm512_add_ps(high, _mm512_load_ps(product + (kRows + r) * head_dim + d));
    };
    for (int64_t d = 0; d < head_dim; d += 2 * Vec::kLanes) {
      const __m512 a = summed(d), b = summed(d + Vec::kLanes);
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
  const bool coded = run.key_numbers != nullptr, scaled = coded && task.codes == KvCodes::kInt8;
  const int64_t whole = run.count / kTileKeys, tail = run.count % kTileKeys;
  const int64_t keys = (run.count + kPairedKeys - 1) / kPairedKeys * kPairedKeys;
  // Portions of the next run: a quarter goes with the values being interleaved, as much with keys that are decoded, the
  // rest with the products.
  const int64_t bytes = row_bytes(task.format, coded ? task.codes : KvCodes::kNone, head_dim).all();
  const int64_t all = 2 * kTileColumns * bytes / kLineBytes, quarter = all / 4;
  const int64_t lines = all * (coded ? 2 : 3) / 4 / (blocks * 3 * (head_dim / kLineElements)) + 1;
  if (scaled) __builtin_memset(buffers.key_scale, 0, 2 * kTileColumns * sizeof(float));

  // Without work for some 0.4 us the unit of tiles falls asleep, and its next product takes 0.25 us: measured, int4
  // decodes 33.4 ns a token without these products for nothing and 25.8 with them. int8 is done in less.
  int64_t since = 0;
  const int64_t share = (quarter + kTileColumns / 2) / kTileColumns;
  const auto meanwhile = [&](int64_t rows) {
    ahead.some(rows * share);
    if (!scaled && ++since % kTileKeys == 0) _tile_dpbf16ps(7, 6, 5);
  };
  const auto* key = static_cast<const uint16_t*>(run.key);
  int64_t stride = run.key_stride;
  if (coded) {
    key = buffers.key, stride = head_dim;
    bf16_rows_of(run.key, run.key_numbers, run.count, head_dim, task.codes, buffers.key, buffers.key_scale,
                 [&] { meanwhile(1); });
  } else {
    interleave_values(static_cast<const uint16_t*>(run.value), run.value_stride, run.count, head_dim,
                      quarter / (kTileColumns / 2), buffers.value, ahead);
  }
  for (int64_t c = 0; tail > 0 && c < kTileKeys; ++c) {
    const uint16_t* from = key + (whole * kTileKeys + c) * stride;
    for (int64_t d = 0; d < head_dim; d += kLineElements) {
      const __m512i line = c < tail ? _mm512_loadu_si512(from + d) : _mm512_setzero_si512();
      _mm512_store_si512(buffers.key_tail + c * head_dim + d, line);
    }
  }
  for (int64_t row = 0; row < task.rows; row += kRows) {
    const uint16_t* query = buffers.query + row * head_dim;
    asm volatile("" ::: "memory");  // GCC does not know that tile loads read memory
    if (whole > 0) tile_logits<kRows>(query, key, stride, whole, head_dim, lines, buffers.logits, ahead);
    if (tail > 0) {
      tile_logits<kRows>(query, buffers.key_tail, head_dim, 1, head_dim, 0, buffers.logits + whole * kTileKeys * kRows,
                         ahead);
    }
    asm volatile("" ::: "memory");
    if (coded && row == 0) {  // while the tiles are at work
      pairs_of(run.value, run.value_numbers, run.count, head_dim, task.codes, buffers.value, buffers.value_scale,
               [&] { meanwhile(2); });
    }
    if (scaled) scale_keys<kRows>(buffers.key_scale, keys, buffers.logits);
    const __m512 shrink = tile_softmax<kRows>(task, run, row, buffers.logits);
    if (scaled) scale_keys<kRows>(buffers.value_scale, keys, buffers.logits);
    pack_weights<kRows>(buffers.logits, keys, buffers.weight);
    asm volatile("" ::: "memory");
    tile_values<kRows>(buffers.weight, buffers.value, keys, head_dim, lines, buffers.product, ahead);
    asm volatile("" ::: "memory");
    const int64_t rows = task.rows - row < kRows ? task.rows - row : kRows;
    add_product<kRows>(buffers.product, rows, head_dim, shrink, /*in_order=*/coded, task.weighted + row * head_dim);
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
  const bool fits = task.format == KvFormat::kBF16 && has_bf16_lines(task.head_dim);
  const auto in_tiles = [&](int64_t i) {
    const DecodeRun& run = task.runs[i];
    const bool looked_up = run.key_numbers != nullptr && task.codes == KvCodes::kInt4;  // nowhere faster than here
    return fits && run.count * task.rows >= (looked_up ? kTileKeys : kLeastTileWork);
  };
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
