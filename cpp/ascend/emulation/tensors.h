// SPDX-License-Identifier: Apache-2.0
// Emulation of a subset of Ascend C for tests; not CANN. Tensors, queues, buffers and synchronisation.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "machine.h"
#include "numbers.h"

#define __aicore__
#define __global__
#define __gm__
#define GM_ADDR __gm__ uint8_t*  // a macro, as CANN has it: it binds to one name of a declaration

namespace AscendC {

namespace emu = razor::emulation;
using emu::Field;

enum class TPosition { GM, VECIN, VECOUT, VECCALC };
enum class HardEvent { S_V, S_MTE2, S_MTE3, V_S, V_MTE2, V_MTE3, MTE2_S, MTE2_V, MTE2_MTE3, MTE3_S, MTE3_V, MTE3_MTE2 };
using TEventID = int8_t;

constexpr emu::Pipe pipe_from(HardEvent event) {
  constexpr emu::Pipe kFrom[] = {emu::kS,    emu::kS,    emu::kS,    emu::kV,    emu::kV,    emu::kV,
                                 emu::kMTE2, emu::kMTE2, emu::kMTE2, emu::kMTE3, emu::kMTE3, emu::kMTE3};
  return kFrom[static_cast<int>(event)];
}
constexpr emu::Pipe pipe_to(HardEvent event) {
  constexpr emu::Pipe kTo[] = {emu::kV, emu::kMTE2, emu::kMTE3, emu::kS, emu::kMTE2, emu::kMTE3,
                               emu::kS, emu::kV,    emu::kMTE3, emu::kS, emu::kV,    emu::kMTE2};
  return kTo[static_cast<int>(event)];
}

inline int64_t GetBlockIdx() { return emu::machine().block_index; }
inline int64_t GetBlockNum() { return emu::machine().block_count; }

// --- tensors

template <class T>
class LocalTensor {
 public:
  LocalTensor() = default;
  LocalTensor(int64_t buffer, int64_t generation, int64_t offset, int64_t bytes, TPosition position)
      : buffer(buffer), generation(generation), offset(offset), bytes(bytes), position(position) {}

  LocalTensor operator[](uint32_t element) const {
    const int64_t shift = static_cast<int64_t>(element) * static_cast<int64_t>(sizeof(T));
    if (shift > bytes) emu::fail("LocalTensor[]: expected at most ", bytes / sizeof(T), " elements, got ", element);
    return {buffer, generation, offset + shift, bytes - shift, position};
  }
  [[nodiscard]] uint32_t GetSize() const { return static_cast<uint32_t>(bytes / sizeof(T)); }
  template <class U>
  [[nodiscard]] LocalTensor<U> ReinterpretCast() const {
    return {buffer, generation, offset, bytes, position};
  }
  [[nodiscard]] T GetValue(uint32_t element) const {
    emu::machine().issue(emu::kS, "GetValue");
    const int64_t at = check(element);
    emu::machine().read_ub(at, sizeof(T));
    T value;
    std::memcpy(&value, emu::machine().ub.data() + at, sizeof(T));
    return value;
  }
  void SetValue(uint32_t element, T value) const {
    emu::machine().issue(emu::kS, "SetValue");
    const int64_t at = check(element);
    emu::machine().write_ub(at, sizeof(T));
    std::memcpy(emu::machine().ub.data() + at, &value, sizeof(T));
  }

  int64_t buffer = -1, generation = 0, offset = 0, bytes = 0;
  TPosition position = TPosition::VECCALC;

