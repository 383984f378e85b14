// SPDX-License-Identifier: Apache-2.0
// Quantised cache rows (kv_format.h), written once against Vec: rows to codes and numbers, and back. Encoding takes the
// same roundings on every instruction set, so that a cache holds the same bytes whatever filled it.
// Uses load_upto and store_upto of attention_tile-inl.h.

namespace razor::cpu::RAZOR_ISA_NAMESPACE {
namespace {

constexpr float kNan = __builtin_nanf("");

// The whole number nearest to each x, ties to even, for |x| < 2^22: there a float of 1.5 * 2^23 has no other bits left.
inline Vec round(Vec x) { return add(add(x, Vec::fill(12582912.0f)), Vec::fill(-12582912.0f)); }

// 0 * x is NaN where x is not finite.
inline Vec add_zero_times(Vec x, Vec sum) { return fma(x, Vec::zero(), sum); }

inline bool is_nan(float x) { return x != x; }

template <class T>
inline void encode_int8(const T* row, int64_t head_dim, uint8_t* codes, uint8_t* numbers) {
  const Vec minus = Vec::fill(-1.0f);
  Vec largest = Vec::zero(), zeros = Vec::zero();
  for (int64_t d = 0; d < head_dim; d += Vec::kLanes) {
    const Vec x = load_upto(row + d, head_dim - d);
    largest = max(largest, max(x, mul(x, minus)));
    zeros = add_zero_times(x, zeros);
  }
  const float scale = is_nan(zeros.sum()) ? kNan : largest.largest() / 127.0f + 0.0f;  // never -0
  __builtin_memcpy(numbers, &scale, sizeof scale);
  if (!(scale > 0.0f)) {
    __builtin_memset(codes, 0, head_dim);
    return;
  }
  const Vec unit = Vec::fill(scale), most = Vec::fill(127.0f), least = Vec::fill(-127.0f);
  for (int64_t d = 0; d < head_dim; d += Vec::kLanes) {
    const Vec code = div(load_upto(row + d, head_dim - d), unit);
    float lanes[Vec::kLanes];
    round(min(max(code, least), most)).store(lanes);
    const int64_t width = head_dim - d < Vec::kLanes ? head_dim - d : Vec::kLanes;
    for (int64_t i = 0; i < width; ++i) codes[d + i] = static_cast<uint8_t>(static_cast<int32_t>(lanes[i]));
  }
}

// A group's scale and zero point, as stored and as floats.
struct Int4Word {
  uint32_t bits;

  float scale() const { return bits_to_float((bits & 0xfff0u) << 16); }
  float zero() const { return static_cast<float>(bits & 15u); }
};

// The word of a group between least <= 0 and largest >= 0: of the scales of 4 significant bits the first one >= a 16th
// of the span, or where its 16 steps do not reach both ends within half a step the next, which is >= a 15th.
inline Int4Word int4_word(float least, float largest) {
  const float span = largest - least;
  if (!(span < __builtin_huge_valf())) return {0x7fc0u};
  uint32_t bits = (float_to_bits(span * 0.0625f) + 0xfffffu) & 0xfff00000u;
  if (bits < 0x00800000u) bits = 0x00800000u;
  float scale = bits_to_float(bits), zero = __builtin_ceilf(-least / scale - 0.5f);
  if (zero > 15.5f - largest / scale) {
    bits += 0x100000u;
    scale = bits_to_float(bits), zero = __builtin_ceilf(-least / scale - 0.5f);
  }
  return {bits >> 16 | static_cast<uint32_t>(zero)};
}

// Of a whole group.
inline Int4Word encode_group(const float* x, uint8_t* codes) {
  const Vec minus = Vec::fill(-1.0f);
  Vec largest = Vec::zero(), least = Vec::zero(), zeros = Vec::zero();
  for (int64_t i = 0; i < kInt4Group; i += Vec::kLanes) {
    const Vec v = Vec::load(x + i);
    largest = max(largest, v);
    least = max(least, mul(v, minus));  // of -x
    zeros = add_zero_times(v, zeros);
  }
  const Int4Word word = is_nan(zeros.sum()) ? Int4Word{0x7fc0u} : int4_word(-least.largest(), largest.largest());
  if (is_nan(word.scale())) {
    __builtin_memset(codes, 0, kInt4Group);
    return word;
  }
  const Vec unit = Vec::fill(word.scale()), zero = Vec::fill(word.zero()), most = Vec::fill(15.0f);
  for (int64_t i = 0; i < kInt4Group; i += Vec::kLanes) {
    float lanes[Vec::kLanes];
    min(max(add(round(div(Vec::load(x + i), unit)), zero), Vec::zero()), most).store(lanes);
    for (int64_t k = 0; k < Vec::kLanes; ++k) codes[i + k] = static_cast<uint8_t>(static_cast<int32_t>(lanes[k]));
  }
  return word;
}

// Elements [begin, end) of a row whose halves meet at `half`: which are in low halves of bytes, which in high ones.
struct Nibbles {
  int64_t low_begin, low_end, high_begin, high_end;

