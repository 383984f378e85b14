// SPDX-License-Identifier: Apache-2.0
// Merges the softmax states of parts that attention.cpp cut, in order, and stores their outputs. A second launch over
// the same shares: the worker in whose share a part begins merges it. Emulated only: it never ran on an NPU.
#include "ascend/op_kernel/cache_rows.h"
#include "ascend/op_kernel/query_rows.h"

namespace razor::ascend {

template <class T>
class Combine {
 public:
  __aicore__ inline Combine() {}

  __aicore__ inline void init(TPipe* pipe, const CacheAddresses& cache, GM_ADDR states, GM_ADDR out, GM_ADDR tiling) {
    read_tiling(tiling, tiling_);
    head_dim_ = static_cast<int32_t>(tiling_.cache.head_dim);
    rows8_ = static_cast<int32_t>(round_up(tiling_.block_rows, 8));
    state_floats_ = state_floats(tiling_.block_rows, head_dim_);
    rows_.init(tiling_.cache, cache);
    states_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(states), 2 * tiling_.cache.workers * state_floats_);
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(out),
                         tiling_.cache.batch * tiling_.num_heads * tiling_.cache.q_len * head_dim_);
    pipe->InitBuffer(loaded_, 2, state_floats_ * sizeof(float));
    pipe->InitBuffer(results_, 1, tiling_.block_rows * head_dim_ * sizeof(T));
    pipe->InitBuffer(weighted_memory_, tiling_.block_rows * head_dim_ * sizeof(float));
    pipe->InitBuffer(theirs_memory_, tiling_.block_rows * head_dim_ * sizeof(float));
    pipe->InitBuffer(lanes_memory_, 5 * rows8_ * sizeof(float));
    pipe->InitBuffer(spread_memory_, rows8_ * kBlockFloats * sizeof(float));
    weighted_ = weighted_memory_.Get<float>();
    theirs_weighted_ = theirs_memory_.Get<float>();
    maximum_ = lanes_memory_.Get<float>();
    sum_ = maximum_[rows8_];
    larger_ = maximum_[2 * rows8_];
    mine_ = maximum_[3 * rows8_];
    theirs_ = maximum_[4 * rows8_];
    spread_ = spread_memory_.Get<float>();
  }

  __aicore__ inline void process() {
    for (int64_t worker = AscendC::GetBlockIdx(); worker < tiling_.cache.workers; worker += AscendC::GetBlockNum()) {
      WorkList<CacheRows<T>> work(tiling_, rows_, worker);
      Share share;
      while (work.next(share)) {
        if (share.state >= 0 && share.begin == 0) combine(share, worker);
      }
    }
  }

 private:
  __aicore__ inline void combine(const Share& share, int64_t worker) {
    const int32_t rows = static_cast<int32_t>(share.part.end_row - share.part.first_row);
    AscendC::Duplicate(maximum_, kLowest, rows8_);
    AscendC::Duplicate(sum_, 0.0f, rows8_);
    AscendC::Duplicate(weighted_, 0.0f, rows * head_dim_);
    PipeBarrier<PIPE_V>();
    load(share.state, rows);
    for (int64_t other = worker + 1; other <= share.last_worker + 1; ++other) {
      LocalTensor<float> state = loaded_.template DeQue<float>();
      if (other <= share.last_worker) load(2 * other, rows);  // the part comes first in the others' shares
      merge(state, rows);
      loaded_.FreeTensor(state);
    }
    store(share.part, rows);
  }

  __aicore__ inline void load(int64_t index, int32_t rows) {
    LocalTensor<float> to = loaded_.template AllocTensor<float>();
    AscendC::DataCopy(to, states_[index * state_floats_], static_cast<uint32_t>(2 * rows8_ + rows * head_dim_));
    loaded_.EnQue(to);
  }

  // softmax over the tokens of both
  __aicore__ inline void merge(const LocalTensor<float>& state, int32_t rows) {
    AscendC::Max(larger_, maximum_, state, rows8_);
    PipeBarrier<PIPE_V>();
    AscendC::Sub(mine_, maximum_, larger_, rows8_);
    AscendC::Sub(theirs_, state, larger_, rows8_);
    PipeBarrier<PIPE_V>();
    AscendC::Exp(mine_, mine_, rows8_);
    AscendC::Exp(theirs_, theirs_, rows8_);
    AscendC::Adds(maximum_, larger_, 0.0f, rows8_);
    PipeBarrier<PIPE_V>();
    AscendC::Mul(sum_, sum_, mine_, rows8_);
    AscendC::Mul(larger_, state[rows8_], theirs_, rows8_);
    PipeBarrier<PIPE_V>();
    AscendC::Add(sum_, sum_, larger_, rows8_);
    multiply_rows(weighted_, weighted_, mine_, rows);
    multiply_rows(theirs_weighted_, state[2 * rows8_], theirs_, rows);
    AscendC::Add(weighted_, weighted_, theirs_weighted_, rows * head_dim_);
    PipeBarrier<PIPE_V>();
  }

  // to_r = from_r * factor_r
  __aicore__ inline void multiply_rows(const LocalTensor<float>& to, const LocalTensor<float>& from,
                                       const LocalTensor<float>& factors, int32_t rows) {
    const int32_t pitch = head_dim_ / kBlockFloats;
    AscendC::Brcb(spread_, factors, rows8_ / 8, AscendC::BrcbRepeatParams(1, 8));
    PipeBarrier<PIPE_V>();
    for (int32_t d = 0; d < head_dim_; d += kLanes) {
      AscendC::Mul(to[d], from[d], spread_, static_cast<uint64_t>(smaller(kLanes, head_dim_ - d)), rows,
                   AscendC::BinaryRepeatParams(1, 1, 0, pitch, pitch, 1));
    }
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void store(const Part& part, int32_t rows) {
    AscendC::Maxs(sum_, sum_, kSmallest, rows8_);
    AscendC::Duplicate(mine_, 1.0f, rows8_);
    PipeBarrier<PIPE_V>();
    AscendC::Div(mine_, mine_, sum_, rows8_);
    PipeBarrier<PIPE_V>();
    multiply_rows(weighted_, weighted_, mine_, rows);
    LocalTensor<T> rounded = results_.template AllocTensor<T>();
    AscendC::Cast(rounded, weighted_, AscendC::RoundMode::CAST_RINT, rows * head_dim_);
    PipeBarrier<PIPE_V>();  // the next part may be this core's too
    results_.EnQue(rounded);
    LocalTensor<T> ready = results_.template DeQue<T>();
    store_rows(out_, tiling_.num_heads, tiling_.cache.q_len, ready, rows_of_part(tiling_, part));
    results_.FreeTensor(ready);
  }

  AttentionTiling tiling_;
  int32_t head_dim_, rows8_;
  int64_t state_floats_;
  CacheRows<T> rows_;
  GlobalTensor<float> states_;
  GlobalTensor<T> out_;
  TQue<TPosition::VECIN, 1> loaded_;
  TQue<TPosition::VECOUT, 1> results_;
  TBuf<TPosition::VECCALC> weighted_memory_, theirs_memory_, lanes_memory_, spread_memory_;
  LocalTensor<float> weighted_, theirs_weighted_;              // [rows, head_dim]
  LocalTensor<float> maximum_, sum_, larger_, mine_, theirs_;  // [rows]
  LocalTensor<float> spread_;                                  // [rows, 8]
};

}  // namespace razor::ascend

// The new keys and values are not read.
#define RAZOR_COMBINE_KERNEL(name, T)                                                                                  \
  extern "C" __global__ __aicore__ void name(GM_ADDR seen, GM_ADDR sink_size, GM_ADDR window_size, GM_ADDR compensate, \
                                             GM_ADDR pad, GM_ADDR states, GM_ADDR out, GM_ADDR tiling) {               \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                                    \
    AscendC::TPipe pipe;                                                                                               \
    razor::ascend::Combine<T> combine;                                                                                 \
    combine.init(&pipe, {nullptr, nullptr, nullptr, nullptr, nullptr, seen, sink_size, window_size, compensate, pad},  \
                 states, out, tiling);                                                                                 \
    combine.process();                                                                                                 \
  }

RAZOR_COMBINE_KERNEL(razor_combine_f16, half)
RAZOR_COMBINE_KERNEL(razor_combine_bf16, bfloat16_t)
