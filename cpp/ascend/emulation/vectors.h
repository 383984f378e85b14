// SPDX-License-Identifier: Apache-2.0
// Emulation of a subset of Ascend C for tests; not CANN. Instructions of the vector unit: 256 bytes per repeat, as 8
// blocks of 32 bytes with a stride between them. Counts and masks in elements, strides in blocks.
#pragma once

#include <cmath>
#include <limits>

#include "tensors.h"

namespace AscendC {

struct BinaryRepeatParams {
  Field<uint8_t> dstBlk, src0Blk, src1Blk, dstRep, src0Rep, src1Rep;
  BinaryRepeatParams(Field<uint8_t> d, Field<uint8_t> a, Field<uint8_t> b, Field<uint8_t> dr, Field<uint8_t> ar,
                     Field<uint8_t> br)
      : dstBlk(d), src0Blk(a), src1Blk(b), dstRep(dr), src0Rep(ar), src1Rep(br) {}
};
struct UnaryRepeatParams {
  Field<uint16_t> dstBlk, srcBlk;
  Field<uint8_t> dstRep, srcRep;
  UnaryRepeatParams(Field<uint16_t> d, Field<uint16_t> s, Field<uint8_t> dr, Field<uint8_t> sr)
      : dstBlk(d), srcBlk(s), dstRep(dr), srcRep(sr) {}
};
struct BrcbRepeatParams {
  Field<uint16_t> dstBlkStride, dstRepStride;
  BrcbRepeatParams(Field<uint16_t> block, Field<uint16_t> repeat) : dstBlkStride(block), dstRepStride(repeat) {}
};

enum class RoundMode { CAST_NONE, CAST_RINT };
enum class ReduceOrder { ORDER_VALUE_INDEX, ORDER_ONLY_VALUE };

namespace detail {

inline constexpr int kMostLanes = 128;

// Not a number wins: what was never written must not get lost in a maximum.
inline float larger(float a, float b) { return a > b || a != a ? a : b; }

// One operand of an instruction: where lane i of repeat r lives.
template <class T>
struct Operand {
  const LocalTensor<T>& tensor;
  int64_t block_stride, repeat_stride;  // blocks

  static constexpr int64_t kLanes = emu::kGranule / static_cast<int64_t>(sizeof(T));
  [[nodiscard]] int64_t at(int64_t repeat, int64_t lane) const {
    return tensor.offset + (repeat * repeat_stride + lane / kLanes * block_stride) * emu::kGranule +
           lane % kLanes * static_cast<int64_t>(sizeof(T));
  }
  void check(const char* which) const {
    emu::Machine& m = emu::machine();
    if (tensor.buffer < 0) emu::fail(m.where(), ": expected a tensor with memory as ", which, ", got an empty one");
    m.check_usable(tensor.buffer, tensor.generation);
    if (tensor.offset % emu::kGranule != 0) {
      emu::fail(m.where(), ": expected a 32-byte aligned ", which, ", got ", tensor.offset);
    }
  }
  // The block that holds this lane is about to be used.
  void touch(int64_t repeat, int64_t lane, int64_t lanes, bool write, bool accumulates) const {
    const int64_t begin = at(repeat, lane), end = at(repeat, lane + lanes - 1) + static_cast<int64_t>(sizeof(T));
    if (end > tensor.offset + tensor.bytes) {
      emu::fail(emu::machine().where(), ": expected lanes within the tensor, got ", end - tensor.offset - tensor.bytes,
                " bytes past its end");
    }
    if (write) {
      emu::machine().write_ub(begin, end - begin, static_cast<int32_t>(repeat), accumulates);
    } else {
      emu::machine().read_ub(begin, end - begin, static_cast<int32_t>(repeat), accumulates);
    }
  }
  [[nodiscard]] T get(int64_t repeat, int64_t lane) const {
    T value;
    std::memcpy(&value, emu::machine().ub.data() + at(repeat, lane), sizeof(T));
    return value;
  }
  void set(int64_t repeat, int64_t lane, T value) const {
    std::memcpy(emu::machine().ub.data() + at(repeat, lane), &value, sizeof(T));
  }
};

// Which lanes work: the leading ones of every repeat, or `count` elements in a row, or bits.
struct Lanes {
  int64_t repeats, mask;  // mask: leading lanes of every repeat but the last
  int64_t last;           // of the last repeat
  const uint64_t* bits = nullptr;

