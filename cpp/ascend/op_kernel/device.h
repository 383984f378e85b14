// SPDX-License-Identifier: Apache-2.0
// What every kernel needs. Device code takes from Ascend C only the names that cpp/ascend/README.md lists.
#pragma once

#include "kernel_operator.h"

#define RAZOR_FN __aicore__ inline
#include "ascend/op_host/work_list.h"

namespace razor::ascend {

using AscendC::GlobalTensor;
using AscendC::LocalTensor;
using AscendC::PipeBarrier;
using AscendC::TBuf;
using AscendC::TPipe;
using AscendC::TPosition;
using AscendC::TQue;

constexpr int32_t kBlockFloats = 8;  // of the 32 bytes that operands are aligned to

// A tiling is 8-byte integers; in some two floats come last, of which read_scale gives the first.
template <class Tiling>
__aicore__ inline void read_tiling(GM_ADDR address, Tiling& tiling) {
  constexpr uint64_t kWords = sizeof(Tiling) / sizeof(int64_t);
  GlobalTensor<int64_t> words;
  words.SetGlobalBuffer(reinterpret_cast<__gm__ int64_t*>(address), kWords);
  int64_t* to = reinterpret_cast<int64_t*>(&tiling);
  for (uint64_t i = 0; i < kWords; ++i) to[i] = words.GetValue(i);
}

template <class Tiling>
__aicore__ inline float read_scale(GM_ADDR address) {
  constexpr uint64_t kFloats = sizeof(Tiling) / sizeof(float);
  GlobalTensor<float> floats;
  floats.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(address), kFloats);
  return floats.GetValue(kFloats - 2);
}

// What the scalar pipe wrote is there for the vector pipe, and the other way round.
__aicore__ inline void vector_waits_for_scalar(TPipe* pipe) {
  const auto id = pipe->FetchEventID<AscendC::HardEvent::S_V>();
  AscendC::SetFlag<AscendC::HardEvent::S_V>(id);
  AscendC::WaitFlag<AscendC::HardEvent::S_V>(id);
}

__aicore__ inline void scalar_waits_for_vector(TPipe* pipe) {
  const auto id = pipe->FetchEventID<AscendC::HardEvent::V_S>();
  AscendC::SetFlag<AscendC::HardEvent::V_S>(id);
  AscendC::WaitFlag<AscendC::HardEvent::V_S>(id);
}

}  // namespace razor::ascend
