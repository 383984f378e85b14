// SPDX-License-Identifier: Apache-2.0
// Attention of this call's queries over one layer's compressed cache and this call's own tokens: decode and prefill.
// The definition is cpp/razor/attention.h's; who works on what is op_host/work_list.h's.
//
// A vector core takes a part (a page-table row, a block of its query rows) tile by tile: keys and values come in 16
// bits, the next tile while this one is worked on; all query rows of the part share them. All arithmetic is float32.
// Emulated only: it never ran on an NPU.
#include "ascend/op_kernel/cache_rows.h"
#include "ascend/op_kernel/query_rows.h"

namespace razor::ascend {

struct AttentionAddresses {
  GM_ADDR query;  // [batch, num_heads, q_len, head_dim], strided
  CacheAddresses cache;
  GM_ADDR key_sum;       // [batch * num_kv_heads, head_dim] float32
  GM_ADDR value_sum;     // the same
  GM_ADDR alibi_slopes;  // [num_heads] float32, read only if tiling.has_slopes
  GM_ADDR out;           // [batch, num_heads, q_len, head_dim] contiguous
  GM_ADDR states;        // [2 * workers, state_floats] float32, those of cut parts
  GM_ADDR tiling;
};

template <class T>
class Attention {
 public:
  __aicore__ inline Attention() {}

