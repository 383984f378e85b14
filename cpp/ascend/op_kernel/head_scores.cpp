// SPDX-License-Identifier: Apache-2.0
// Echo and induction scores; the definition is cpp/razor/head_scores.h's. A vector core takes a block of query rows of
// one (sequence, kv head): keys stream past it for the softmax states, then for every earlier copy the few keys that
// the block's tokens look at. No map, no values; each row leaves its two sums, which the caller adds up.
// Emulated only: it never ran on an NPU.
#include "ascend/op_kernel/query_rows.h"
#include "ascend/op_kernel/tile_math.h"

namespace razor::ascend {

template <class T>
class HeadScores {
 public:
  __aicore__ inline HeadScores() {}

  __aicore__ inline void init(TPipe* pipe, GM_ADDR query, GM_ADDR key, GM_ADDR scores, GM_ADDR tiling) {
    read_tiling(tiling, tiling_);
    tiling_.scale = read_scale<HeadScoresTiling>(tiling);
    n_ = static_cast<int32_t>(tiling_.tile_tokens);
    head_dim_ = static_cast<int32_t>(tiling_.head_dim);
    rows8_ = static_cast<int32_t>(round_up(tiling_.block_rows, 8));
    const int64_t table_rows = tiling_.batch * tiling_.num_kv_heads;
    query_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(query), tiling_.query_elements);
    key_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(key), tiling_.key_elements);
    scores_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(scores), table_rows * 2 * tiling_.blocks_per_row * rows8_);
    pipe->InitBuffer(keys_, 2, n_ * head_dim_ * sizeof(T));
    pipe->InitBuffer(results_, 1, 2 * rows8_ * sizeof(float));
    pipe->InitBuffer(logits_memory_, tiling_.block_rows * n_ * sizeof(float));
    pipe->InitBuffer(lanes_memory_, 3 * rows8_ * sizeof(float));
    logits_ = logits_memory_.Get<float>();
    score_[0] = lanes_memory_.Get<float>();
    score_[1] = score_[0][rows8_];
    weight_ = score_[0][2 * rows8_];
    math_.init(pipe, n_, static_cast<int32_t>(tiling_.block_rows), head_dim_, /*weighs=*/false);
  }

  __aicore__ inline void process() {
    const int64_t table_rows = tiling_.batch * tiling_.num_kv_heads, items = table_rows * tiling_.blocks_per_row;
    for (int64_t i = AscendC::GetBlockIdx(); i < items; i += AscendC::GetBlockNum()) {
      // Late blocks see most keys: dearest first.
      score_block(i % table_rows, tiling_.blocks_per_row - 1 - i / table_rows);
    }
  }

 private:
  // Query row r of all is token 1 + period + r / group on head r % group: the prefix and the first copy have no
  // earlier copies.
  __aicore__ inline int64_t token(int64_t r) const { return 1 + tiling_.period + r / tiling_.group; }

  __aicore__ inline void score_block(int64_t table_row, int64_t block) {
    const int64_t all_rows = (tiling_.tokens - 1 - tiling_.period) * tiling_.group;
    batch_index_ = table_row / tiling_.num_kv_heads;
    head_ = table_row % tiling_.num_kv_heads;
    first_row_ = block * tiling_.block_rows;
    end_row_ = smaller(first_row_ + tiling_.block_rows, all_rows);
    block_rows_ = static_cast<int32_t>(end_row_ - first_row_);
    load_queries();
    math_.clear(block_rows_, /*weighs=*/false);
    for (int64_t t = 0; t <= token(end_row_ - 1); t += n_) take_in(t, smaller(t + n_, token(end_row_ - 1) + 1));
    AscendC::Duplicate(score_[0], 0.0f, 2 * rows8_);  // both
    AscendC::Duplicate(weight_, 0.0f, rows8_);
    PipeBarrier<PIPE_V>();
    for (int64_t lag = tiling_.period; lag < token(end_row_ - 1); lag += tiling_.period) look_back(lag);
    AscendC::Div(score_[0], score_[0], math_.sum, rows8_);
    AscendC::Div(score_[1], score_[1], math_.sum, rows8_);
    PipeBarrier<PIPE_V>();
    store(table_row, block);
  }

  __aicore__ inline void load_queries() {
    LocalTensor<T> to = keys_.template AllocTensor<T>();
    load_rows(to, query_, tiling_.query_stride,
              {batch_index_, head_, tiling_.group, token(0), first_row_, end_row_, head_dim_});
    keys_.EnQue(to);
    LocalTensor<T> raw = keys_.template DeQue<T>();
    math_.take_queries(raw, block_rows_, tiling_.scale);
    keys_.FreeTensor(raw);
  }

  // Logits of the block's rows and keys [begin, end).
  __aicore__ inline void dot_keys(int64_t begin, int64_t end) {
    const int32_t count = static_cast<int32_t>(end - begin);
    const int64_t skipped = (tiling_.key_stride[2] - head_dim_) * static_cast<int64_t>(sizeof(T));
    LocalTensor<T> to = keys_.template AllocTensor<T>();
    AscendC::DataCopyPad(
        to, key_[batch_index_ * tiling_.key_stride[0] + head_ * tiling_.key_stride[1] + begin * tiling_.key_stride[2]],
        AscendC::DataCopyExtParams(count, head_dim_ * sizeof(T), count > 1 ? skipped : 0, 0, 0),
        AscendC::DataCopyPadExtParams<T>(false, 0, 0, T{}));
    keys_.EnQue(to);
    LocalTensor<T> raw = keys_.template DeQue<T>();
    math_.take_tile(raw, count);
    keys_.FreeTensor(raw);
    math_.query_dot_keys(block_rows_, count);
  }

  __aicore__ inline void take_in(int64_t begin, int64_t end) {
    dot_keys(begin, end);
    for (int64_t r = first_row_; r < end_row_;) {
      const int64_t rows = rows_of_token(r, end_row_, tiling_.group);
      math_.see_columns(static_cast<int32_t>(r - first_row_), static_cast<int32_t>(r - first_row_ + rows), 0,
                        smaller(larger(token(r) + 1 - begin, 0), end - begin));
      r += rows;
    }
    math_.softmax(block_rows_);
  }

  // The copy `lag` tokens before each row's token, for the echo, and the token after it, for the induction.
  __aicore__ inline void look_back(int64_t lag) {
    const int64_t begin = larger(token(first_row_) - lag, 1), end = token(end_row_ - 1) - lag + 2;
    dot_keys(begin, end);
    AscendC::Adds(logits_, math_.logits, 0.0f, block_rows_ * n_);
    PipeBarrier<PIPE_V>();
    for (int32_t side = 0; side < 2; ++side) {
      for (int64_t r = first_row_; r < end_row_;) {
        const int64_t rows = rows_of_token(r, end_row_, tiling_.group), copy = token(r) - lag;
        const int64_t column = copy >= 1 ? copy - begin + side : 0;
        math_.see_columns(static_cast<int32_t>(r - first_row_), static_cast<int32_t>(r - first_row_ + rows), column,
                          copy >= 1 ? column + 1 : column);
        r += rows;
      }
      math_.weigh(block_rows_);
      AscendC::WholeReduceSum(weight_, math_.logits, n_, block_rows_, 1, 1, n_ / kBlockFloats);
      PipeBarrier<PIPE_V>();
      AscendC::Add(score_[side], score_[side], weight_, rows8_);
      AscendC::Adds(math_.logits, logits_, 0.0f, block_rows_ * n_);
      PipeBarrier<PIPE_V>();
    }
  }

  // scores [table_rows, 2, blocks_per_row, block_rows rounded up to 8]
  __aicore__ inline void store(int64_t table_row, int64_t block) {
    LocalTensor<float> result = results_.template AllocTensor<float>();
    AscendC::Adds(result, score_[0], 0.0f, 2 * rows8_);
    results_.EnQue(result);
    LocalTensor<float> ready = results_.template DeQue<float>();
    for (int32_t side = 0; side < 2; ++side) {
      AscendC::DataCopy(scores_[((table_row * 2 + side) * tiling_.blocks_per_row + block) * rows8_],
                        ready[side * rows8_], static_cast<uint32_t>(rows8_));
    }
    results_.FreeTensor(ready);
  }

  HeadScoresTiling tiling_;
  int32_t n_, head_dim_, rows8_, block_rows_;
  int64_t batch_index_, head_, first_row_, end_row_;
  TileMath math_;
  GlobalTensor<T> query_, key_;
  GlobalTensor<float> scores_;
  TQue<TPosition::VECIN, 1> keys_;
  TQue<TPosition::VECOUT, 1> results_;
  TBuf<TPosition::VECCALC> logits_memory_, lanes_memory_;
  LocalTensor<float> logits_;             // [rows, n] a copy
  LocalTensor<float> score_[2], weight_;  // [rows] echo, induction
};

}  // namespace razor::ascend

#define RAZOR_HEAD_SCORES_KERNEL(name, T)                                                                  \
  extern "C" __global__ __aicore__ void name(GM_ADDR query, GM_ADDR key, GM_ADDR scores, GM_ADDR tiling) { \
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);                                                        \
    AscendC::TPipe pipe;                                                                                   \
    razor::ascend::HeadScores<T> head_scores;                                                              \
    head_scores.init(&pipe, query, key, scores, tiling);                                                   \
    head_scores.process();                                                                                 \
  }

RAZOR_HEAD_SCORES_KERNEL(razor_head_scores_f16, half)
RAZOR_HEAD_SCORES_KERNEL(razor_head_scores_bf16, bfloat16_t)