 private:
  [[nodiscard]] int64_t check(uint32_t element) const {
    if (buffer < 0) emu::fail(emu::machine().where(), ": expected a tensor with memory, got an empty one");
    emu::machine().check_usable(buffer, generation);
    if ((element + 1) * sizeof(T) > static_cast<size_t>(bytes)) {
      emu::fail(emu::machine().where(), ": expected an index below ", GetSize(), ", got ", element);
    }
    return offset + element * static_cast<int64_t>(sizeof(T));
  }
};

template <class T>
class GlobalTensor {
 public:
  void SetGlobalBuffer(__gm__ T* data, uint64_t elements) {
    if (elements == 0) emu::fail("SetGlobalBuffer: expected a size");
    start = data;
    size = elements;
  }
  GlobalTensor operator[](uint64_t element) const {
    if (element > size) emu::fail("GlobalTensor[]: expected at most ", size, " elements, got ", element);
    GlobalTensor part;
    part.start = start + element;
    part.size = size - element;
    return part;
  }
  [[nodiscard]] uint64_t GetSize() const { return size; }
  [[nodiscard]] T GetValue(uint64_t element) const {
    emu::machine().issue(emu::kS, "GlobalTensor::GetValue");
    if (element >= size) emu::fail(emu::machine().where(), ": expected an index below ", size, ", got ", element);
    T value;
    std::memcpy(&value, emu::machine().read_global_scalar(start + element, sizeof(T)), sizeof(T));
    return value;
  }

  T* start = nullptr;
  uint64_t size = 0;
};

// --- queues and buffers

template <TPosition from, TPosition to, int32_t depth>
class TQueBind {
  static_assert(depth == 1, "queues here have depth 1");
  static constexpr bool kIn = from == TPosition::GM || from == TPosition::VECIN;
  static constexpr emu::Pipe kProducer = kIn ? emu::kMTE2 : emu::kV;
  static constexpr emu::Pipe kConsumer = to == TPosition::VECIN ? emu::kV : emu::kMTE3;

 public:
  template <class T>
  LocalTensor<T> AllocTensor() {
    for (int64_t b : buffers) {
      emu::Buffer& buffer = emu::machine().buffers[b];
      if (buffer.use != emu::Use::kFree) continue;
      if (buffer.used) emu::machine().join(kProducer, buffer.released);
      buffer.use = emu::Use::kAllocated;
      buffer.used = true;
      ++buffer.generation;
      emu::machine().poison(buffer);
      return {b, buffer.generation, buffer.offset, buffer.bytes, kIn ? TPosition::VECIN : TPosition::VECOUT};
    }
    emu::fail("AllocTensor: expected a free buffer of ", buffers.size(), ", got none");
  }
  template <class T>
  bool EnQue(const LocalTensor<T>& tensor) {
    emu::Buffer& buffer = mine(tensor, "EnQue");
    if (buffer.use != emu::Use::kAllocated) refuse("EnQue", "an allocated", buffer);
    for (int64_t b : buffers) {
      if (emu::machine().buffers[b].use == emu::Use::kQueued)
        emu::fail("EnQue: expected at most ", depth, " in the queue");
    }
    buffer.use = emu::Use::kQueued;
    buffer.filled = emu::machine().snapshot(kProducer);
    return true;
  }
  template <class T>
  LocalTensor<T> DeQue() {
    for (int64_t b : buffers) {
      emu::Buffer& buffer = emu::machine().buffers[b];
      if (buffer.use != emu::Use::kQueued) continue;
      buffer.use = emu::Use::kDequeued;
      emu::machine().join(kConsumer, buffer.filled);
      return {b, buffer.generation, buffer.offset, buffer.bytes,
              to == TPosition::VECIN ? TPosition::VECIN : TPosition::VECOUT};
    }
    emu::fail("DeQue: expected a tensor in the queue, got none");
  }
  template <class T>
  void FreeTensor(LocalTensor<T>& tensor) {
    emu::Buffer& buffer = mine(tensor, "FreeTensor");
    if (buffer.use != emu::Use::kDequeued) refuse("FreeTensor", "a dequeued", buffer);
    buffer.use = emu::Use::kFree;
    buffer.released = emu::machine().snapshot(kConsumer);
    emu::machine().poison(buffer);
  }

  std::vector<int64_t> buffers;  // indices into the machine's

