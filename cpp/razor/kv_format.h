// SPDX-License-Identifier: Apache-2.0
// Encodings of one cache row (head_dim elements). Python and Ascend use the same values.
//
// Quantised rows are codes and a few numbers. int8: x = code * scale, one float32 scale for each row. int4: x = zero +
// code * scale, float16 scale and zero for each group of elements; byte i of the codes holds element i in its low half,
// element i + ceil(head_dim / 2) in the high one. In a page the codes of all its rows come first, then their numbers,
// so that both are evenly spaced and aligned. What is not finite makes the scale NaN.
#pragma once

#include <stdint.h>

namespace razor {

enum class KvFormat : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

enum class KvCodes : int32_t { kNone = 0, kInt8 = 1, kInt4 = 2 };

constexpr int64_t element_size(KvFormat format) { return format == KvFormat::kF32 ? 4 : 2; }

inline constexpr int64_t kInt4Group = 32;  // elements

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
      return {.codes = (head_dim + 1) / 2, .numbers = (head_dim + kInt4Group - 1) / kInt4Group * 4};
    case KvCodes::kNone:
      break;
  }
  return {.codes = head_dim * element_size(format), .numbers = 0};
}

}  // namespace razor
