// SPDX-License-Identifier: Apache-2.0
#include "self_test.h"

#include "kernel_operator.h"

namespace razor::emulation {
namespace {

using namespace AscendC;

constexpr int32_t kCount = 256;  // elements of everything here

// What most kernels have: in, out, two queues, two scratch tensors.
struct Core {
  TPipe pipe;
  GlobalTensor<half> in, out;
  TQue<TPosition::VECIN, 1> loaded;
  TQue<TPosition::VECOUT, 1> stored;
  TBuf<TPosition::VECCALC> first_memory, second_memory;
  LocalTensor<float> first, second;

  explicit Core(uint8_t** arguments) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    in.SetGlobalBuffer(reinterpret_cast<half*>(arguments[0]), kCount);
    out.SetGlobalBuffer(reinterpret_cast<half*>(arguments[1]), kCount);
    pipe.InitBuffer(loaded, 2, kCount * sizeof(half));
    pipe.InitBuffer(stored, 1, kCount * sizeof(half));
    pipe.InitBuffer(first_memory, kCount * sizeof(float));
    pipe.InitBuffer(second_memory, kCount * sizeof(float));
    first = first_memory.Get<float>();
    second = second_memory.Get<float>();
    Duplicate(first, 1.0f, kCount);
    Duplicate(second, 2.0f, kCount);
    PipeBarrier<PIPE_V>();
  }
  LocalTensor<half> load() {
    LocalTensor<half> to = loaded.AllocTensor<half>();
    DataCopy(to, in, kCount);
    loaded.EnQue(to);
    return loaded.DeQue<half>();
  }
  // Leaves the first elements, or all, of `first` in `out`.
  void store(int32_t count = kCount, int32_t at = 0) {
    LocalTensor<half> to = stored.AllocTensor<half>();
    Cast(to, first, RoundMode::CAST_RINT, count);
    stored.EnQue(to);
    LocalTensor<half> ready = stored.DeQue<half>();
    DataCopyPad(out[at], ready, DataCopyExtParams(1, count * sizeof(half), 0, 0, 0));
    stored.FreeTensor(ready);
  }
};

template <HardEvent event>
void wait() {
  SetFlag<event>(0);
  WaitFlag<event>(0);
}

struct Misuse {
  std::string_view name;
  void (*run)(uint8_t** arguments);
};

#define RAZOR_MISUSE(name, ...)    \
  {name, [](uint8_t** arguments) { \
     Core c(arguments);            \
     __VA_ARGS__                   \
   }}

constexpr Misuse kMisuses[] = {
    RAZOR_MISUSE("none", LocalTensor<half> x = c.load(); Cast(c.first, x, RoundMode::CAST_NONE, kCount);
                 PipeBarrier<PIPE_V>(); c.loaded.FreeTensor(x); c.store();),
    RAZOR_MISUSE("poison", LocalTensor<half> x = c.loaded.AllocTensor<half>(); c.loaded.EnQue(x);
                 x = c.loaded.DeQue<half>(); Cast(c.first, x, RoundMode::CAST_NONE, kCount); PipeBarrier<PIPE_V>();
                 c.loaded.FreeTensor(x); c.store();),
    RAZOR_MISUSE("scalars", wait<HardEvent::V_S>(); c.first.SetValue(0, c.first.GetValue(1) + c.second.GetValue(0));
                 wait<HardEvent::S_V>(); c.store();),
    // memory
    RAZOR_MISUSE("capacity", TBuf<TPosition::VECCALC> more; c.pipe.InitBuffer(more, kUbBudget);),
    RAZOR_MISUSE("second pipe", TPipe second;),
    RAZOR_MISUSE("queue buffers", TQue<TPosition::VECIN, 1> more; c.pipe.InitBuffer(more, 7, 32);),
    RAZOR_MISUSE("alignment", Adds(c.first[4], c.first[4], 1.0f, 8);),
    RAZOR_MISUSE("bounds", Adds(c.first[8], c.first[8], 1.0f, kCount);),
    RAZOR_MISUSE("strided bounds",
                 Add(c.first, c.first, c.first, uint64_t{64}, 4, BinaryRepeatParams(1, 1, 1, 9, 9, 9));),
    RAZOR_MISUSE("reduction bounds", WholeReduceSum(c.second[kCount - 2], c.first, 64, 3, 1, 1, 8);),
    RAZOR_MISUSE("index", c.first.SetValue(kCount, 0.0f);),
    // copies
    RAZOR_MISUSE("ragged copy", DataCopy(c.loaded.AllocTensor<half>(), c.in, 15);),
    RAZOR_MISUSE("misaligned copy", DataCopy(c.loaded.AllocTensor<half>()[8], c.in, 16);),
    RAZOR_MISUSE("long copy", DataCopy(c.loaded.AllocTensor<half>(), c.in[16], kCount);),
    RAZOR_MISUSE("beyond memory", c.in.SetGlobalBuffer(c.in.start, 2 * kCount);
                 DataCopy(c.loaded.AllocTensor<half>(), c.in[kCount], 16);),
    RAZOR_MISUSE("no size", c.in.SetGlobalBuffer(c.in.start, 0);),
    RAZOR_MISUSE("route", DataCopy(c.out, c.first_memory.Get<half>(), 16);),
    RAZOR_MISUSE("read only", LocalTensor<half> x = c.stored.AllocTensor<half>(); Duplicate(x, half{}, 16);
                 c.stored.EnQue(x); x = c.stored.DeQue<half>(); DataCopy(c.in, x, 16);),
    RAZOR_MISUSE("block length", DataCopyPad(c.loaded.AllocTensor<half>(), c.in, DataCopyExtParams(1, 3, 0, 0, 0),
                                             DataCopyPadExtParams<half>(false, 0, 0, half{}));),
    // fields
    RAZOR_MISUSE("repeat", Add(c.first, c.first, c.first, uint64_t{64}, 256, BinaryRepeatParams(1, 1, 1, 0, 0, 0));),
    RAZOR_MISUSE("stride", Add(c.first, c.first, c.first, uint64_t{64}, 1, BinaryRepeatParams(1, 1, 1, 256, 8, 8));),
    RAZOR_MISUSE("gap", DataCopyPad(c.loaded.AllocTensor<half>(), c.in, DataCopyExtParams(1, 2, -2, 0, 0),
                                    DataCopyPadExtParams<half>(false, 0, 0, half{}));),
    RAZOR_MISUSE("mask", Add(c.first, c.first, c.first, uint64_t{65}, 1, BinaryRepeatParams(1, 1, 1, 8, 8, 8));),
    RAZOR_MISUSE("mask bits", uint64_t bits[2] = {0, 1}; Duplicate(c.first, 0.0f, bits, 1, 1, 8);),
    RAZOR_MISUSE("destination block",
                 Add(c.first, c.first, c.second, uint64_t{64}, 1, BinaryRepeatParams(0, 1, 1, 8, 8, 8));),
    RAZOR_MISUSE("rounding", Cast(c.first_memory.Get<half>(), c.second, RoundMode::CAST_NONE, 16);),
    // overlap
    RAZOR_MISUSE("partial overlap", Adds(c.first[8], c.first, 1.0f, 64);),
    RAZOR_MISUSE("later repeat",
                 Add(c.first, c.first, c.second, uint64_t{64}, 3, BinaryRepeatParams(1, 1, 1, 8, 0, 8));),
    RAZOR_MISUSE("widening in place", Cast(c.first, c.first_memory.Get<half>(), RoundMode::CAST_NONE, 64);),
    RAZOR_MISUSE("spread in place", Brcb(c.first, c.first, 2, BrcbRepeatParams(1, 8));),
    // queues
    RAZOR_MISUSE("no free buffer", for (int i = 0; i < 3; ++i) c.loaded.AllocTensor<half>();),
    RAZOR_MISUSE("foreign tensor", LocalTensor<half> x = c.loaded.AllocTensor<half>(); c.stored.EnQue(x);),
    RAZOR_MISUSE("depth", LocalTensor<half> x = c.loaded.AllocTensor<half>();
                 LocalTensor<half> y = c.loaded.AllocTensor<half>(); c.loaded.EnQue(x); c.loaded.EnQue(y);),
    RAZOR_MISUSE("empty queue", c.loaded.DeQue<half>();),
    RAZOR_MISUSE("free twice", LocalTensor<half> x = c.load(); c.loaded.FreeTensor(x); c.loaded.FreeTensor(x);),
    RAZOR_MISUSE("free unused", LocalTensor<half> x = c.loaded.AllocTensor<half>(); c.loaded.FreeTensor(x);),
    RAZOR_MISUSE("use after free", LocalTensor<half> x = c.load(); c.loaded.FreeTensor(x);
                 Cast(c.first, x, RoundMode::CAST_NONE, 16);),
    RAZOR_MISUSE("use while queued", LocalTensor<half> x = c.stored.AllocTensor<half>(); c.stored.EnQue(x);
                 Duplicate(x, half{}, 16);),
    RAZOR_MISUSE("leak", c.load();),
    // order
    RAZOR_MISUSE("barrier, write then read", Adds(c.first, c.second, 1.0f, 64); Adds(c.second, c.first, 1.0f, 64);),
    RAZOR_MISUSE("barrier, read then write", Adds(c.first, c.second, 1.0f, 64); Duplicate(c.second, 1.0f, 64);),
    RAZOR_MISUSE("barrier, write then write", Duplicate(c.first, 1.0f, 8); Duplicate(c.first, 1.0f, 8);),
    RAZOR_MISUSE("scalar reads a vector's", (void)c.first.GetValue(0);),
    RAZOR_MISUSE("scalar writes a vector's", c.first.SetValue(0, 1.0f);),
    RAZOR_MISUSE("scalar writes what a vector reads", wait<HardEvent::V_S>(); Adds(c.second, c.first, 1.0f, 8);
                 c.first.SetValue(0, 1.0f);),
    RAZOR_MISUSE("vector reads a scalar's", wait<HardEvent::V_S>(); c.first.SetValue(0, 1.0f);
                 Adds(c.second, c.first, 1.0f, 8);),
    RAZOR_MISUSE("vector writes a scalar's", wait<HardEvent::V_S>(); c.first.SetValue(0, 1.0f);
                 Duplicate(c.first, 1.0f, 8);),
    RAZOR_MISUSE("vector writes what a scalar reads", wait<HardEvent::V_S>(); (void)c.first.GetValue(0);
                 Duplicate(c.first, 1.0f, 8);),
    RAZOR_MISUSE("scalar reads a copy's", LocalTensor<half> x = c.loaded.AllocTensor<half>(); DataCopy(x, c.in, 16);
                 (void)x.GetValue(0);),
    RAZOR_MISUSE("scalar reads a queue's", (void)c.load().GetValue(0);),  // which waits for the vector pipe alone
    RAZOR_MISUSE("copy in writes a scalar's", LocalTensor<half> x = c.loaded.AllocTensor<half>(); x.SetValue(0, half{});
                 DataCopy(x, c.in, 16);),
    RAZOR_MISUSE("copy in writes what a scalar reads", LocalTensor<half> x = c.loaded.AllocTensor<half>();
                 (void)x.GetValue(0); DataCopy(x, c.in, 16);),
    RAZOR_MISUSE("copy out reads a scalar's", LocalTensor<half> x = c.stored.AllocTensor<half>();
                 for (int i = 0; i < 16; ++i) x.SetValue(i, half{}); c.stored.EnQue(x); x = c.stored.DeQue<half>();
                 DataCopy(c.out, x, 16);),
    RAZOR_MISUSE("scalar writes what a copy reads", LocalTensor<half> x = c.stored.AllocTensor<half>();
                 Duplicate(x, half{}, 16); wait<HardEvent::V_S>(); c.stored.EnQue(x); x = c.stored.DeQue<half>();
                 DataCopy(c.out, x, 16); x.SetValue(0, half{});),
    RAZOR_MISUSE("copy out writes what a scalar reads", (void)c.out.GetValue(0); c.store();),
    RAZOR_MISUSE("scalar reads an output", c.store(); wait<HardEvent::MTE3_S>(); (void)c.out.GetValue(0);),
    RAZOR_MISUSE("vector reads a copy's", LocalTensor<half> x = c.loaded.AllocTensor<half>(); DataCopy(x, c.in, 16);
                 Cast(c.first, x, RoundMode::CAST_NONE, 16);),
    RAZOR_MISUSE("copy reads a vector's", LocalTensor<half> x = c.stored.AllocTensor<half>(); Duplicate(x, half{}, 16);
                 DataCopy(c.out, x, 16);),
    RAZOR_MISUSE("copy out, then in", c.store(); DataCopy(c.loaded.AllocTensor<half>(), c.out, 16);),
    RAZOR_MISUSE("copy out twice", LocalTensor<half> x = c.stored.AllocTensor<half>(); Duplicate(x, half{}, 16);
                 c.stored.EnQue(x); x = c.stored.DeQue<half>(); DataCopy(c.out, x, 16); DataCopy(c.out, x, 16);),
    // events
    RAZOR_MISUSE("set twice", SetFlag<HardEvent::V_S>(0); SetFlag<HardEvent::V_S>(0);),
    RAZOR_MISUSE("wait alone", WaitFlag<HardEvent::V_S>(0);),
    RAZOR_MISUSE("set alone", SetFlag<HardEvent::V_S>(0);),
    RAZOR_MISUSE("event id", SetFlag<HardEvent::V_S>(8);),
    // blocks
    RAZOR_MISUSE("blocks write one byte", c.store(16);),
    RAZOR_MISUSE(
        "block reads another's",
        if (GetBlockIdx() == 0) { c.store(16); } else { DataCopy(c.loaded.AllocTensor<half>(), c.out, 16); }),
    RAZOR_MISUSE("neighbours", c.store(1, static_cast<int32_t>(GetBlockIdx()));),  // allowed: bytes, not blocks
    {"kernel type", [](uint8_t**) {}},
};

#undef RAZOR_MISUSE

}  // namespace

void (*self_test(std::string_view name))(uint8_t** arguments) {
  for (const Misuse& misuse : kMisuses) {
    if (misuse.name == name) return misuse.run;
  }
  return nullptr;
}

}  // namespace razor::emulation