  Nibbles(int64_t begin, int64_t end, int64_t half)
      : low_begin(begin < half ? begin : half),
        low_end(end < half ? end : half),
        high_begin(begin > half ? begin : half),
        high_end(end > half ? end : half) {}
};

template <class T>
inline void encode_int4(const T* row, int64_t head_dim, uint8_t* codes, uint8_t* numbers) {
  const int64_t half = (head_dim + 1) / 2;
  for (int64_t begin = 0; begin < head_dim; begin += kInt4Group, numbers += sizeof(uint16_t)) {
    const int64_t left = head_dim - begin, end = left < kInt4Group ? head_dim : begin + kInt4Group;
    float x[kInt4Group] = {};  // zeros change neither end of the range
    for (int64_t i = 0; i < end - begin; i += Vec::kLanes) load_upto(row + begin + i, left - i).store(x + i);
    uint8_t code[kInt4Group];
    const auto word = static_cast<uint16_t>(encode_group(x, code).bits);
    __builtin_memcpy(numbers, &word, sizeof word);
    const Nibbles at(begin, end, half);
    for (int64_t d = at.low_begin; d < at.low_end; ++d) codes[d] = code[d - begin];
    for (int64_t d = at.high_begin; d < at.high_end; ++d) {
      codes[d - half] = static_cast<uint8_t>(codes[d - half] | code[d - begin] << 4);
    }
  }
}

// row[i] = factor * code[i]
template <class T>
inline void decode_int8(const uint8_t* codes, int64_t head_dim, float factor, T* row) {
  const Vec unit = Vec::fill(factor);
  const auto* signed_codes = reinterpret_cast<const int8_t*>(codes);
  for (int64_t d = 0; d < head_dim; d += Vec::kLanes) {
    store_upto(mul(load_upto(signed_codes + d, head_dim - d), unit), row + d, head_dim - d);
  }
}

template <class T>
inline void decode_int4(const uint8_t* codes, const uint8_t* numbers, int64_t head_dim, T* row) {
  const int64_t half = (head_dim + 1) / 2;
  for (int64_t begin = 0; begin < head_dim; begin += kInt4Group, numbers += sizeof(uint16_t)) {
    const int64_t end = head_dim - begin < kInt4Group ? head_dim : begin + kInt4Group;
    int8_t code[kInt4Group] = {};
    if (begin + kInt4Group <= half) {
      for (int64_t i = 0; i < kInt4Group; ++i) code[i] = static_cast<int8_t>(codes[begin + i] & 15);
    } else if (begin >= half && end == begin + kInt4Group) {
      for (int64_t i = 0; i < kInt4Group; ++i) code[i] = static_cast<int8_t>(codes[begin - half + i] >> 4);
    } else {
      const Nibbles at(begin, end, half);
      for (int64_t d = at.low_begin; d < at.low_end; ++d) code[d - begin] = static_cast<int8_t>(codes[d] & 15);
      for (int64_t d = at.high_begin; d < at.high_end; ++d) code[d - begin] = static_cast<int8_t>(codes[d - half] >> 4);
    }
    uint16_t bits;
    __builtin_memcpy(&bits, numbers, sizeof bits);
    const Int4Word word = {bits};
    const Vec unit = Vec::fill(word.scale()), offset = Vec::fill(-word.zero() * word.scale());
    for (int64_t i = 0; i < end - begin; i += Vec::kLanes) {  // exact: all products have 8 significant bits
      store_upto(fma(unit, Vec::load(code + i), offset), row + begin + i, end - begin - i);
    }
  }
}

template <class T>
inline void encode_typed_rows(const void* rows, int64_t stride, int64_t count, int64_t head_dim, KvCodes to,
                              void* codes, void* numbers) {
  const RowBytes bytes = row_bytes(KvFormat::kF32, to, head_dim);
  for (int64_t i = 0; i < count; ++i) {
    const T* row = static_cast<const T*>(rows) + i * stride;
    uint8_t* code = static_cast<uint8_t*>(codes) + i * bytes.codes;
    uint8_t* number = static_cast<uint8_t*>(numbers) + i * bytes.numbers;
    to == KvCodes::kInt8 ? encode_int8(row, head_dim, code, number) : encode_int4(row, head_dim, code, number);
  }
}

void encode_rows(const void* rows, int64_t stride, int64_t count, int64_t head_dim, KvFormat format, KvCodes to,
                 void* codes, void* numbers) {
  switch (format) {
    case KvFormat::kF32:
      return encode_typed_rows<float>(rows, stride, count, head_dim, to, codes, numbers);
    case KvFormat::kBF16:
      return encode_typed_rows<BFloat16>(rows, stride, count, head_dim, to, codes, numbers);
    case KvFormat::kF16:
      return encode_typed_rows<Float16>(rows, stride, count, head_dim, to, codes, numbers);
  }
}

template <class T>
inline void decode_typed_rows(const void* codes, const void* numbers, int64_t count, int64_t head_dim, KvCodes from,
                              T* rows, float* scales) {
  const RowBytes bytes = row_bytes(KvFormat::kF32, from, head_dim);
  for (int64_t i = 0; i < count; ++i, rows += head_dim) {
    const uint8_t* code = static_cast<const uint8_t*>(codes) + i * bytes.codes;
    const uint8_t* number = static_cast<const uint8_t*>(numbers) + i * bytes.numbers;
    float scale = 1.0f;
    if (from == KvCodes::kInt8) __builtin_memcpy(&scale, number, sizeof scale);
    if (scales != nullptr) scales[i] = scale;
    if (from == KvCodes::kInt4) {
      decode_int4(code, number, head_dim, rows);
    } else {
      decode_int8(code, head_dim, scales != nullptr ? 1.0f : scale, rows);
    }
  }
}

void decode_rows(const void* codes, const void* numbers, int64_t count, int64_t head_dim, KvCodes from, KvFormat to,
                 void* rows, float* scales) {
  if (to == KvFormat::kF32) {
    decode_typed_rows(codes, numbers, count, head_dim, from, static_cast<float*>(rows), scales);
  } else {
    decode_typed_rows(codes, numbers, count, head_dim, from, static_cast<BFloat16*>(rows), scales);
  }
}

}  // namespace
}  // namespace razor::cpu::RAZOR_ISA_NAMESPACE
