// SPDX-License-Identifier: Apache-2.0
// decode_rows to bf16 with AVX-512 BF16, exact: int8 codes and what int4 stands for are bf16 numbers.
//
// A group of int4 has 16 values, so that two groups are a table of 32 bf16 numbers in one register, and a code is
// looked up, not computed. The two are those whose codes share bytes, half a row apart. Other formats and head dims
// that are no multiple of 32 go to kv_codes-inl.h.

namespace razor::cpu::RAZOR_ISA_NAMESPACE {
namespace {

constexpr int64_t kWordsAtOnce = 512;  // of int4, in floats: 4 KB

inline __m512i int8_line(const uint8_t* codes) {
  const auto widened = [](const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  };
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(widened(codes + 16), widened(codes)));
}

// Scales, and zero points times scales, of `count` words.
struct Int4Numbers {
  alignas(64) float scale[kWordsAtOnce];
  alignas(64) float offset[kWordsAtOnce];

  void read(const uint8_t* words, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) {
      const auto held = static_cast<__mmask16>(count - i < 16 ? (1u << (count - i)) - 1 : 0xffffu);
      const __m512i word = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(held, words + i * 2));
      const __m512i bits = _mm512_slli_epi32(_mm512_and_si512(word, _mm512_set1_epi32(0xfff0)), 16);
      const __m512 zero = _mm512_cvtepi32_ps(_mm512_and_si512(word, _mm512_set1_epi32(15)));
      _mm512_store_ps(scale + i, _mm512_castsi512_ps(bits));
      _mm512_store_ps(offset + i, _mm512_mul_ps(_mm512_castsi512_ps(bits), zero));
    }
  }

  // What the codes 0 ... 15 stand for in two groups by turns. Nothing is rounded: the lower half of each float is 0.
  __m512i table(int64_t even, int64_t odd) const {
    const __m512 code = Vec::iota().v;
    const auto values = [&](int64_t group) {
      return _mm512_castps_si512(_mm512_fmsub_ps(code, _mm512_set1_ps(scale[group]), _mm512_set1_ps(offset[group])));
    };
    return _mm512_or_si512(_mm512_srli_epi32(values(even), 16), values(odd));
  }
};

// The low halves of 16 bytes, then the high ones, as they stand for: those in the even places of the table, these in
// the odd ones.
inline __m512i int4_line(const uint8_t* codes, __m512i table) {
  const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(-1), 1);
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  // Byte 0 ... 7, 8 ... 15, and both once more, in the upper halves of words.
  const __m512i spread =
      _mm512_set_epi64(0x0f800e800d800c80, 0x0b800a8009800880, 0x0780068005800480, 0x0380028001800080,
                       0x0f800e800d800c80, 0x0b800a8009800880, 0x0780068005800480, 0x0380028001800080);
  const __m512i word = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytes), spread);
  const __m512i shift = _mm512_add_epi16(_mm512_set1_epi16(7), _mm512_and_si512(upper, _mm512_set1_epi16(4)));
  // Twice the code, and 1 in the upper half: (word >> shift & 30) | (upper & 1)
  const __m512i index = _mm512_ternarylogic_epi32(_mm512_srlv_epi16(word, shift), _mm512_set1_epi16(30),
                                                  _mm512_and_si512(upper, _mm512_set1_epi16(1)), 0xea);
  return _mm512_permutexvar_epi16(index, table);
}

// Rows of bf16 [count, head_dim], and the scales of int8 rows [count], nullable (not wanted); `each` is called once a
// row.
template <class Each>
inline void bf16_rows_of(const void* codes, const void* numbers, int64_t count, int64_t head_dim, KvCodes from,
                         uint16_t* rows, float* scales, const Each& each) {
  const auto* code = static_cast<const uint8_t*>(codes);
  if (from == KvCodes::kInt8) {
    if (scales != nullptr) __builtin_memcpy(scales, numbers, count * sizeof(float));
    for (int64_t i = 0; i < count; ++i, code += head_dim, rows += head_dim) {
      each();
      for (int64_t d = 0; d < head_dim; d += 32) _mm512_storeu_si512(rows + d, int8_line(code + d));
    }
    return;
  }
  const auto* word = static_cast<const uint8_t*>(numbers);
  const int64_t half = head_dim / 2, groups = head_dim / kInt4Group, at_once = kWordsAtOnce / groups;
  Int4Numbers decoded;
  for (int64_t first = 0; first < count; first += at_once) {
    const int64_t end = count - first < at_once ? count : first + at_once;
    decoded.read(word + first * groups * 2, (end - first) * groups);
    for (int64_t i = first, group = 0; i < end; ++i, group += groups, code += half, rows += head_dim) {
      each();
      for (int64_t d = 0; d < half; d += kInt4Group) {
        const int64_t low = group + d / kInt4Group;
        const __m512i line = int4_line(code + d, decoded.table(low, low + groups / 2));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + d), _mm512_castsi512_si256(line));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + half + d), _mm512_extracti64x4_epi64(line, 1));
      }
    }
  }
}

