// SPDX-License-Identifier: Apache-2.0
// Some query rows against one tile of keys and values, in float32 on the vector pipe: logits, running softmax, weighted
// values. Everything stays on chip; maxima and sums are vectors with a lane per row, so that no step waits for the
// scalar pipe. Each method ends with a barrier of the vector pipe.
//
// A key costs a query row 4 repeats at head_dim 128 (two products, their sum, its reduction to one number), a value as
// many (two products, two folds). All lanes work; the products of a tile lie in 64 columns.
#pragma once

#include "ascend/op_kernel/device.h"

namespace razor::ascend {

constexpr float kLowest = -1e30f;    // the maximum before any logit: finite, or an empty tile would give inf - inf
constexpr float kHidden = -3e38f;    // a logit nobody sees: exp(kHidden - kLowest) = 0
constexpr float kSmallest = 1e-30f;  // in place of an empty sum; any other is at least 1

class TileMath {
 public:
  LocalTensor<float> tile;      // [n, head_dim] keys or values
  LocalTensor<float> query;     // [rows, head_dim], scaled
  LocalTensor<float> logits;    // [rows, n]; after softmax the weights
  LocalTensor<float> maximum;   // [rows] state
  LocalTensor<float> sum;       // [rows] state
  LocalTensor<float> weighted;  // [rows, head_dim] state

