// SPDX-License-Identifier: Apache-2.0
// decode_runs for rows of bf16 with vdpbf16ps. Logits are exact products of bf16 summed in float32, since the query is
// taken as it came and scaled afterwards. They lie [key, row], as
// decode_softmax-inl.h wants them: 16 sums of rows x keys end in one vector.
// Values stay in float32 arithmetic: of 32 loaded at once, those at even places are shifted, those at odd places
// masked, and both go back to their own order where a run is added to the state. Probabilities as two bf16 numbers
// would take as many products on values that had to be interleaved first.
// Other formats and head dims that are no multiple of 32 go to decode-inl.h, and int8: decoded to bf16 first it takes
// 34 ns a token, there 25.
//
// Tried: logits by float32 fma of even and odd elements too; no clear difference on a processor where one vdpbf16ps
// takes 2.1 cycles and an fma 0.53 (bench/LOG.md).

namespace razor::cpu::RAZOR_ISA_NAMESPACE {
namespace {

// Lane i becomes the sum of x[i].
inline __m512 sums_of_16(const __m512 (&x)[Vec::kLanes]) {
  const auto pairs = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  const auto fours = [](__m512 a, __m512 b) {
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  };
  const auto blocks = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  __m512 y[4];
  for (int i = 0; i < 4; ++i) y[i] = fours(pairs(x[4 * i], x[4 * i + 1]), pairs(x[4 * i + 2], x[4 * i + 3]));
  return blocks(blocks(y[0], y[1]), blocks(y[2], y[3]));
}

// A run of int4 codes as one of bf16, in memory of [2, kTileColumns, head_dim]; others as they are.
inline DecodeRun decoded_run(const DecodeTask& task, const DecodeRun& run, uint16_t* memory, Ahead& ahead) {
  if (run.key_numbers == nullptr) return run;
  uint16_t* value = memory + kTileColumns * task.head_dim;
  const auto fetch = [&] { ahead.some(1); };  // of a whole page this is more than all
  bf16_rows_of(run.key, run.key_numbers, run.count, task.head_dim, task.codes, memory, /*scales=*/nullptr, fetch);
  bf16_rows_of(run.value, run.value_numbers, run.count, task.head_dim, task.codes, value, /*scales=*/nullptr, fetch);
  DecodeRun out = run;
  out.key = memory, out.value = value;
  out.key_stride = out.value_stride = task.head_dim;
  return out;
}

// For every line that is read, one of the next run is fetched; blocks of rows that read the same lines share in it.
inline int64_t share_of(int64_t lines, int64_t blocks) { return (lines + blocks - 1) / blocks; }

// logits[key][row] = query_row . key, not scaled. Past the last key the last one is taken again.
template <int kRows>
inline void bf16_logits(const uint16_t* const (&query)[kRows], const DecodeRun& run, int64_t head_dim, int64_t blocks,
                        float* logits, Ahead& ahead) {
  constexpr int kKeys = Vec::kLanes / kRows;
  const auto* keys = static_cast<const uint16_t*>(run.key);
  for (int64_t c = 0; c < run.count; c += kKeys) {
    const uint16_t* key[kKeys];
    for (int i = 0; i < kKeys; ++i) key[i] = keys + (c + i < run.count ? c + i : run.count - 1) * run.key_stride;
    __m512 total[Vec::kLanes];
    for (__m512& x : total) x = _mm512_setzero_ps();
    for (int64_t d = 0; d < head_dim; d += kLineElements) {
      ahead.some(share_of(kKeys, blocks));
      __m512bh q[kRows];
      for (int r = 0; r < kRows; ++r) q[r] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(query[r] + d));
      for (int i = 0; i < kKeys; ++i) {
        const auto k = reinterpret_cast<__m512bh>(_mm512_loadu_si512(key[i] + d));
        for (int r = 0; r < kRows; ++r) total[i * kRows + r] = _mm512_dpbf16_ps(total[i * kRows + r], q[r], k);
      }
    }
    _mm512_store_ps(logits + c * kRows, sums_of_16(total));
  }
}

// weighted[r] = shrink[r] * weighted[r] + sum over keys of probability[key][r] * value, for kLines lines from d on.
template <int kRows, int kLines>
inline void bf16_values(const float* probability, const DecodeRun& run, int64_t d, int64_t rows, int64_t head_dim,
                        const float* shrink, int64_t blocks, float* weighted, Ahead& ahead) {
  const auto* value = static_cast<const uint16_t*>(run.value) + d;
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  __m512 even[kRows][kLines], odd[kRows][kLines];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kLines; ++i) even[r][i] = odd[r][i] = _mm512_setzero_ps();
  }
  for (int64_t c = 0; c < run.count; ++c) {
    ahead.some(share_of(kLines, blocks));
    for (int i = 0; i < kLines; ++i) {
      const __m512i x = _mm512_loadu_si512(value + c * run.value_stride + i * kLineElements);
      const __m512 x_even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
      const __m512 x_odd = _mm512_castsi512_ps(_mm512_and_si512(x, upper));
      for (int r = 0; r < kRows; ++r) {
        const __m512 p = _mm512_set1_ps(probability[c * kRows + r]);
        even[r][i] = _mm512_fmadd_ps(p, x_even, even[r][i]);
        odd[r][i] = _mm512_fmadd_ps(p, x_odd, odd[r][i]);
      }
    }
  }
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    const __m512 factor = _mm512_set1_ps(shrink[r]);
    for (int i = 0; i < kLines; ++i) {
      float* out = weighted + r * head_dim + d + i * kLineElements;
      const __m512 first = _mm512_permutex2var_ps(even[r][i], low, odd[r][i]);
      const __m512 second = _mm512_permutex2var_ps(even[r][i], high, odd[r][i]);
      _mm512_storeu_ps(out, _mm512_fmadd_ps(factor, _mm512_loadu_ps(out), first));
      out += Vec::kLanes;
      _mm512_storeu_ps(out, _mm512_fmadd_ps(factor, _mm512_loadu_ps(out), second));
    }
  }
}