inline bool has_bf16_lines(int64_t head_dim) { return head_dim % 32 == 0 && head_dim / kInt4Group <= kWordsAtOnce / 2; }

void decode_rows_bf16(const void* codes, const void* numbers, int64_t count, int64_t head_dim, KvCodes from,
                      KvFormat to, void* rows, float* scales) {
  if (to != KvFormat::kBF16 || !has_bf16_lines(head_dim)) {
    return decode_rows(codes, numbers, count, head_dim, from, to, rows, scales);
  }
  bf16_rows_of(codes, numbers, count, head_dim, from, static_cast<uint16_t*>(rows), scales, [] {});
  for (int64_t i = 0; from == KvCodes::kInt4 && i < count; ++i) scales[i] = 1.0f;
}

// 16 elements of two rows by turns: one of the first, one of the second.
inline __m512i int8_pairs(const uint8_t* even, const uint8_t* odd) {
  const auto widened = [](const uint8_t* p) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)));
  };
  return _mm512_or_si512(_mm512_srli_epi32(widened(even), 16), widened(odd));
}

// Two rows of 16 bytes by turns, in the upper halves of words.
inline __m512i int4_words(const uint8_t* even, const uint8_t* odd) {
  const __m512i first =
      _mm512_set_epi64(0x80800f8080800e80, 0x80800d8080800c80, 0x80800b8080800a80, 0x8080098080800880,
                       0x8080078080800680, 0x8080058080800480, 0x8080038080800280, 0x8080018080800080);
  const __m512i second = _mm512_rol_epi32(first, 16);
  const auto spread = [](const uint8_t* p, __m512i order) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), order);
  };
  return _mm512_or_si512(spread(even, first), spread(odd, second));
}

template <int kShift>
inline __m512i int4_pairs(__m512i words, __m512i table) {
  const __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, kShift), _mm512_set1_epi16(30),
                                                  _mm512_set1_epi32(0x10000), 0xea);
  return _mm512_permutexvar_epi16(index, table);
}

// Rows for the products of tiles: [count / 32 rounded up, head_dim / 16, 16, 16, 2], pairs of rows, zeros after the
// last one; and the scales of int8 rows [count]. `each` is called once a pair.
template <class Each>
inline void pairs_of(const void* codes, const void* numbers, int64_t count, int64_t head_dim, KvCodes from,
                     uint16_t* out, float* scales, const Each& each) {
  constexpr int64_t kRowsOfTile = 32;
  const auto* code = static_cast<const uint8_t*>(codes);
  const auto* word = static_cast<const uint8_t*>(numbers);
  const int64_t half = head_dim / 2, groups = head_dim / kInt4Group, at_once = kWordsAtOnce / groups / 2 * 2;
  const auto line = [&](int64_t row, int64_t d) {
    return out + row / kRowsOfTile * kRowsOfTile * head_dim + row % kRowsOfTile * 16 + d * kRowsOfTile;
  };
  Int4Numbers decoded;
  if (from == KvCodes::kInt8) __builtin_memcpy(scales, numbers, count * sizeof(float));
  for (int64_t i = 0; i < count; i += 2) {
    each();
    const bool two = i + 1 < count;
    if (from == KvCodes::kInt8) {
      const uint8_t *even = code + i * head_dim, *odd = two ? even + head_dim : even;
      for (int64_t d = 0; d < head_dim; d += 16) {
        const __m512i pairs = int8_pairs(even + d, odd + d);
        _mm512_store_si512(line(i, d), two ? pairs : _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff)));
      }
      continue;
    }
    if (i % at_once == 0) decoded.read(word + i * groups * 2, (count - i < at_once ? count - i : at_once) * groups);
    const uint8_t *even = code + i * half, *odd = two ? even + half : even;
    const int64_t first = i % at_once * groups, next = two ? groups : 0;
    for (int64_t d = 0; d < half; d += kInt4Group) {
      const int64_t low = first + d / kInt4Group, high = low + groups / 2;
      const __m512i words = int4_words(even + d, odd + d);
      const __m512i low_pairs = int4_pairs<7>(words, decoded.table(low, low + next));
      const __m512i high_pairs = int4_pairs<11>(words, decoded.table(high, high + next));
      const __m512i held = _mm512_set1_epi32(two ? -1 : 0xffff);
      _mm512_store_si512(line(i, d), _mm512_and_si512(low_pairs, held));
      _mm512_store_si512(line(i, half + d), _mm512_and_si512(high_pairs, held));
    }
  }
  for (int64_t i = (count + 1) / 2 * 2; i % kRowsOfTile != 0; i += 2) {
    for (int64_t d = 0; d < head_dim; d += 16) _mm512_store_si512(line(i, d), _mm512_setzero_si512());
  }
}

}  // namespace
}  // namespace razor::cpu::RAZOR_ISA_NAMESPACE