  [[nodiscard]] int64_t of(int64_t repeat) const { return repeat + 1 == repeats ? last : mask; }
  [[nodiscard]] bool active(int64_t lane) const { return bits == nullptr || (bits[lane / 64] >> (lane % 64) & 1) != 0; }
};

inline Lanes first_lanes(uint64_t mask, int64_t repeats, int64_t most) {
  if (mask == 0 || static_cast<int64_t>(mask) > most) {
    emu::fail(emu::machine().where(), ": expected a mask from 1 to ", most, ", got ", mask);
  }
  return {.repeats = repeats, .mask = static_cast<int64_t>(mask), .last = static_cast<int64_t>(mask)};
}

inline Lanes in_a_row(int64_t count, int64_t lanes) {
  if (count < 0) emu::fail(emu::machine().where(), ": expected a count >= 0, got ", count);
  const int64_t repeats = (count + lanes - 1) / lanes;
  return {.repeats = repeats, .mask = lanes, .last = count - (repeats - 1) * lanes};
}

// Same block, or none in common: anything else is undefined.
template <class D, class S>
void check_overlap(const Operand<D>& dst, const Operand<S>& src, int64_t repeat, int64_t lanes) {
  const auto per = [](auto& o) { return std::remove_reference_t<decltype(o)>::kLanes; };
  if (dst.at(repeat, lanes - 1) < src.at(repeat, 0) || src.at(repeat, lanes - 1) < dst.at(repeat, 0)) return;
  for (int64_t i = 0; i < lanes; i += per(src)) {
    const int64_t from = src.at(repeat, i) / emu::kGranule;
    for (int64_t j = 0; j < lanes; j += per(dst)) {
      if (dst.at(repeat, j) / emu::kGranule == from && (sizeof(D) != sizeof(S) || i != j)) {
        emu::fail(emu::machine().where(), ": expected operands that are the same or apart, got partial overlap");
      }
    }
  }
}

template <class F, class D, class... S>
void run(const Lanes& lanes, bool accumulates, F compute, const Operand<D>& dst, const Operand<S>&... src) {
  emu::Machine& m = emu::machine();
  dst.check("destination");
  (src.check("source"), ...);
  if (dst.block_stride == 0 && (lanes.mask > Operand<D>::kLanes || lanes.last > Operand<D>::kLanes)) {
    emu::fail(m.where(), ": expected a destination block stride > 0, got 0");
  }
  for (int64_t r = 0; r < lanes.repeats; ++r) {
    const int64_t n = lanes.of(r);
    const auto touch = [&](const auto& operand, bool write) {
      const int64_t per = std::remove_reference_t<decltype(operand)>::kLanes;
      for (int64_t i = 0; i < n; i += per) {
        bool any = false;
        for (int64_t j = i; j < std::min(i + per, n); ++j) any = any || lanes.active(j);
        if (any) operand.touch(r, i, std::min(per, n - i), write, accumulates);
      }
    };
    (touch(src, false), ...);
    (check_overlap(dst, src, r, n), ...);
    touch(dst, true);
    D out[kMostLanes];
    for (int64_t i = 0; i < n; ++i) {
      if (lanes.active(i)) out[i] = compute(src.get(r, i)...);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (lanes.active(i)) dst.set(r, i, out[i]);
    }
  }
  m.counters.repeats += lanes.repeats;
}

template <class T>
constexpr int64_t lanes_of() {
  return 256 / static_cast<int64_t>(sizeof(T));
}

template <class T, class F>
void binary(const char* call, const LocalTensor<T>& d, const LocalTensor<T>& a, const LocalTensor<T>& b, int32_t count,
            F f) {
  static_assert(std::is_same_v<T, float>, "vector arithmetic here is in float");
  emu::machine().issue(emu::kV, call);
  run(in_a_row(count, lanes_of<T>()), false, f, Operand<T>{d, 1, 8}, Operand<T>{a, 1, 8}, Operand<T>{b, 1, 8});
}

template <class T, class F>
void binary(const char* call, const LocalTensor<T>& d, const LocalTensor<T>& a, const LocalTensor<T>& b, uint64_t mask,
            uint8_t repeats, const BinaryRepeatParams& p, F f) {
  static_assert(std::is_same_v<T, float>, "vector arithmetic here is in float");
  emu::machine().issue(emu::kV, call);
  // Repeats may add up into one place only through destination == second source.
  const bool accumulates = d.offset == b.offset && p.dstRep == 0 && p.src1Rep == 0;
  run(first_lanes(mask, repeats, lanes_of<T>()), accumulates, f, Operand<T>{d, p.dstBlk, p.dstRep},
      Operand<T>{a, p.src0Blk, p.src0Rep}, Operand<T>{b, p.src1Blk, p.src1Rep});
}

template <class T, class F>
void unary(const char* call, const LocalTensor<T>& d, const LocalTensor<T>& s, int32_t count, F f) {
  static_assert(std::is_same_v<T, float>, "vector arithmetic here is in float");
  emu::machine().issue(emu::kV, call);
  run(in_a_row(count, lanes_of<T>()), false, f, Operand<T>{d, 1, 8}, Operand<T>{s, 1, 8});
}

template <class D, class S>
D convert(S x) {
  D out;
  emu::from_number(emu::to_number(x), &out);
  return out;
}

template <class D, class S>
void check_route(RoundMode mode) {
  constexpr bool kWiden = std::is_same_v<D, float> && (std::is_same_v<S, half> || std::is_same_v<S, bfloat16_t>);
  constexpr bool kNarrow = std::is_same_v<S, float> && (std::is_same_v<D, half> || std::is_same_v<D, bfloat16_t>);
  static_assert(kWiden || kNarrow, "Cast: no such route");
  if (mode != (kWiden ? RoundMode::CAST_NONE : RoundMode::CAST_RINT)) {
    emu::fail(emu::machine().where(), ": expected CAST_NONE to float and CAST_RINT from it");
  }
}

}  // namespace detail

#define RAZOR_BINARY(name, expression)                                                                           \
  template <class T>                                                                                             \
  void name(const LocalTensor<T>& d, const LocalTensor<T>& s0, const LocalTensor<T>& s1, const int32_t& count) { \
    detail::binary(#name, d, s0, s1, count, [](T a, T b) { return expression; });                                \
  }                                                                                                              \
  template <class T>                                                                                             \
  void name(const LocalTensor<T>& d, const LocalTensor<T>& s0, const LocalTensor<T>& s1, uint64_t mask,          \
            Field<uint8_t> repeats, const BinaryRepeatParams& params) {                                          \
    detail::binary(#name, d, s0, s1, mask, repeats, params, [](T a, T b) { return expression; });                \
  }
RAZOR_BINARY(Add, a + b)
RAZOR_BINARY(Sub, a - b)
RAZOR_BINARY(Mul, a* b)
RAZOR_BINARY(Div, a / b)
RAZOR_BINARY(Max, detail::larger(a, b))
#undef RAZOR_BINARY

#define RAZOR_UNARY(name, expression)                                                 \
  template <class T>                                                                  \
  void name(const LocalTensor<T>& d, const LocalTensor<T>& s, const int32_t& count) { \
    detail::unary(#name, d, s, count, [](T a) { return expression; });                \
  }
RAZOR_UNARY(Exp, std::exp(a))
RAZOR_UNARY(Ln, std::log(a))
#undef RAZOR_UNARY

#define RAZOR_SCALAR(name, expression)                                                            \
  template <class T>                                                                              \
  void name(const LocalTensor<T>& d, const LocalTensor<T>& s, const T& b, const int32_t& count) { \
    detail::unary(#name, d, s, count, [b](T a) { return expression; });                           \
  }
RAZOR_SCALAR(Adds, a + b)
RAZOR_SCALAR(Muls, a* b)
RAZOR_SCALAR(Maxs, detail::larger(a, b))
#undef RAZOR_SCALAR

// dst += scalar * src
template <class T>
void Axpy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, const int32_t& count) {
  detail::binary("Axpy", dst, src, dst, count, [scalar](T a, T b) { return scalar * a + b; });
}

template <class T>
void Duplicate(const LocalTensor<T>& dst, const T& scalar, const int32_t& count) {
  emu::machine().issue(emu::kV, "Duplicate");
  detail::run(
      detail::in_a_row(count, detail::lanes_of<T>()), false, [scalar] { return scalar; },
      detail::Operand<T>{dst, 1, 8});
}

template <class T>
void Duplicate(const LocalTensor<T>& dst, const T& scalar, uint64_t mask[], Field<uint8_t> repeats,
               Field<uint16_t> block_stride, Field<uint8_t> repeat_stride) {
  emu::machine().issue(emu::kV, "Duplicate");
  const int64_t most = detail::lanes_of<T>();
  if ((mask[0] | mask[1]) == 0 || (most == 64 && mask[1] != 0)) {
    emu::fail(emu::machine().where(), ": expected mask bits within ", most, " lanes");
  }
  int64_t leading = most;  // lanes up to the last bit: those behind it are not even looked at
  while ((mask[(leading - 1) / 64] >> ((leading - 1) % 64) & 1) == 0) --leading;
  detail::run(
      {.repeats = repeats, .mask = leading, .last = leading, .bits = mask}, false, [scalar] { return scalar; },
      detail::Operand<T>{dst, block_stride, repeat_stride});
}

template <class D, class S>
void Cast(const LocalTensor<D>& dst, const LocalTensor<S>& src, RoundMode mode, Field<uint32_t> count) {
  emu::machine().issue(emu::kV, "Cast");
  detail::check_route<D, S>(mode);
  detail::run(detail::in_a_row(count, 64), false, detail::convert<D, S>,
              detail::Operand<D>{dst, 1, static_cast<int64_t>(2 * sizeof(D))},
              detail::Operand<S>{src, 1, static_cast<int64_t>(2 * sizeof(S))});
}

template <class D, class S>
void Cast(const LocalTensor<D>& dst, const LocalTensor<S>& src, RoundMode mode, uint64_t mask, Field<uint8_t> repeats,
          const UnaryRepeatParams& p) {
  emu::machine().issue(emu::kV, "Cast");
  detail::check_route<D, S>(mode);
  detail::run(detail::first_lanes(mask, repeats, 64), false, detail::convert<D, S>,
              detail::Operand<D>{dst, p.dstBlk, p.dstRep}, detail::Operand<S>{src, p.srcBlk, p.srcRep});
}

// Each element fills one block of the destination, 8 elements a repeat.
template <class T>
void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src, Field<uint8_t> repeats, const BrcbRepeatParams& p) {
  static_assert(std::is_same_v<T, float>);
  emu::Machine& m = emu::machine();
  m.issue(emu::kV, "Brcb");
  const detail::Operand<T> to{dst, p.dstBlkStride, p.dstRepStride}, from{src, 1, 1};
  to.check("destination");
  from.check("source");
  for (int64_t r = 0; r < repeats; ++r) {
    from.touch(r, 0, 8, false, false);
    for (int64_t i = 0; i < 8; ++i) {
      to.touch(r, i * 8, 8, true, false);
      for (int64_t lane = 0; lane < 8; ++lane) to.set(r, i * 8 + lane, from.get(r, i));
    }
  }
  m.counters.repeats += repeats;
}

namespace detail {

// One value of each repeat's leading lanes, values next to each other.
template <class T, class F>
void whole_reduce(const char* call, const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t mask, int32_t repeats,
                  int32_t dst_stride, int32_t block_stride, int32_t repeat_stride, F combine) {
  static_assert(std::is_same_v<T, float>);
  emu::Machine& m = emu::machine();
  m.issue(emu::kV, call);
  (void)first_lanes(static_cast<uint64_t>(mask), repeats, lanes_of<T>());
  (void)Field<uint8_t>(repeats);
  const Operand<T> from{src, block_stride, repeat_stride};
  from.check("source");
  m.check_usable(dst.buffer, dst.generation);
  for (int64_t r = 0; r < repeats; ++r) {
    for (int64_t i = 0; i < mask; i += Operand<T>::kLanes) {
      from.touch(r, i, std::min<int64_t>(Operand<T>::kLanes, mask - i), false, false);
    }
    T lane[64];
    for (int64_t i = 0; i < mask; ++i) lane[i] = from.get(r, i);
    for (int64_t n = mask; n > 1; n = (n + 1) / 2) {  // neighbours in pairs, and so on
      for (int64_t i = 0; i < n / 2; ++i) lane[i] = combine(lane[2 * i], lane[2 * i + 1]);
      if (n % 2 != 0) lane[n / 2] = lane[n - 1];
    }
    const int64_t at = dst.offset + r * dst_stride * static_cast<int64_t>(sizeof(T));
    if (at + static_cast<int64_t>(sizeof(T)) > dst.offset + dst.bytes) {
      emu::fail(m.where(), ": expected results within the tensor, got one past its end");
    }
    m.write_ub(at, sizeof(T), 0, /*accumulates=*/true);  // several repeats fill one block
    std::memcpy(m.ub.data() + at, &lane[0], sizeof(T));
  }
  m.counters.repeats += repeats;
}

}  // namespace detail

template <class T>
void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t mask, int32_t repeats,
                    int32_t dst_stride, int32_t block_stride, int32_t repeat_stride) {
  detail::whole_reduce("WholeReduceSum", dst, src, mask, repeats, dst_stride, block_stride, repeat_stride,
                       [](T a, T b) { return a + b; });
}

template <class T>
void WholeReduceMax(const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t mask, int32_t repeats,
                    int32_t dst_stride, int32_t block_stride, int32_t repeat_stride, ReduceOrder order) {
  if (order != ReduceOrder::ORDER_ONLY_VALUE) emu::fail("WholeReduceMax: expected ORDER_ONLY_VALUE here");
  detail::whole_reduce("WholeReduceMax", dst, src, mask, repeats, dst_stride, block_stride, repeat_stride,
                       [](T a, T b) { return detail::larger(a, b); });
}

}  // namespace AscendC
