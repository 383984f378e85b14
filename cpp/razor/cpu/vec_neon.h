// SPDX-License-Identifier: Apache-2.0
// Vec of four floats: NEON, which every aarch64 processor has.
#pragma once

#include <arm_neon.h>
#include <stdint.h>

#include "razor/cpu/kernels.h"
#include "razor/float16.h"

namespace razor::cpu::neon {
namespace {

struct Vec {
  static constexpr int kLanes = 4;
  static constexpr int kRowBlock = 4;  // 4 x 4 sums, 4 keys and a query fit the 32 registers
  static constexpr int kColumnBlock = 4;
  static constexpr int kProductRows = 8;  // 8 x 3 sums, 3 right vectors and a left element fit the 32 registers
  static constexpr int kProductVecs = 3;
  float32x4_t v;

  static Vec zero() { return {vdupq_n_f32(0.0f)}; }
  static Vec fill(float x) { return {vdupq_n_f32(x)}; }
  static Vec iota() {
    const float lanes[kLanes] = {0, 1, 2, 3};
    return {vld1q_f32(lanes)};
  }

  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static Vec load(const BFloat16* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
  }
  static Vec load(const Float16* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
  }
  static Vec load(const int8_t* p) {
    int32_t lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = p[i];
    return {vcvtq_f32_s32(vld1q_s32(lanes))};
  }
  void store(float* p) const { vst1q_f32(p, v); }
  void store(BFloat16* p) const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t even = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    const uint32x4_t whole = vbslq_u32(vceqq_f32(v, v), even, quiet);  // NaN stays NaN
    vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(whole, 16));
  }
  void store(Float16* p) const { vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  float sum() const { return vaddvq_f32(v); }
  // out[i] = x[i].sum() for a whole column block
  static void sums(const Vec (&x)[kColumnBlock], float* out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(x[0].v, x[1].v), vpaddq_f32(x[2].v, x[3].v)));
  }
  float largest() const { return vmaxvq_f32(v); }
  // For v <= 0. exp(v) = 2^n * exp(r) with |r| <= ln(2) / 2, by a polynomial of degree 6; 0 below -87, NaN stays.
  Vec exp() const {
    const float32x4_t n = vrndnq_f32(vmulq_n_f32(v, 1.44269504f));
    float32x4_t r = vfmsq_n_f32(v, n, 0.693359375f);
    r = vfmsq_n_f32(r, n, -2.12194440e-4f);
    float32x4_t p = vdupq_n_f32(1.0f / 720);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 120), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 24), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 6), p, r);
    p = vfmaq_f32(vdupq_n_f32(0.5f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    const int32x4_t exponent = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    const float32x4_t result = vmulq_f32(p, vreinterpretq_f32_s32(exponent));
    const uint32x4_t none = vcltq_f32(v, vdupq_n_f32(-87.0f));  // false for NaN
    return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(result), none))};
  }
};

inline Vec add(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {vminnmq_f32(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {vmaxnmq_f32(a.v, b.v)}; }
// The larger one, NaN if one is NaN.
inline Vec max_or_nan(Vec a, Vec b) { return {vmaxq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }

}  // namespace
}  // namespace razor::cpu::neon
