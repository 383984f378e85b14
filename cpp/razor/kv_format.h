// SPDX-License-Identifier: Apache-2.0
// Encodings of one cache row (head_dim elements). Python and Ascend use the same values.
//
// Quantised rows are codes and a few numbers, little-endian. In a page the codes of all its rows come first, then their
// numbers, so that both are evenly spaced and aligned.
// int8: head_dim signed codes -127 ... 127 and one float32, the scale = max |x| / 127; x = code * scale.
// int4: ceil(head_dim / 2) bytes of codes 0 ... 15, and one 16-bit word for each 16 elements (the last may have fewer).
//     Byte i holds element i in its low half, element i + ceil(head_dim / 2) in the high one (0 where there is none).
//     Bits 4 ... 15 of a word are the upper 12 bits of a float32 >= 2^-126, the scale: 4 significant bits. Bits 0 ... 3
//     are the zero point. x = (code - zero point) * scale has 4 + 4 significant bits: it is a bfloat16 number.
// What is not finite, or in int4 spans more than float32 does, makes the scale NaN (0x7fc00000) and all codes 0.
// reference.py, encode_rows, says how scales, zero points and codes are chosen.
#pragma once

#include <stdint.h>

namespace razor {

enum class KvFormat : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

enum class KvCodes : int32_t { kNone = 0, kInt8 = 1, kInt4 = 2 };

constexpr int64_t element_size(KvFormat format) { return format == KvFormat::kF32 ? 4 : 2; }

inline constexpr int64_t kInt4Group = 16;  // elements of one word

// Bytes of one row: its codes, or its elements as they are, and its numbers.
struct RowBytes {
  int64_t codes, numbers;

  constexpr int64_t all() const { return codes + numbers; }
};

constexpr RowBytes row_bytes(KvFormat format, KvCodes codes, int64_t head_dim) {
  switch (codes) {
    case KvCodes::kInt8:
      return {.codes = head_dim, .numbers = 4};
    case KvCodes::kInt4:
      return {.codes = (head_dim + 1) / 2, .numbers = (head_dim + kInt4Group - 1) / kInt4Group * 2};
    case KvCodes::kNone:
      break;
  }
  return {.codes = head_dim * element_size(format), .numbers = 0};
}

}  // namespace razor
