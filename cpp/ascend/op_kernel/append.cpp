// SPDX-License-Identifier: Apache-2.0
// Stores the new tokens by policy: what leaves a window goes into the sums, padding is skipped. `seen` grows in the
// caller's next launch, because all cores read it here.
//
// One core owns the keys or the values of a page-table row: it sums the tokens that are about to be overwritten, and
// the copies that overwrite them wait for the sums. Emulated only: it never ran on an NPU.
#include "ascend/op_kernel/cache_rows.h"

namespace razor::ascend {

template <class T>
class Append {
 public:
  __aicore__ inline Append() {}

  __aicore__ inline void init(TPipe* pipe, const CacheAddresses& in, GM_ADDR key_sum, GM_ADDR value_sum,
                              GM_ADDR tiling) {
    read_tiling(tiling, tiling_);
    n_ = static_cast<int32_t>(tiling_.tile_tokens);
    head_dim_ = static_cast<int32_t>(tiling_.head_dim);
    rows_.init(tiling_, in);
    const uint64_t floats = tiling_.batch * tiling_.num_kv_heads * head_dim_;
    sums_[0].SetGlobalBuffer(reinterpret_cast<__gm__ float*>(key_sum), floats);
    sums_[1].SetGlobalBuffer(reinterpret_cast<__gm__ float*>(value_sum), floats);
    pipe->InitBuffer(dropped_, 2, n_ * head_dim_ * sizeof(T));
    pipe->InitBuffer(copied_, 2, n_ * head_dim_ * sizeof(T));
    pipe->InitBuffer(result_, 1, head_dim_ * sizeof(float));
    pipe->InitBuffer(products_memory_, n_ * kLanes * sizeof(float));
    pipe->InitBuffer(sum_memory_, head_dim_ * sizeof(float));
    products_ = products_memory_.Get<float>();
    sum_ = sum_memory_.Get<float>();
  }

  __aicore__ inline void process() {
    const int64_t items = 2 * tiling_.batch * tiling_.num_kv_heads;
    const int64_t workers = AscendC::GetBlockNum();
    for (int64_t i = AscendC::GetBlockIdx(); i < items; i += workers) {
      append(rows_.row(i / 2), static_cast<int32_t>(i % 2));
    }
  }

 private:
  __aicore__ inline void append(const CacheRow& row, int32_t side) {
    const int64_t end = row.seen + tiling_.q_len - row.pad;
    // Tokens in [sink, end - window) are dropped afterwards; those before seen - window already were.
    const int64_t dropped_end = larger(row.sink, end - row.window);
    const int64_t dropped_begin = larger(row.sink, row.seen - row.window);
    if (row.compensate && dropped_begin < dropped_end) add_to_sums(row, side, dropped_begin, dropped_end);
    store_tokens(row, side, {row.seen, smaller(row.sink, end)});
    store_tokens(row, side, {larger(row.seen, dropped_end), end});
  }

  __aicore__ inline void add_to_sums(const CacheRow& row, int32_t side, int64_t begin, int64_t end) {
    const GlobalTensor<float> held = sums_[side][row.table_row * head_dim_];
    LocalTensor<float> to = dropped_.template AllocTensor<float>();
    AscendC::DataCopy(to, held, static_cast<uint32_t>(head_dim_));
    dropped_.EnQue(to);
    LocalTensor<float> stored = dropped_.template DeQue<float>();
    AscendC::Adds(sum_, stored, 0.0f, head_dim_);
    PipeBarrier<PIPE_V>();
    dropped_.FreeTensor(stored);
    rows_.add_tokens(dropped_, products_, side, row, begin, end, sum_);

    // The queue makes the copy out wait for the sum, and with it all later copies for what was read for the sum.
    LocalTensor<float> result = result_.template AllocTensor<float>();
    AscendC::Adds(result, sum_, 0.0f, head_dim_);
    PipeBarrier<PIPE_V>();
    result_.EnQue(result);
    LocalTensor<float> ready = result_.template DeQue<float>();
    AscendC::DataCopy(held, ready, static_cast<uint32_t>(head_dim_));
    result_.FreeTensor(ready);
  }

  __aicore__ inline void store_tokens(const CacheRow& row, int32_t side, TokenRange range) {
    for (int64_t t = range.begin; t < range.end;) {
      const int64_t run = smaller(contiguous_tokens(row, t, tiling_.page_size), n_);
      const int64_t count = smaller(range.end - t, run);
      LocalTensor<T> to = copied_.template AllocTensor<T>();
      rows_.copy_tokens(to, side, row, {t, t + count});
      copied_.EnQue(to);
      LocalTensor<T> ready = copied_.template DeQue<T>();
      AscendC::DataCopy(rows_.pages(side)[rows_.page_offset(row, t)], ready, static_cast<uint32_t>(count * head_dim_));
      copied_.FreeTensor(ready);
      t += count;
    }
  }

  CacheTiling tiling_;
  int32_t n_, head_dim_;
  CacheRows<T> rows_;
  GlobalTensor<float> sums_[2];
  TQue<TPosition::VECIN, 1> dropped_;
  AscendC::TQueBind<TPosition::VECIN, TPosition::VECOUT, 1> copied_;
  TQue<TPosition::VECOUT, 1> result_;
  TBuf<TPosition::VECCALC> products_memory_, sum_memory_;
  LocalTensor<float> products_;  // [n, 64]
  LocalTensor<float> sum_;       // [head_dim]
};

}  // namespace razor::ascend

#define RAZOR_APPEND_KERNEL(name, T)                                                                                   \
  extern "C" __global__ __aicore__ void name(GM_ADDR key, GM_ADDR value, GM_ADDR key_pages, GM_ADDR value_pages,       \
                                             GM_ADDR page_table, GM_ADDR seen, GM_ADDR sink_size, GM_ADDR window_size, \
                                             GM_ADDR compensate, GM_ADDR key_sum, GM_ADDR value_sum, GM_ADDR pad,      \
                                             GM_ADDR tiling) {                                                         \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                                    \
    AscendC::TPipe pipe;                                                                                               \
    razor::ascend::Append<T> append;                                                                                   \
    append.init(&pipe,                                                                                                 \
                {key, value, key_pages, value_pages, page_table, seen, sink_size, window_size, compensate, pad},       \
                key_sum, value_sum, tiling);                                                                           \
    append.process();                                                                                                  \
  }

RAZOR_APPEND_KERNEL(razor_append_f16, half)
RAZOR_APPEND_KERNEL(razor_append_bf16, bfloat16_t)
