// SPDX-License-Identifier: Apache-2.0
// The cache and the new tokens in global memory: a row's policy and lengths, tiles of consecutive tokens into the core,
// sums of tokens. Scalars are read from inputs of the launch only, data moves by copies only.
#pragma once

#include "ascend/op_kernel/tile_math.h"

namespace razor::ascend {

// Inputs in global memory: `cache.h` of the core tells their shapes. GM_ADDR is a macro that ends in `*`: a second name
// in one declaration would be no address.
struct CacheAddresses {
  GM_ADDR key;
  GM_ADDR value;
  GM_ADDR key_pages;
  GM_ADDR value_pages;
  GM_ADDR page_table;
  GM_ADDR seen;
  GM_ADDR sink_size;
  GM_ADDR window_size;
  GM_ADDR compensate;
  GM_ADDR pad;
};

template <class T>
class CacheRows {
 public:
  using Queue = TQue<TPosition::VECIN, 1>;

  __aicore__ inline void init(const CacheTiling& tiling, const CacheAddresses& in) {
    tiling_ = tiling;
    const int64_t table_rows = tiling.batch * tiling.num_kv_heads;
    const int64_t pool = tiling.num_pages * tiling.page_size * tiling.head_dim;
    if (tiling.key_elements > 0) {
      set(new_[0], in.key, tiling.key_elements);
      set(new_[1], in.value, tiling.value_elements);
    }
    if (pool > 0) {
      set(pages_[0], in.key_pages, pool);
      set(pages_[1], in.value_pages, pool);
      set(page_table_, in.page_table, table_rows * tiling.max_pages);
    }
    set(seen_, in.seen, tiling.batch);
    set(sink_size_, in.sink_size, tiling.num_kv_heads);
    set(window_size_, in.window_size, tiling.num_kv_heads);
    set(compensate_, in.compensate, tiling.num_kv_heads);
    if (tiling.has_pad != 0) set(pad_, in.pad, tiling.batch);
  }

  __aicore__ inline CacheRow row(int64_t table_row) const {
    CacheRow row;
    row.batch_index = table_row / tiling_.num_kv_heads;
    row.head = table_row % tiling_.num_kv_heads;
    row.table_row = table_row;
    row.sink = sink_size_.GetValue(row.head);
    row.window = window_size_.GetValue(row.head);
    row.compensate = row.window != kFull && compensate_.GetValue(row.head) != 0;
    row.seen = seen_.GetValue(row.batch_index);
    row.pad = tiling_.has_pad != 0 ? pad_.GetValue(row.batch_index) : 0;
    return row;
  }

  // Keys (side 0) or values (side 1) of tokens [range) of a row, kept ones or new: [count, head_dim].
  __aicore__ inline void copy_tokens(const LocalTensor<T>& to, int32_t side, const CacheRow& row, TokenRange range) {
    const int32_t head_dim = static_cast<int32_t>(tiling_.head_dim);
    for (int64_t t = range.begin; t < range.end;) {
      const uint32_t at = static_cast<uint32_t>((t - range.begin) * head_dim);
      if (t >= row.seen) {
        const int64_t (&stride)[3] = side == 0 ? tiling_.key_stride : tiling_.value_stride;
        const int64_t skipped = (stride[2] - head_dim) * static_cast<int64_t>(sizeof(T));
        const int64_t count = range.end - t, token = t - row.seen + row.pad;
        AscendC::DataCopyPad(to[at], new_[side][row.batch_index * stride[0] + row.head * stride[1] + token * stride[2]],
                             AscendC::DataCopyExtParams(count, head_dim * sizeof(T), count > 1 ? skipped : 0, 0, 0),
                             AscendC::DataCopyPadExtParams<T>(false, 0, 0, T{}));
        t = range.end;
        continue;
      }
      const int64_t count = smaller(smaller(range.end, row.seen) - t, contiguous_tokens(row, t, tiling_.page_size));
      AscendC::DataCopy(to[at], pages_[side][page_offset(row, t)], static_cast<uint32_t>(count * head_dim));
      t += count;
    }
  }

  __aicore__ inline int64_t page_offset(const CacheRow& row, int64_t position) const {
    const int64_t index = row_of_token(row, position);
    const int64_t page = page_table_.GetValue(row.table_row * tiling_.max_pages + index / tiling_.page_size);
    return (page * tiling_.page_size + index % tiling_.page_size) * tiling_.head_dim;
  }

  // sum[head_dim] += keys or values of tokens [begin, end): tile by tile, each summed by itself and added once.
  // products: [tile_tokens, 64].
  __aicore__ inline void add_tokens(Queue& queue, const LocalTensor<float>& products, int32_t side, const CacheRow& row,
                                    int64_t begin, int64_t end, const LocalTensor<float>& sum) {
    const int32_t head_dim = static_cast<int32_t>(tiling_.head_dim);
    for (int64_t t = begin; t < end; t += tiling_.tile_tokens) {
      const TokenRange range = {t, smaller(t + tiling_.tile_tokens, end)};
      const int32_t count = static_cast<int32_t>(range.end - range.begin);
      LocalTensor<T> to = queue.template AllocTensor<T>();
      copy_tokens(to, side, row, range);
      queue.EnQue(to);
      LocalTensor<T> raw = queue.template DeQue<T>();
      for (int32_t d = 0; d < head_dim; d += kLanes) {
        const int32_t width = static_cast<int32_t>(smaller(kLanes, head_dim - d));
        AscendC::Cast(products, raw[d], AscendC::RoundMode::CAST_NONE, static_cast<uint64_t>(width), count,
                      AscendC::UnaryRepeatParams(1, 1, 8, head_dim * sizeof(T) / 32));
        PipeBarrier<PIPE_V>();
        const TileMath::SumOfRows piece = {products, sum[d], width};
        TileMath::add_rows(&piece, 1, count);
      }
      queue.FreeTensor(raw);
    }
  }

  __aicore__ inline GlobalTensor<T>& pages(int32_t side) { return pages_[side]; }

 private:
  template <class U>
  __aicore__ inline void set(GlobalTensor<U>& tensor, GM_ADDR address, int64_t elements) {
    tensor.SetGlobalBuffer(reinterpret_cast<__gm__ U*>(address), static_cast<uint64_t>(elements));
  }

  CacheTiling tiling_;
  GlobalTensor<T> new_[2], pages_[2];  // keys, values
  GlobalTensor<int32_t> page_table_, sink_size_, window_size_;
  GlobalTensor<int64_t> seen_, pad_;
  GlobalTensor<uint8_t> compensate_;
};

}  // namespace razor::ascend
