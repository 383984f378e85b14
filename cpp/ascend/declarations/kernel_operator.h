// SPDX-License-Identifier: Apache-2.0
// Declarations of a subset of Ascend C for tests; not CANN. Written from the public documentation of the calls, for one
// pass of clang over the kernels, which generates no code (tests/test_ascend_guards.py): pointers to global memory have
// an address space of their own, and what runs on the device must be marked. clang tells functions of the device from
// all others in its CUDA mode, so the marks are that mode's. The calls' meaning is the emulation's business.
#pragma once

#include "stdint.h"

#define __gm__ __attribute__((address_space(1)))
#define __aicore__ __attribute__((device))
#define __global__  // an entry is a device function that nothing of ours calls
#define GM_ADDR __gm__ uint8_t*

// No arithmetic, as on the device.
struct half {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

enum pipe_t { PIPE_S, PIPE_V, PIPE_MTE2, PIPE_MTE3, PIPE_ALL };
enum KernelType { KERNEL_TYPE_AIV_ONLY };
#define KERNEL_TASK_TYPE_DEFAULT(type) static_assert((type) == KERNEL_TYPE_AIV_ONLY, "vector cores alone")

namespace AscendC {

enum class TPosition : uint8_t { GM, VECIN, VECOUT, VECCALC };
enum class HardEvent : uint8_t {
  S_V,
  S_MTE2,
  S_MTE3,
  V_S,
  V_MTE2,
  V_MTE3,
  MTE2_S,
  MTE2_V,
  MTE2_MTE3,
  MTE3_S,
  MTE3_V,
  MTE3_MTE2
};
enum class RoundMode { CAST_NONE, CAST_RINT };
enum class ReduceOrder { ORDER_VALUE_INDEX, ORDER_ONLY_VALUE };
using TEventID = int8_t;

__aicore__ int64_t GetBlockIdx();
__aicore__ int64_t GetBlockNum();

template <class T>
class LocalTensor {
 public:
  __aicore__ LocalTensor() {}
  __aicore__ LocalTensor operator[](uint32_t element) const;
  __aicore__ T GetValue(uint32_t element) const;
  template <class U>
  __aicore__ void SetValue(uint32_t element, U value) const;
};

template <class T>
class GlobalTensor {
 public:
  __aicore__ GlobalTensor() {}
  __aicore__ void SetGlobalBuffer(__gm__ T* data, uint64_t elements);
  __aicore__ GlobalTensor operator[](uint64_t element) const;
  __aicore__ T GetValue(uint64_t element) const;
};

template <TPosition from, TPosition to, int32_t depth>
class TQueBind {
 public:
  __aicore__ TQueBind() {}
  template <class T>
  __aicore__ LocalTensor<T> AllocTensor();
  template <class T>
  __aicore__ bool EnQue(const LocalTensor<T>& tensor);
  template <class T>
  __aicore__ LocalTensor<T> DeQue();
  template <class T>
  __aicore__ void FreeTensor(LocalTensor<T>& tensor);
};

template <TPosition position, int32_t depth>
class TQue : public TQueBind<position == TPosition::VECIN ? TPosition::GM : position,
                             position == TPosition::VECIN ? position : TPosition::GM, depth> {
 public:
  __aicore__ TQue() {}
};

template <TPosition position>
class TBuf {
 public:
  __aicore__ TBuf() {}
  template <class T>
  __aicore__ LocalTensor<T> Get();
};

class TPipe {
 public:
  __aicore__ TPipe();
  __aicore__ ~TPipe();
  template <class Queue>
  __aicore__ bool InitBuffer(Queue& queue, uint8_t count, uint32_t bytes);
  template <TPosition position>
  __aicore__ bool InitBuffer(TBuf<position>& buffer, uint32_t bytes);
  template <HardEvent event>
  __aicore__ TEventID FetchEventID();
};

template <pipe_t pipe>
__aicore__ void PipeBarrier();
template <HardEvent event>
__aicore__ void SetFlag(int32_t id);
template <HardEvent event>
__aicore__ void WaitFlag(int32_t id);

// --- copies

struct DataCopyExtParams {
  __aicore__ DataCopyExtParams(uint16_t count, uint32_t bytes, uint32_t source, uint32_t target, uint32_t reserved);
};
template <class T>
struct DataCopyPadExtParams {
  __aicore__ DataCopyPadExtParams(bool pads, uint8_t left, uint8_t right, T value);
};
template <class T>
__aicore__ void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, uint32_t count);
template <class T>
__aicore__ void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count);
template <class T>
__aicore__ void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyExtParams& params,
                            const DataCopyPadExtParams<T>& pad);