template <int kRows>
inline void bf16_rows(const DecodeTask& task, const DecodeRun& run, int64_t row, int64_t blocks, float* logits,
                      Ahead& ahead) {
  constexpr int kLines = kRows == 4 ? 2 : 4;
  const int64_t head_dim = task.head_dim, rows = task.rows - row < kRows ? task.rows - row : kRows;
  const uint16_t* query[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t held = row + (r < rows ? r : rows - 1);
    query[r] = static_cast<const uint16_t*>(task.query) + held / task.group * task.query_stride[0] +
               held % task.group * task.query_stride[1];
  }
  bf16_logits<kRows>(query, run, head_dim, blocks, logits, ahead);
  alignas(64) float shrink[Vec::kLanes];
  _mm512_store_ps(shrink, tile_softmax<kRows>(task, run, row, logits));
  float* weighted = task.weighted + row * head_dim;
  int64_t d = 0;
  for (; d + kLines * kLineElements <= head_dim; d += kLines * kLineElements) {
    bf16_values<kRows, kLines>(logits, run, d, rows, head_dim, shrink, blocks, weighted, ahead);
  }
  for (; d < head_dim; d += kLineElements) {
    bf16_values<kRows, 1>(logits, run, d, rows, head_dim, shrink, blocks, weighted, ahead);
  }
}

template <int kRows>
inline void decode_bf16(const DecodeTask& task) {
  const int64_t blocks = (task.rows + kRows - 1) / kRows;
  auto* decoded = reinterpret_cast<uint16_t*>(task.scratch);
  float* logits = task.scratch + kTileColumns * task.head_dim;
  for (int64_t i = 0; i < task.num_runs; ++i) {
    Ahead ahead = ahead_of(task, i);
    const DecodeRun run = decoded_run(task, task.runs[i], decoded, ahead);
    for (int64_t row = 0; row < task.rows; row += kRows) bf16_rows<kRows>(task, run, row, blocks, logits, ahead);
  }
}

// The unit of tiles does without: beside them this read memory 8 % slower than decode_runs with one query, nobody
// knows why.
void decode_runs_bf16(const DecodeTask& task) {
  if (task.format != KvFormat::kBF16 || !has_bf16_lines(task.head_dim) || task.codes == KvCodes::kInt8) {
    return decode_runs(task);
  }
  if (task.rows == 1) return decode_bf16<1>(task);
  if (task.rows == 2) return decode_bf16<2>(task);
  decode_bf16<4>(task);
}

}  // namespace
}  // namespace razor::cpu::RAZOR_ISA_NAMESPACE
