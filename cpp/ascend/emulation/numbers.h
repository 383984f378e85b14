// SPDX-License-Identifier: Apache-2.0
// Emulation of a subset of Ascend C for tests; not CANN. 16-bit numbers, and integers that refuse to wrap.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "razor/float16.h"

// As on the device, these have no arithmetic here: what is computed goes through Cast.
struct half {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

namespace razor::emulation {

// A field of a call on the device: a value outside its range would wrap there, and is an error here.
template <class T>
struct Field {
  T value;
  template <class U, std::enable_if_t<std::is_integral_v<U>, int> = 0>
  constexpr Field(U given) : value(static_cast<T>(given)) {  // NOLINT: implicit, as on the device
    constexpr auto kMost = static_cast<long long>(std::numeric_limits<T>::max());
    const bool negative = std::is_signed_v<U> && static_cast<long long>(given) < 0;
    if (negative || static_cast<unsigned long long>(given) > static_cast<unsigned long long>(kMost)) {
      throw std::range_error("field: expected 0 to " + std::to_string(kMost) + ", got " + std::to_string(given));
    }
  }
  constexpr operator T() const { return value; }  // NOLINT
};

template <class T>
inline constexpr bool kIsNumber = std::is_same_v<T, half> || std::is_same_v<T, bfloat16_t> || std::is_arithmetic_v<T>;

inline float to_number(float x) { return x; }
inline float to_number(half x) { return to_float(Float16{x.bits}); }
inline float to_number(bfloat16_t x) { return to_float(BFloat16{x.bits}); }

inline void from_number(float x, float* out) { *out = x; }
inline void from_number(float x, half* out) {
  Float16 rounded;
  from_float(x, &rounded);
  out->bits = rounded.bits;
}
inline void from_number(float x, bfloat16_t* out) {
  BFloat16 rounded;
  from_float(x, &rounded);
  out->bits = rounded.bits;
}

}  // namespace razor::emulation
