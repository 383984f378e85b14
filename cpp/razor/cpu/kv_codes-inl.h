// SPDX-License-Identifier: Apache-2.0
// Quantised cache rows (kv_format.h), written once against Vec: rows to codes and numbers, and back to floats. Encoding
// takes the same roundings on every instruction set, so that a cache holds the same bytes whatever filled it.
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

// The largest half <= x, of a finite x, within +-65504; never -0.
inline Float16 half_below(float x) {
  x = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
  Float16 half;
  from_float(x, &half);
  if ((half.bits & 0x7fffu) == 0) half.bits = 0;
  if (!(to_float(half) > x)) return half;
  if (half.bits == 0) return {0x8001u};
  return {static_cast<uint16_t>((half.bits & 0x8000u) != 0 ? half.bits + 1 : half.bits - 1)};
}

// The smallest half >= x, of x >= 0.
inline Float16 half_above(float x) {
  const Float16 below = half_below(-x);
  return {static_cast<uint16_t>(below.bits & 0x7fffu)};
}

// Of a whole group; the two numbers are Float16.
inline void encode_group(const float* x, uint8_t* codes, Float16* scale, Float16* zero) {
  Vec largest = Vec::fill(-__builtin_huge_valf()), least = largest, zeros = Vec::zero();
  for (int64_t i = 0; i < kInt4Group; i += Vec::kLanes) {
    const Vec v = Vec::load(x + i);
    largest = max(largest, v);
    least = max(least, mul(v, Vec::fill(-1.0f)));  // of -x
    zeros = add_zero_times(v, zeros);
  }
  *zero = {0}, *scale = {0x7e00u};  // NaN
  __builtin_memset(codes, 0, kInt4Group);
  if (is_nan(zeros.sum())) return;
  *zero = half_below(-least.largest());
  const float span = largest.largest() - to_float(*zero);
  *scale = half_above(span > 0.0f ? span / 15.0f : 0.0f);  // negative where all is below the range
  if (scale->bits == 0) return;
  const Vec unit = Vec::fill(to_float(*scale)), offset = Vec::fill(-to_float(*zero)), most = Vec::fill(15.0f);
  for (int64_t i = 0; i < kInt4Group; i += Vec::kLanes) {
    const Vec code = div(add(Vec::load(x + i), offset), unit);
    float lanes[Vec::kLanes];
    round(min(max(code, Vec::zero()), most)).store(lanes);
    for (int64_t k = 0; k < Vec::kLanes; ++k) codes[i + k] = static_cast<uint8_t>(static_cast<int32_t>(lanes[k]));
  }
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
  for (int64_t begin = 0; begin < head_dim; begin += kInt4Group, numbers += 2 * sizeof(Float16)) {
    const int64_t left = head_dim - begin, end = left < kInt4Group ? head_dim : begin + kInt4Group;
    float x[kInt4Group];
    for (int64_t i = 0; i < end - begin; i += Vec::kLanes) load_upto(row + begin + i, left - i).store(x + i);
    for (int64_t i = left; i < kInt4Group; ++i) x[i] = x[left - 1];  // changes neither end of the range
    uint8_t code[kInt4Group];
    Float16 pair[2];
    encode_group(x, code, &pair[0], &pair[1]);
    __builtin_memcpy(numbers, pair, sizeof pair);
    const Nibbles at(begin, end, half);
    for (int64_t d = at.low_begin; d < at.low_end; ++d) codes[d] = code[d - begin];
    for (int64_t d = at.high_begin; d < at.high_end; ++d) {
      codes[d - half] = static_cast<uint8_t>(codes[d - half] | code[d - begin] << 4);
    }
  }
}

inline void decode_int8(const uint8_t* codes, const uint8_t* numbers, int64_t head_dim, float* row) {
  float scale;
  __builtin_memcpy(&scale, numbers, sizeof scale);
  const Vec unit = Vec::fill(scale);
  const auto* signed_codes = reinterpret_cast<const int8_t*>(codes);
  for (int64_t d = 0; d < head_dim; d += Vec::kLanes) {
    store_upto(mul(load_upto(signed_codes + d, head_dim - d), unit), row + d, head_dim - d);
  }
}

inline void decode_int4(const uint8_t* codes, const uint8_t* numbers, int64_t head_dim, float* row) {
  const int64_t half = (head_dim + 1) / 2;
  for (int64_t begin = 0; begin < head_dim; begin += kInt4Group, numbers += 2 * sizeof(Float16)) {
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
    Float16 pair[2];
    __builtin_memcpy(pair, numbers, sizeof pair);
    const Vec unit = Vec::fill(to_float(pair[0])), zero = Vec::fill(to_float(pair[1]));
    for (int64_t i = 0; i < end - begin; i += Vec::kLanes) {
      store_upto(fma(unit, Vec::load(code + i), zero), row + begin + i, end - begin - i);
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

void decode_rows(const void* codes, const void* numbers, int64_t count, int64_t head_dim, KvCodes from, float* rows) {
  const RowBytes bytes = row_bytes(KvFormat::kF32, from, head_dim);
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* code = static_cast<const uint8_t*>(codes) + i * bytes.codes;
    const uint8_t* number = static_cast<const uint8_t*>(numbers) + i * bytes.numbers;
    float* row = rows + i * head_dim;
    from == KvCodes::kInt8 ? decode_int8(code, number, head_dim, row) : decode_int4(code, number, head_dim, row);
  }
}

}  // namespace
}  // namespace razor::cpu::RAZOR_ISA_NAMESPACE