  // weighs: values too, not maxima and sums alone.
  __aicore__ inline void init(TPipe* pipe, int32_t tile_tokens, int32_t most_rows, int32_t head_dim, bool weighs) {
    n_ = tile_tokens;
    head_dim_ = head_dim;
    rows8_ = static_cast<int32_t>(round_up(most_rows, 8));
    tile = make(pipe, tile_memory_, n_ * head_dim);
    query = make(pipe, query_memory_, most_rows * head_dim);
    logits = make(pipe, logits_memory_, most_rows * n_);
    product_[0] = make(pipe, product_memory_[0], n_ * kLanes);
    product_[1] = make(pipe, product_memory_[1], n_ * kLanes);
    maximum = make(pipe, maximum_memory_, rows8_);
    sum = make(pipe, sum_memory_, rows8_);
    tile_maximum_ = make(pipe, tile_maximum_memory_, rows8_);
    tile_sum_ = make(pipe, tile_sum_memory_, rows8_);
    shrink_ = make(pipe, shrink_memory_, rows8_);
    spread_ = make(pipe, spread_memory_, rows8_ * kBlockFloats);
    if (weighs) {
      weighted = make(pipe, weighted_memory_, most_rows * head_dim);
      weights_ = make(pipe, weights_memory_, 2 * n_ * kBlockFloats);
    }
    AscendC::Duplicate(tile_maximum_, 0.0f, rows8_);  // lanes beyond the rows stay finite
    AscendC::Duplicate(tile_sum_, 0.0f, rows8_);
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void clear(int32_t rows, bool weighs) {
    AscendC::Duplicate(maximum, kLowest, rows8_);
    AscendC::Duplicate(sum, 0.0f, rows8_);
    if (weighs) AscendC::Duplicate(weighted, 0.0f, rows * head_dim_);
    PipeBarrier<PIPE_V>();
  }

  template <class T>
  __aicore__ inline void take_tile(const LocalTensor<T>& raw, int32_t count) {
    AscendC::Cast(tile, raw, AscendC::RoundMode::CAST_NONE, count * head_dim_);
    PipeBarrier<PIPE_V>();
  }

  template <class T>
  __aicore__ inline void take_queries(const LocalTensor<T>& raw, int32_t rows, float scale) {
    AscendC::Cast(query, raw, AscendC::RoundMode::CAST_NONE, rows * head_dim_);
    PipeBarrier<PIPE_V>();
    AscendC::Muls(query, query, scale, rows * head_dim_);
    PipeBarrier<PIPE_V>();
  }

  // logits[r][c] = query_r . tile_c for c < count; the other columns hold anything until they are hidden.
  __aicore__ inline void query_dot_keys(int32_t rows, int32_t count) {
    const int32_t most = head_dim_ <= kLanes ? 2 : 1;  // rows at a time: two products are there
    for (int32_t r = 0; r < rows; r += most) {
      const int32_t together = static_cast<int32_t>(smaller(most, rows - r));
      for (int32_t i = 0; i < together; ++i) multiply_keys(product_[i], r + i, 0, count);
      for (int32_t d = kLanes; d < head_dim_; d += kLanes) {
        multiply_keys(product_[1], r, d, count);
        PipeBarrier<PIPE_V>();
        AscendC::Add(product_[0], product_[0], product_[1], width(d), count,
                     AscendC::BinaryRepeatParams(1, 1, 1, 8, 8, 8));
        PipeBarrier<PIPE_V>();
      }
      if (head_dim_ <= kLanes) PipeBarrier<PIPE_V>();
      for (int32_t i = 0; i < together; ++i) {
        AscendC::WholeReduceSum(logits[(r + i) * n_], product_[i], static_cast<int32_t>(width(0)), count, 1, 1, 8);
      }
      PipeBarrier<PIPE_V>();
    }
  }

  // Hides all but columns [first, last) from rows [begin, end).
  __aicore__ inline void see_columns(int32_t begin, int32_t end, int64_t first, int64_t last) {
    const uint64_t all = leading_bits(n_);
    uint64_t hidden[2] = {all & ~(leading_bits(last) & ~leading_bits(first)), 0};
    if (hidden[0] == 0 || begin == end) return;
    AscendC::Duplicate(logits[begin * n_], kHidden, hidden, end - begin, 1, n_ / kBlockFloats);
    PipeBarrier<PIPE_V>();
  }

  // Takes the logits into maximum and sum, and makes them weights: exp(logit - maximum).
  __aicore__ inline void softmax(int32_t rows) {
    AscendC::WholeReduceMax(tile_maximum_, logits, n_, rows, 1, 1, n_ / kBlockFloats,
                            AscendC::ReduceOrder::ORDER_ONLY_VALUE);
    PipeBarrier<PIPE_V>();
    AscendC::Max(tile_maximum_, tile_maximum_, maximum, rows8_);
    PipeBarrier<PIPE_V>();
    AscendC::Sub(shrink_, maximum, tile_maximum_, rows8_);
    PipeBarrier<PIPE_V>();
    AscendC::Exp(shrink_, shrink_, rows8_);
    AscendC::Adds(maximum, tile_maximum_, 0.0f, rows8_);
    PipeBarrier<PIPE_V>();
    weigh(rows);
    AscendC::WholeReduceSum(tile_sum_, logits, n_, rows, 1, 1, n_ / kBlockFloats);
    AscendC::Mul(sum, sum, shrink_, rows8_);
    PipeBarrier<PIPE_V>();
    AscendC::Add(sum, sum, tile_sum_, rows8_);
    PipeBarrier<PIPE_V>();
  }

  // logits := exp(logits - maximum)
  __aicore__ inline void weigh(int32_t rows) {
    const int32_t pitch = n_ / kBlockFloats;
    spread(maximum);
    AscendC::Sub(logits, logits, spread_, static_cast<uint64_t>(n_), rows,
                 AscendC::BinaryRepeatParams(1, 1, 0, pitch, pitch, 1));
    PipeBarrier<PIPE_V>();
    AscendC::Exp(logits, logits, rows * n_);
    PipeBarrier<PIPE_V>();
  }

  // weighted_r = shrink_r * weighted_r + sum over c < count of logits[r][c] * tile_c. A tile is summed by itself, in
  // halves, and added once. Pieces of 64 columns go in pairs, which fill each other's waits.
  __aicore__ inline void add_weighted_values(int32_t rows, int32_t count) {
    const int32_t pieces = static_cast<int32_t>(divide_up(head_dim_, kLanes));  // of a row
    multiply_rows(shrink_, rows);
    for (int32_t first = 0; first < rows * pieces; first += 2) {
      const int32_t end = static_cast<int32_t>(smaller(first + 2, rows * pieces));
      for (int32_t i = first; i < end; ++i) {
        if (i % pieces == 0) spread_weights(i / pieces);
      }
      SumOfRows sums[2];
      for (int32_t i = first; i < end; ++i) {
        const int32_t r = i / pieces, d = i % pieces * static_cast<int32_t>(kLanes);
        sums[i - first] = {product_[i - first], weighted[r * head_dim_ + d], static_cast<int32_t>(width(d))};
        AscendC::Mul(product_[i - first], tile[d], weights_[r % 2 * n_ * kBlockFloats], width(d), count,
                     AscendC::BinaryRepeatParams(1, 1, 0, 8, head_dim_ / kBlockFloats, 1));
      }
      PipeBarrier<PIPE_V>();
      add_rows(sums, end - first, count);
    }
  }

  // to[width] += sum of rows [count, 64], which are lost.
  struct SumOfRows {
    LocalTensor<float> rows, to;
    int32_t width;
  };

  __aicore__ inline static void add_rows(const SumOfRows* sums, int32_t num_sums, int32_t count) {
    while (count > 1) {
      const int32_t half_count = (count + 1) / 2, others = (count - half_count) * static_cast<int32_t>(kLanes);
      for (int32_t i = 0; i < num_sums; ++i) {
        AscendC::Add(sums[i].rows, sums[i].rows, sums[i].rows[half_count * kLanes], others);
      }
      PipeBarrier<PIPE_V>();
      count = half_count;
    }
    for (int32_t i = 0; i < num_sums; ++i) AscendC::Add(sums[i].to, sums[i].to, sums[i].rows, sums[i].width);
    PipeBarrier<PIPE_V>();
  }

  // weighted := outputs; zeros for rows that saw nothing, whose values are zeros already.
  __aicore__ inline void divide_by_sums(int32_t rows) {
    const int32_t pitch = head_dim_ / kBlockFloats;
    AscendC::Maxs(sum, sum, kSmallest, rows8_);
    PipeBarrier<PIPE_V>();
    spread(sum);
    for (int32_t d = 0; d < head_dim_; d += kLanes) {
      AscendC::Div(weighted[d], weighted[d], spread_, width(d), rows,
                   AscendC::BinaryRepeatParams(1, 1, 0, pitch, pitch, 1));
    }
    PipeBarrier<PIPE_V>();
  }

  // Columns of head_dim from d on that one repeat takes.
  __aicore__ inline uint64_t width(int32_t d) const { return static_cast<uint64_t>(smaller(kLanes, head_dim_ - d)); }

  __aicore__ inline LocalTensor<float> scratch() const { return product_[0]; }  // [n, 64]

 private:
  __aicore__ inline static uint64_t leading_bits(int64_t count) {
    return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
  }

  __aicore__ inline LocalTensor<float> make(TPipe* pipe, TBuf<TPosition::VECCALC>& memory, int64_t floats) {
    pipe->InitBuffer(memory, static_cast<uint32_t>(floats * sizeof(float)));
    return memory.Get<float>();
  }

  // product[c] = columns [d, d + 64) of query_r * tile_c
  __aicore__ inline void multiply_keys(const LocalTensor<float>& product, int32_t r, int32_t d, int32_t count) {
    AscendC::Mul(product, tile[d], query[r * head_dim_ + d], width(d), count,
                 AscendC::BinaryRepeatParams(1, 1, 1, 8, head_dim_ / kBlockFloats, 0));
  }

  // A number of each row as the 32 bytes that strided operands reuse.
  __aicore__ inline void spread(const LocalTensor<float>& lanes) {
    AscendC::Brcb(spread_, lanes, rows8_ / 8, AscendC::BrcbRepeatParams(1, 8));
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void spread_weights(int32_t r) {
    AscendC::Brcb(weights_[r % 2 * n_ * kBlockFloats], logits[r * n_], n_ / 8, AscendC::BrcbRepeatParams(1, 8));
    PipeBarrier<PIPE_V>();
  }

  // weighted_r *= factor_r
  __aicore__ inline void multiply_rows(const LocalTensor<float>& factors, int32_t rows) {
    const int32_t pitch = head_dim_ / kBlockFloats;
    spread(factors);
    for (int32_t d = 0; d < head_dim_; d += kLanes) {
      AscendC::Mul(weighted[d], weighted[d], spread_, width(d), rows,
                   AscendC::BinaryRepeatParams(1, 1, 0, pitch, pitch, 1));
    }
    PipeBarrier<PIPE_V>();
  }

  int32_t n_, head_dim_, rows8_;
  LocalTensor<float> product_[2];                        // [n, 64]
  LocalTensor<float> tile_maximum_, tile_sum_, shrink_;  // [rows]
  LocalTensor<float> spread_;                            // [rows, 8]
  LocalTensor<float> weights_;                           // [2, n, 8]
  TBuf<TPosition::VECCALC> tile_memory_, query_memory_, logits_memory_, product_memory_[2], maximum_memory_,
      sum_memory_, tile_maximum_memory_, tile_sum_memory_, shrink_memory_, spread_memory_, weighted_memory_,
      weights_memory_;
};

}  // namespace razor::ascend
