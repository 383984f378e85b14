// SPDX-License-Identifier: Apache-2.0
// Emulation of a subset of Ascend C for tests; not CANN. Copies between global memory and the core.
#pragma once

#include "tensors.h"

namespace AscendC {

struct DataCopyExtParams {
  Field<uint16_t> blockCount;
  Field<uint32_t> blockLen;   // bytes
  Field<uint32_t> srcStride;  // from the end of a block to the next: bytes in global memory, 32 bytes on chip
  Field<uint32_t> dstStride;
  Field<uint32_t> rsv;
  DataCopyExtParams(Field<uint16_t> count, Field<uint32_t> bytes, Field<uint32_t> source, Field<uint32_t> target,
                    Field<uint32_t> reserved)
      : blockCount(count), blockLen(bytes), srcStride(source), dstStride(target), rsv(reserved) {}
};

template <class T>
struct DataCopyPadExtParams {
  bool isPad;
  Field<uint8_t> leftPadding, rightPadding;  // elements
  T paddingValue;
  DataCopyPadExtParams(bool pads, Field<uint8_t> left, Field<uint8_t> right, T value)
      : isPad(pads), leftPadding(left), rightPadding(right), paddingValue(value) {}
};

namespace detail {

template <class T>
void check_local(const LocalTensor<T>& t, int64_t bytes) {
  emu::Machine& m = emu::machine();
  if (t.buffer < 0) emu::fail(m.where(), ": expected a tensor with memory, got an empty one");
  m.check_usable(t.buffer, t.generation);
  if (t.position == TPosition::VECCALC) emu::fail(m.where(), ": expected a queue's tensor, got a TBuf's");
  if (t.offset % emu::kGranule != 0) emu::fail(m.where(), ": expected a 32-byte aligned tensor, got ", t.offset);
  if (bytes > t.bytes) emu::fail(m.where(), ": expected at most ", t.bytes, " bytes of the tensor, got ", bytes);
}

template <class T>
void check_global(const GlobalTensor<T>& t, int64_t bytes) {
  const auto held = static_cast<int64_t>(t.size * sizeof(T));
  if (bytes > held)
    emu::fail(emu::machine().where(), ": expected at most ", held, " bytes of global memory, got ", bytes);
}

inline void check_blocks(const DataCopyExtParams& p, size_t element) {
  if (p.blockCount > 4095)
    emu::fail(emu::machine().where(), ": expected at most 4095 blocks, got ", p.blockCount.value);
  if (p.blockLen > 2097151 || p.blockLen % element != 0) {
    emu::fail(emu::machine().where(), ": expected blocks of whole elements, got ", p.blockLen.value, " bytes");
  }
}

template <class T>
void check_whole(uint32_t count) {
  if (count * sizeof(T) % emu::kGranule != 0) {
    emu::fail(emu::machine().where(), ": expected a multiple of 32 bytes, got ", count * sizeof(T));
  }
}

inline int64_t whole_blocks(int64_t bytes) { return (bytes + emu::kGranule - 1) / emu::kGranule * emu::kGranule; }

}  // namespace detail

template <class T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, Field<uint32_t> count) {
  emu::Machine& m = emu::machine();
  m.issue(emu::kMTE2, "DataCopy");
  if (count == 0) return;
  const auto bytes = static_cast<int64_t>(count * sizeof(T));
  detail::check_whole<T>(count);
  detail::check_local(dst, bytes);
  detail::check_global(src, bytes);
  const uint8_t* from = m.read_global(src.start, bytes);
  m.write_ub(dst.offset, bytes);
  std::memcpy(m.ub.data() + dst.offset, from, bytes);
  m.counters.bytes_in += bytes;
}

template <class T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, Field<uint32_t> count) {
  emu::Machine& m = emu::machine();
  m.issue(emu::kMTE3, "DataCopy");
  if (count == 0) return;
  const auto bytes = static_cast<int64_t>(count * sizeof(T));
  detail::check_whole<T>(count);
  detail::check_local(src, bytes);
  detail::check_global(dst, bytes);
  m.read_ub(src.offset, bytes);
  std::memcpy(m.write_global(dst.start, bytes), m.ub.data() + src.offset, bytes);
  m.counters.bytes_out += bytes;
}

template <class T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyExtParams& p,
                 const DataCopyPadExtParams<T>& pad) {
  emu::Machine& m = emu::machine();
  m.issue(emu::kMTE2, "DataCopyPad");
  if (p.blockCount == 0 || p.blockLen == 0) return;
  detail::check_blocks(p, sizeof(T));
  const int64_t left = pad.leftPadding * sizeof(T), right = pad.rightPadding * sizeof(T), bytes = p.blockLen;
  if (left > emu::kGranule || right > emu::kGranule) emu::fail(m.where(), ": expected at most 32 bytes of padding");
  const int64_t held = detail::whole_blocks(left + bytes + right), pitch = held + p.dstStride * emu::kGranule;
  const int64_t blocks = p.blockCount, step = bytes + p.srcStride;
  detail::check_local(dst, (blocks - 1) * pitch + held);
  detail::check_global(src, (blocks - 1) * step + bytes);
  for (int64_t i = 0; i < blocks; ++i) {
    const auto* from = m.read_global(reinterpret_cast<const uint8_t*>(src.start) + i * step, bytes);
    m.write_ub(dst.offset + i * pitch, held);
    uint8_t* to = m.ub.data() + dst.offset + i * pitch;
    std::memset(to, 0xff, held);  // what no padding covers stays unknown
    std::memcpy(to + left, from, bytes);
    for (int64_t e = 0; pad.isPad && e < pad.leftPadding; ++e)
      std::memcpy(to + e * sizeof(T), &pad.paddingValue, sizeof(T));
    for (int64_t e = 0; pad.isPad && e < pad.rightPadding; ++e) {
      std::memcpy(to + left + bytes + e * sizeof(T), &pad.paddingValue, sizeof(T));
    }
  }
  m.counters.bytes_in += blocks * bytes;
}

template <class T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyExtParams& p) {
  emu::Machine& m = emu::machine();
  m.issue(emu::kMTE3, "DataCopyPad");
  if (p.blockCount == 0 || p.blockLen == 0) return;
  detail::check_blocks(p, sizeof(T));
  const int64_t bytes = p.blockLen, held = detail::whole_blocks(bytes), pitch = held + p.srcStride * emu::kGranule;
  const int64_t blocks = p.blockCount, step = bytes + p.dstStride;
  detail::check_local(src, (blocks - 1) * pitch + bytes);
  detail::check_global(dst, (blocks - 1) * step + bytes);
  for (int64_t i = 0; i < blocks; ++i) {
    m.read_ub(src.offset + i * pitch, bytes);
    std::memcpy(m.write_global(reinterpret_cast<uint8_t*>(dst.start) + i * step, bytes),
                m.ub.data() + src.offset + i * pitch, bytes);
  }
  m.counters.bytes_out += blocks * bytes;
}

}  // namespace AscendC