  __aicore__ inline void init(TPipe* pipe, const AttentionAddresses& in) {
    pipe_ = pipe;
    read_tiling(in.tiling, tiling_);
    tiling_.scale = read_scale<AttentionTiling>(in.tiling);
    const CacheTiling& cache = tiling_.cache;
    n_ = static_cast<int32_t>(cache.tile_tokens);
    head_dim_ = static_cast<int32_t>(cache.head_dim);
    rows_.init(cache, in.cache);
    const uint64_t outputs = cache.batch * tiling_.num_heads * cache.q_len * head_dim_;
    const uint64_t table_rows = cache.batch * cache.num_kv_heads;
    query_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(in.query), tiling_.query_elements);
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(in.out), outputs);
    sums_[0].SetGlobalBuffer(reinterpret_cast<__gm__ float*>(in.key_sum), table_rows * head_dim_);
    sums_[1].SetGlobalBuffer(reinterpret_cast<__gm__ float*>(in.value_sum), table_rows * head_dim_);
    if (tiling_.has_slopes != 0) {
      slopes_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(in.alibi_slopes), tiling_.num_heads);
    }
    state_floats_ = state_floats(tiling_.block_rows, head_dim_);
    states_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(in.states), 2 * cache.workers * state_floats_);

    pipe->InitBuffer(queues_[0], 2, n_ * head_dim_ * sizeof(T));
    pipe->InitBuffer(queues_[1], 2, n_ * head_dim_ * sizeof(T));
    pipe->InitBuffer(results_, 1, state_floats_ * sizeof(float));
    pipe->InitBuffer(distance_memory_, 2 * n_ * sizeof(float));
    pipe->InitBuffer(sum_memory_, head_dim_ * sizeof(float));
    steps_ = distance_memory_.Get<float>();
    distance_ = steps_[n_];
    sum_ = sum_memory_.Get<float>();
    math_.init(pipe, n_, static_cast<int32_t>(tiling_.block_rows), head_dim_, /*weighs=*/true);
    count_steps();
  }

  __aicore__ inline void process() {
    for (int64_t worker = AscendC::GetBlockIdx(); worker < tiling_.cache.workers; worker += AscendC::GetBlockNum()) {
      zero_padding(worker);
      WorkList<CacheRows<T>> work(tiling_, rows_, worker);
      Share share;
      while (work.next(share)) attend(share);
    }
  }

 private:
  // steps = 0, 1, 2, ...
  __aicore__ inline void count_steps() {
    for (int32_t i = 0; i < kBlockFloats; ++i) steps_.SetValue(i, static_cast<float>(i));
    vector_waits_for_scalar(pipe_);
    for (int32_t i = kBlockFloats; i < n_; i *= 2) {
      AscendC::Adds(steps_[i], steps_, static_cast<float>(i), static_cast<int32_t>(smaller(i, n_ - i)));
      PipeBarrier<PIPE_V>();
    }
  }

  // Padding yields zeros. Worker by worker, one (sequence, head) after the other.
  __aicore__ inline void zero_padding(int64_t worker) {
    if (tiling_.cache.has_pad == 0) return;
    const int64_t most = tiling_.block_rows * head_dim_;
    for (int64_t bh = worker; bh < tiling_.cache.batch * tiling_.num_heads; bh += tiling_.cache.workers) {
      const int64_t pad = rows_.row(bh / tiling_.num_heads * tiling_.cache.num_kv_heads).pad;
      for (int64_t i = 0; i < pad * head_dim_; i += most) {
        const int32_t count = static_cast<int32_t>(smaller(most, pad * head_dim_ - i));
        LocalTensor<T> zeros = results_.template AllocTensor<T>();
        AscendC::Duplicate(zeros, T{}, count);
        results_.EnQue(zeros);
        LocalTensor<T> ready = results_.template DeQue<T>();
        AscendC::DataCopy(out_[bh * tiling_.cache.q_len * head_dim_ + i], ready, static_cast<uint32_t>(count));
        results_.FreeTensor(ready);
      }
    }
  }

  __aicore__ inline void attend(const Share& share) {
    part_ = share.part;
    part_rows_ = static_cast<int32_t>(part_.end_row - part_.first_row);
    load_queries();
    math_.clear(part_rows_, /*weighs=*/true);
    attend_tiles(share.begin, smaller(share.end, part_.tiles));
    if (part_.drops && share.end == part_.units) attend_dropped();
    if (share.state >= 0) {
      store_state(share.state);
    } else {
      store();
    }
  }

  __aicore__ inline void load_queries() {
    LocalTensor<T> to = queues_[0].template AllocTensor<T>();
    load_rows(to, query_, tiling_.query_stride, rows_of_part(tiling_, part_));
    queues_[0].EnQue(to);
    LocalTensor<T> raw = queues_[0].template DeQue<T>();
    math_.take_queries(raw, part_rows_, tiling_.scale);
    queues_[0].FreeTensor(raw);
  }

  __aicore__ inline TokenRange tile(int64_t index) const {
    if (index < part_.sink_tiles) return tile_of(part_.row, part_.sinks, n_, index);
    return tile_of(part_.row, part_.window, n_, index - part_.sink_tiles);
  }

  __aicore__ inline void load_tile(int32_t side, TokenRange range) {
    LocalTensor<T> to = queues_[side].template AllocTensor<T>();
    rows_.copy_tokens(to, side, part_.row, range);
    queues_[side].EnQue(to);
  }

  // The next tile of this side into the core, this one into float32.
  __aicore__ inline void take_tile(int32_t side, int64_t index, int64_t end) {
    LocalTensor<T> raw = queues_[side].template DeQue<T>();
    if (index + 1 < end) load_tile(side, tile(index + 1));
    const TokenRange range = tile(index);
    math_.take_tile(raw, static_cast<int32_t>(range.end - range.begin));
    queues_[side].FreeTensor(raw);
  }

  // Tiles [begin, end) of the part.
  __aicore__ inline void attend_tiles(int64_t begin, int64_t end) {
    if (begin >= end) return;
    load_tile(0, tile(begin));
    load_tile(1, tile(begin));
    for (int64_t i = begin; i < end; ++i) {
      const TokenRange range = tile(i);
      const int32_t count = static_cast<int32_t>(range.end - range.begin);
      take_tile(0, i, end);
      math_.query_dot_keys(part_rows_, count);
      see_tokens(range, /*sinks=*/i < part_.sink_tiles);
      math_.softmax(part_rows_);
      take_tile(1, i, end);
      math_.add_weighted_values(part_rows_, count);
    }
  }

  // Biases the logits of a tile, and hides the tokens that a row does not see.
  __aicore__ inline void see_tokens(TokenRange range, bool sinks) {
    for (int64_t r = part_.first_row; r < part_.end_row;) {
      const int64_t rows = rows_of_token(r, part_.end_row, tiling_.group);
      const int64_t position = part_.row.seen + r / tiling_.group;
      const int64_t oldest = sinks ? 0 : oldest_kept(part_.row, position, tiling_.dense != 0);
      const int64_t count = range.end - range.begin;
      const int32_t first_row = static_cast<int32_t>(r - part_.first_row);
      if (tiling_.has_slopes != 0) add_distances(first_row, r % tiling_.group, rows, range.begin - position);
      math_.see_columns(first_row, static_cast<int32_t>(first_row + rows),
                        smaller(larger(oldest - range.begin, 0), count),
                        smaller(larger(position + 1 - range.begin, 0), count));
      r += rows;
    }
  }

  // ALiBi: logits[r][c] += slope_r * (distance + c), for rows of one token; distance <= 0 where it is seen.
  __aicore__ inline void add_distances(int32_t first_row, int64_t first_head, int64_t rows, int64_t distance) {
    AscendC::Adds(distance_, steps_, static_cast<float>(static_cast<int32_t>(distance)), n_);
    PipeBarrier<PIPE_V>();
    for (int64_t i = 0; i < rows; ++i) {
      const float slope = slopes_.GetValue(part_.row.head * tiling_.group + first_head + i);
      AscendC::Axpy(math_.logits[(first_row + i) * n_], distance_, slope, n_);
    }
    PipeBarrier<PIPE_V>();
  }

  // The compensation row: for each query token its own mean. They make one tile, of which a row sees its token's.
  __aicore__ inline void attend_dropped() {
    const int64_t first_token = part_.first_row / tiling_.group, end_token = (part_.end_row - 1) / tiling_.group + 1;
    const int32_t tokens = static_cast<int32_t>(end_token - first_token);
    const LocalTensor<float>& log_dropped = distance_;
    scalar_waits_for_vector(pipe_);
    for (int32_t i = 0; i < tokens; ++i) {
      log_dropped.SetValue(i, static_cast<float>(static_cast<int32_t>(larger(dropped(first_token + i), 1))));
    }
    vector_waits_for_scalar(pipe_);
    AscendC::Ln(log_dropped, log_dropped, tokens);

    make_means(0, first_token, tokens);
    math_.query_dot_keys(part_rows_, tokens);
    for (int32_t r = 0; r < part_rows_; ++r) {
      AscendC::Add(math_.logits[r * n_], math_.logits[r * n_], log_dropped, tokens);
    }
    PipeBarrier<PIPE_V>();
    for (int64_t r = part_.first_row; r < part_.end_row;) {
      const int64_t rows = rows_of_token(r, part_.end_row, tiling_.group), token = r / tiling_.group;
      const int64_t column = token - first_token, first_row = r - part_.first_row;
      math_.see_columns(static_cast<int32_t>(first_row), static_cast<int32_t>(first_row + rows), column,
                        dropped(token) > 0 ? column + 1 : column);
      r += rows;
    }
    math_.softmax(part_rows_);
    make_means(1, first_token, tokens);
    math_.add_weighted_values(part_rows_, tokens);
  }

  __aicore__ inline int64_t oldest(int64_t token) const {
    return oldest_kept(part_.row, part_.row.seen + token, tiling_.dense != 0);
  }

  __aicore__ inline int64_t dropped(int64_t token) const { return oldest(token) - part_.row.sink; }

  // tile[i] = mean key (side 0) or value of what query token first_token + i drops: the cache's sum, and one token more
  // for each step of the window.
  __aicore__ inline void make_means(int32_t side, int64_t first_token, int32_t tokens) {
    LocalTensor<float> to = queues_[side].template AllocTensor<float>();
    AscendC::DataCopy(to, sums_[side][part_.row.table_row * head_dim_], static_cast<uint32_t>(head_dim_));
    queues_[side].EnQue(to);
    LocalTensor<float> stored = queues_[side].template DeQue<float>();
    AscendC::Adds(sum_, stored, 0.0f, head_dim_);
    PipeBarrier<PIPE_V>();
    queues_[side].FreeTensor(stored);

    int64_t summed = larger(part_.row.sink, part_.row.seen - part_.row.window);
    for (int32_t i = 0; i < tokens; ++i) {
      rows_.add_tokens(queues_[side], math_.scratch(), side, part_.row, summed, oldest(first_token + i), sum_);
      summed = larger(summed, oldest(first_token + i));
      const float factor = 1.0f / static_cast<float>(static_cast<int32_t>(larger(summed - part_.row.sink, 1)));
      AscendC::Muls(math_.tile[i * head_dim_], sum_, factor, head_dim_);
      PipeBarrier<PIPE_V>();
    }
  }

  __aicore__ inline void store() {
    math_.divide_by_sums(part_rows_);
    LocalTensor<T> rounded = results_.template AllocTensor<T>();
    AscendC::Cast(rounded, math_.weighted, AscendC::RoundMode::CAST_RINT, part_rows_ * head_dim_);
    results_.EnQue(rounded);
    LocalTensor<T> ready = results_.template DeQue<T>();
    store_rows(out_, tiling_.num_heads, tiling_.cache.q_len, ready, rows_of_part(tiling_, part_));
    results_.FreeTensor(ready);
  }

  __aicore__ inline void store_state(int64_t index) {
    const int32_t rows8 = static_cast<int32_t>(round_up(tiling_.block_rows, 8));
    LocalTensor<float> state = results_.template AllocTensor<float>();
    AscendC::Adds(state, math_.maximum, 0.0f, rows8);
    AscendC::Adds(state[rows8], math_.sum, 0.0f, rows8);
    AscendC::Adds(state[2 * rows8], math_.weighted, 0.0f, part_rows_ * head_dim_);
    results_.EnQue(state);
    LocalTensor<float> ready = results_.template DeQue<float>();
    AscendC::DataCopy(states_[index * state_floats_], ready, static_cast<uint32_t>(2 * rows8 + part_rows_ * head_dim_));
    results_.FreeTensor(ready);
  }

  AttentionTiling tiling_;
  TPipe* pipe_;
  int32_t n_, head_dim_, part_rows_;  // tokens of a tile; query rows of this part
  int64_t state_floats_;
  Part part_;
  CacheRows<T> rows_;
  TileMath math_;
  GlobalTensor<T> query_, out_;
  GlobalTensor<float> sums_[2], slopes_, states_;
  TQue<TPosition::VECIN, 1> queues_[2];  // keys, values; the queries and sums too
  TQue<TPosition::VECOUT, 1> results_;
  TBuf<TPosition::VECCALC> distance_memory_, sum_memory_;
  LocalTensor<float> steps_, distance_;  // [n]
  LocalTensor<float> sum_;               // [head_dim]
};

}  // namespace razor::ascend