template <class T>
__aicore__ void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyExtParams& params);

// --- the vector unit

struct UnaryRepeatParams {
  __aicore__ UnaryRepeatParams(uint16_t dst_block, uint16_t src_block, uint8_t dst_repeat, uint8_t src_repeat);
};
struct BinaryRepeatParams {
  __aicore__ BinaryRepeatParams(uint8_t dst_block, uint8_t src0_block, uint8_t src1_block, uint8_t dst_repeat,
                                uint8_t src0_repeat, uint8_t src1_repeat);
};
struct BrcbRepeatParams {
  __aicore__ BrcbRepeatParams(uint16_t block, uint16_t repeat);
};

#define RAZOR_BINARY(name)                                                                                \
  template <class T>                                                                                      \
  __aicore__ void name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, \
                       const int32_t& count);                                                             \
  template <class T>                                                                                      \
  __aicore__ void name(const LocalTensor<T>& dst, const LocalTensor<T>& src0, const LocalTensor<T>& src1, \
                       uint64_t mask, uint8_t repeats, const BinaryRepeatParams& params)
RAZOR_BINARY(Add);
RAZOR_BINARY(Sub);
RAZOR_BINARY(Mul);
RAZOR_BINARY(Div);
RAZOR_BINARY(Max);
#undef RAZOR_BINARY

#define RAZOR_UNARY(name) \
  template <class T>      \
  __aicore__ void name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int32_t& count)
RAZOR_UNARY(Exp);
RAZOR_UNARY(Ln);
#undef RAZOR_UNARY

#define RAZOR_SCALAR(name) \
  template <class T>       \
  __aicore__ void name(const LocalTensor<T>& dst, const LocalTensor<T>& src, const T& scalar, const int32_t& count)
RAZOR_SCALAR(Adds);
RAZOR_SCALAR(Muls);
RAZOR_SCALAR(Maxs);
RAZOR_SCALAR(Axpy);
#undef RAZOR_SCALAR

template <class T>
__aicore__ void Duplicate(const LocalTensor<T>& dst, const T& scalar, const int32_t& count);
template <class T>
__aicore__ void Duplicate(const LocalTensor<T>& dst, const T& scalar, uint64_t mask[], uint8_t repeats,
                          uint16_t block_stride, uint8_t repeat_stride);
template <class D, class S>
__aicore__ void Cast(const LocalTensor<D>& dst, const LocalTensor<S>& src, const RoundMode& mode, uint32_t count);
template <class D, class S>
__aicore__ void Cast(const LocalTensor<D>& dst, const LocalTensor<S>& src, const RoundMode& mode, uint64_t mask,
                     uint8_t repeats, const UnaryRepeatParams& params);
template <class T>
__aicore__ void Brcb(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint8_t repeats,
                     const BrcbRepeatParams& params);
template <class T>
__aicore__ void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t mask, int32_t repeats,
                               int32_t dst_stride, int32_t block_stride, int32_t repeat_stride);
template <class T>
__aicore__ void WholeReduceMax(const LocalTensor<T>& dst, const LocalTensor<T>& src, int32_t mask, int32_t repeats,
                               int32_t dst_stride, int32_t block_stride, int32_t repeat_stride, ReduceOrder order);

}  // namespace AscendC