 private:
  template <class T>
  emu::Buffer& mine(const LocalTensor<T>& tensor, const char* call) {
    if (std::find(buffers.begin(), buffers.end(), tensor.buffer) == buffers.end()) {
      emu::fail(call, ": expected a tensor of this queue, got another's");
    }
    emu::Buffer& buffer = emu::machine().buffers[tensor.buffer];
    if (buffer.generation != tensor.generation) emu::fail(call, ": expected a tensor in use, got a freed one");
    return buffer;
  }
  [[noreturn]] void refuse(const char* call, const char* expected, const emu::Buffer& buffer) const {
    emu::fail(call, ": expected ", expected, " tensor, got one ", emu::kUseNames[static_cast<int>(buffer.use)]);
  }
};

template <TPosition position, int32_t depth>
class TQue : public TQueBind<position == TPosition::VECIN ? TPosition::GM : TPosition::VECOUT,
                             position == TPosition::VECIN ? TPosition::VECIN : TPosition::GM, depth> {};

template <TPosition position>
class TBuf {
  static_assert(position == TPosition::VECCALC);

 public:
  template <class T>
  LocalTensor<T> Get() {
    if (buffer < 0) emu::fail("TBuf: expected InitBuffer first");
    const emu::Buffer& b = emu::machine().buffers[buffer];
    return {buffer, 0, b.offset, b.bytes, position};
  }
  int64_t buffer = -1;
};

class TPipe {
 public:
  TPipe() {
    if (emu::machine().pipe_alive) emu::fail("TPipe: expected one at a time");
    emu::machine().pipe_alive = true;
  }
  ~TPipe() { emu::machine().pipe_alive = false; }
  TPipe(const TPipe&) = delete;
  TPipe& operator=(const TPipe&) = delete;

  template <TPosition from, TPosition to, int32_t depth>
  bool InitBuffer(TQueBind<from, to, depth>& queue, Field<uint8_t> count, Field<uint32_t> bytes) {
    if (!queue.buffers.empty()) emu::fail("InitBuffer: expected a queue without buffers");
    for (const int position : {static_cast<int>(from), static_cast<int>(to)}) {
      const bool on_chip = position != static_cast<int>(TPosition::GM);
      if (on_chip && (emu::machine().queue_buffers[position] += count) > emu::kEventIds) {
        emu::fail("InitBuffer: expected at most ", emu::kEventIds, " queue buffers of a position");
      }
    }
    const int64_t offset = emu::machine().allocate(bytes, count), each = (bytes + 31) / 32 * 32;
    for (int64_t i = 0; i < count; ++i) {
      queue.buffers.push_back(
          emu::machine().register_buffer({.offset = offset + i * each, .bytes = each, .queue = true}));
    }
    return true;
  }
  template <TPosition position>
  bool InitBuffer(TBuf<position>& buffer, Field<uint32_t> bytes) {
    if (buffer.buffer >= 0) emu::fail("InitBuffer: expected a buffer without memory");
    const int64_t offset = emu::machine().allocate(bytes, 1);
    buffer.buffer = emu::machine().register_buffer({.offset = offset, .bytes = (bytes + 31) / 32 * 32});
    return true;
  }
  template <HardEvent event>
  TEventID FetchEventID() {
    return 0;  // each kind has ids of its own; two of one kind at once would be a SetFlag error
  }
};

// --- synchronisation

constexpr emu::Pipe PIPE_V = emu::kV, PIPE_MTE2 = emu::kMTE2, PIPE_MTE3 = emu::kMTE3, PIPE_ALL = emu::kPipes;

template <emu::Pipe pipe>
void PipeBarrier() {
  static_assert(pipe != emu::kS, "the scalar pipe has no barrier");
  if constexpr (pipe == PIPE_ALL) {
    emu::machine().barrier_all();
  } else {
    emu::machine().barrier(pipe);
  }
}

template <HardEvent event>
void SetFlag(int32_t id) {
  emu::machine().set_flag(pipe_from(event), pipe_to(event), id);
}

template <HardEvent event>
void WaitFlag(int32_t id) {
  emu::machine().wait_flag(pipe_from(event), pipe_to(event), id);
}

}  // namespace AscendC

enum KernelType { KERNEL_TYPE_AIV_ONLY };
#define KERNEL_TASK_TYPE_DEFAULT(type) razor::emulation::machine().vector_only = (type) == KERNEL_TYPE_AIV_ONLY

using AscendC::PIPE_ALL;
using AscendC::PIPE_MTE2;
using AscendC::PIPE_MTE3;
using AscendC::PIPE_V;