#define RAZOR_ATTENTION_KERNEL(name, T)                                                                              \
  extern "C" __global__ __aicore__ void name(                                                                        \
      GM_ADDR query, GM_ADDR key, GM_ADDR value, GM_ADDR key_pages, GM_ADDR value_pages, GM_ADDR page_table,         \
      GM_ADDR seen, GM_ADDR sink_size, GM_ADDR window_size, GM_ADDR compensate, GM_ADDR key_sum, GM_ADDR value_sum,  \
      GM_ADDR alibi_slopes, GM_ADDR pad, GM_ADDR out, GM_ADDR states, GM_ADDR tiling) {                              \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                                  \
    AscendC::TPipe pipe;                                                                                             \
    razor::ascend::Attention<T> attention;                                                                           \
    attention.init(&pipe,                                                                                            \
                   {query,                                                                                           \
                    {key, value, key_pages, value_pages, page_table, seen, sink_size, window_size, compensate, pad}, \
                    key_sum,                                                                                         \
                    value_sum,                                                                                       \
                    alibi_slopes,                                                                                    \
                    out,                                                                                             \
                    states,                                                                                          \
                    tiling});                                                                                        \
    attention.process();                                                                                             \
  }

RAZOR_ATTENTION_KERNEL(razor_attention_f16, half)
RAZOR_ATTENTION_KERNEL(razor_attention_bf16, bfloat16_t)
