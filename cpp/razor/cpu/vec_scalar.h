// SPDX-License-Identifier: Apache-2.0
// Vec of one float: the plain C++ every other instruction set is compared with.
#pragma once

#include <stdint.h>

#include "razor/cpu/kernels.h"
#include "razor/float16.h"

namespace razor::cpu::scalar {
namespace {

struct Vec {
  static constexpr int kLanes = 1;
  static constexpr int kRowBlock = 2;     // query rows and
  static constexpr int kColumnBlock = 2;  // keys or value vectors held in registers at once
  static constexpr int kProductRows = 4;  // left rows
  static constexpr int kProductVecs = 2;  // and vectors of right rows whose products are held in registers at once
  float v;

  static Vec zero() { return {0.0f}; }
  static Vec fill(float x) { return {x}; }
  static Vec iota() { return {0.0f}; }
  template <class T>
  static Vec load(const T* p) {
    return {to_float(*p)};
  }
  template <class T>
  void store(T* p) const {
    from_float(v, p);
  }
  float sum() const { return v; }
  // out[i] = x[i].sum() for a whole column block
  static void sums(const Vec (&x)[kColumnBlock], float* out) {
    for (int i = 0; i < kColumnBlock; ++i) out[i] = x[i].v;
  }
  float largest() const { return v; }
  Vec exp() const { return {__builtin_expf(v)}; }
};

inline Vec add(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec div(Vec a, Vec b) { return {a.v / b.v}; }
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
// The larger one, NaN if one is NaN.
inline Vec max_or_nan(Vec a, Vec b) { return {a.v != a.v || a.v > b.v ? a.v : b.v}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }

}  // namespace
}  // namespace razor::cpu::scalar
