// SPDX-License-Identifier: Apache-2.0
// Work is cut into blocks of queries of one (sequence, kv head), each walking its tokens in tiles. The cuts depend on
// shapes alone, so results do not change with the number of threads. A few queries have too few blocks: decode.cpp.
#include "razor/attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "razor/cpu/kernels.h"
#include "razor/decode.h"
#include "razor/softmax_state.h"

namespace razor {
namespace {

constexpr int64_t kBlockRows = 64;  // query rows (tokens x group) that share each loaded key

// Queries [begin, end) of one page-table row, with the tokens that any of them sees as two ranges of positions:
// the sinks, and everything from the oldest window on.
struct Block {
  CacheRow row;
  int64_t begin, end;  // query indices in this call, padding excluded
  int64_t sink_end, window_begin, window_end;
  int64_t dropped_sums;  // index of this block's sums in the workspace, -1: start from the cache's

  int64_t position(int64_t query) const { return row.seen + query - row.pad; }
  int64_t visible() const { return sink_end + window_end - window_begin; }
};

struct WorkList {
  std::vector<Block> blocks;
  std::vector<int64_t> order;  // blocks, dearest first
  int64_t block_tokens = 0;    // query tokens per block
  int64_t num_sums = 0;        // blocks that need their own dropped sums
};

WorkList cut(const AttentionParams& params) {
  const int64_t group = params.num_heads / params.cache.num_kv_heads;
  WorkList work;
  work.block_tokens = std::clamp<int64_t>(kBlockRows / group, 1, std::max<int64_t>(params.tokens.q_len, 1));
  for (int64_t r = 0; r < params.cache.batch * params.cache.num_kv_heads; ++r) {
    const CacheRow row = cache_row(params.cache, params.tokens, r);
    const bool moving = row.compensate && !params.dense;
    for (int64_t begin = row.pad; begin < params.tokens.q_len; begin += work.block_tokens) {
      Block block{.row = row, .begin = begin, .end = std::min(begin + work.block_tokens, params.tokens.q_len)};
      block.window_end = block.position(block.end);
      block.sink_end = std::min(row.sink, block.window_end);
      block.window_begin = std::min(oldest_kept(row, block.position(begin), params.dense), block.window_end);
      block.dropped_sums = moving && begin > row.pad ? work.num_sums++ : -1;
      work.blocks.push_back(block);
    }
  }
  const auto cost = [&](int64_t i) {
    const Block& block = work.blocks[i];
    return block.visible() * (block.end - block.begin);
  };
  work.order.resize(work.blocks.size());
  for (size_t i = 0; i < work.order.size(); ++i) work.order[i] = static_cast<int64_t>(i);
  std::stable_sort(work.order.begin(), work.order.end(), [&](int64_t a, int64_t b) { return cost(a) > cost(b); });
  return work;
}

// Scratch of one thread while it works on one block.
struct Scratch {
  std::vector<float> memory;
  std::vector<int32_t> columns;
  float *query, *logits, *bias, *slope, *state, *dropped;  // dropped: key sum, value sum, mean key, mean value
  int32_t *first, *last;

  Scratch(int64_t rows, int64_t head_dim) {
    const int64_t state_floats = SoftmaxState::floats(rows, head_dim);
    memory.resize(rows * (head_dim + cpu::kTileColumns + 2) + state_floats + 4 * head_dim);
    columns.resize(2 * rows);
    query = memory.data();
    logits = query + rows * head_dim;
    bias = logits + rows * cpu::kTileColumns;
    slope = bias + rows;
    first = columns.data();
    last = first + rows;
    state = slope + rows;
    dropped = state + state_floats;
  }
};

struct Worker {
  const AttentionParams& params;
  const Block& block;
  Scratch& scratch;
  SoftmaxState state;
  const cpu::Kernels& kernels = cpu::kernels();
  int64_t head_dim = params.cache.head_dim;
  int64_t group = params.num_heads / params.cache.num_kv_heads;

  // Row (query - block.begin) * group + g of the tile is query head head * group + g.
  void load_queries() {
    for (int64_t i = block.begin; i < block.end; ++i) {
      for (int64_t g = 0; g < group; ++g) {
        const int64_t offset = block.row.batch_index * params.query_stride[0] +
                               (block.row.head * group + g) * params.query_stride[1] + i * params.query_stride[2];
        kernels.load_row(static_cast<const char*>(params.query) + offset * element_size(params.cache.format), head_dim,
                         params.cache.format, params.scale, scratch.query + ((i - block.begin) * group + g) * head_dim);
      }
    }
  }

  cpu::AttentionTile tile(int64_t first_row, int64_t rows) const {
    return {.query = scratch.query + first_row * head_dim,
            .first = scratch.first,
            .last = scratch.last,
            .bias = scratch.bias,
            .slope = scratch.slope,
            .maximum = state.maximum + first_row,
            .sum = state.sum + first_row,
            .weighted = state.weighted + first_row * head_dim,
            .logits = scratch.logits,
            .rows = rows,
            .head_dim = head_dim,
            .format = params.cache.format};
  }

  // Tokens [begin, end), all sinks or all beyond the sinks.
  void attend_tokens(int64_t begin, int64_t end) {
    const bool sinks = end <= block.row.sink;
    while (begin < end) {
      const Run run = next_run(params.cache, params.tokens, block.row, begin, end, cpu::kTileColumns);
      cpu::AttentionTile t = tile(0, (block.end - block.begin) * group);
      t.key = run.key, t.value = run.value;
      t.key_stride = run.key_stride, t.value_stride = run.value_stride;
      t.columns = run.count;
      for (int64_t r = 0; r < t.rows; ++r) {
        const int64_t p = block.position(block.begin + r / group);
        const int64_t oldest = sinks ? 0 : oldest_kept(block.row, p, params.dense);
        scratch.first[r] = static_cast<int32_t>(std::clamp<int64_t>(oldest - begin, 0, run.count));
        scratch.last[r] = static_cast<int32_t>(std::clamp<int64_t>(p + 1 - begin, 0, run.count));
        scratch.slope[r] = params.alibi_slopes ? params.alibi_slopes[block.row.head * group + r % group] : 0.0f;
        scratch.bias[r] = -scratch.slope[r] * static_cast<float>(p - begin);
      }
      kernels.attention_tile(t);
      begin += run.count;
    }
  }

  void attend_visible() {
    attend_tokens(0, block.sink_end);
    attend_tokens(block.window_begin, block.window_end);
  }

  // The compensation row: for each query its own mean, one tile of `group` rows by one column.
  void attend_dropped(const float* block_sums) {
    const CacheRow& row = block.row;
    float *key_sum = scratch.dropped, *value_sum = key_sum + head_dim;
    float *key_mean = value_sum + head_dim, *value_mean = key_mean + head_dim;
    int64_t summed = std::max(row.sink, row.seen - row.window);  // the sums hold tokens [sink, summed)
    const float* start = params.cache.key_sum + row.table_row * head_dim;
    const float* value_start = params.cache.value_sum + row.table_row * head_dim;
    if (block_sums != nullptr) {
      start = block_sums, value_start = block_sums + head_dim;
      summed = oldest_kept(row, block.position(block.begin), params.dense);
    }
    std::copy_n(start, head_dim, key_sum);
    std::copy_n(value_start, head_dim, value_sum);
    std::fill_n(scratch.first, group, 0);
    std::fill_n(scratch.last, group, 1);
    std::fill_n(scratch.slope, group, 0.0f);
    for (int64_t i = block.begin; i < block.end; ++i) {
      // A window of 0 drops the query's own token too.
      const int64_t oldest = oldest_kept(row, block.position(i), params.dense);
      add_tokens(params.cache, params.tokens, row, summed, oldest, key_sum, value_sum);
      summed = std::max(summed, oldest);
      const int64_t dropped = summed - row.sink;
      if (dropped == 0) continue;
      kernels.load_row(key_sum, head_dim, KvFormat::kF32, 1.0f / static_cast<float>(dropped), key_mean);
      kernels.load_row(value_sum, head_dim, KvFormat::kF32, 1.0f / static_cast<float>(dropped), value_mean);
      std::fill_n(scratch.bias, group, std::log(static_cast<float>(dropped)));
      cpu::AttentionTile t = tile((i - block.begin) * group, group);
      t.key = key_mean, t.value = value_mean;
      t.columns = 1;
      t.format = KvFormat::kF32;
      kernels.attention_tile(t);
    }
  }

  void store() const {
    char* out = static_cast<char*>(params.out);
    for (int64_t r = 0; r < (block.end - block.begin) * group; ++r) {
      const int64_t head = block.row.head * group + r % group, i = block.begin + r / group;
      const int64_t offset = ((block.row.batch_index * params.num_heads + head) * params.tokens.q_len + i) * head_dim;
      const float factor = state.sum[r] == 0.0f ? 0.0f : 1.0f / state.sum[r];
      kernels.store_row(state.weighted + r * head_dim, head_dim, params.cache.format, factor,
                        out + offset * element_size(params.cache.format));
    }
  }
};

// Sums of the tokens dropped before the first query of each block but the first of a row: sums[num_sums, 2, head_dim].
void sum_dropped(const AttentionParams& params, const WorkList& work, ParallelFor parallel_for, float* sums) {
  const int64_t head_dim = params.cache.head_dim;
  std::vector<int64_t> starts;  // the first block of each page-table row
  for (size_t i = 0; i < work.blocks.size(); ++i) {
    if (work.blocks[i].begin == work.blocks[i].row.pad) starts.push_back(static_cast<int64_t>(i));
  }
  for_each_item(parallel_for, static_cast<int64_t>(starts.size()), [&](int64_t s) {
    const CacheRow& row = work.blocks[starts[s]].row;
    const float* key_before = params.cache.key_sum + row.table_row * head_dim;
    const float* value_before = params.cache.value_sum + row.table_row * head_dim;
    int64_t summed = std::max(row.sink, row.seen - row.window);
    for (size_t i = starts[s] + 1; i < work.blocks.size() && work.blocks[i].dropped_sums >= 0; ++i) {
      float* key_sum = sums + work.blocks[i].dropped_sums * 2 * head_dim;
      float* value_sum = key_sum + head_dim;
      std::copy_n(key_before, head_dim, key_sum);
      std::copy_n(value_before, head_dim, value_sum);
      const int64_t oldest = oldest_kept(row, work.blocks[i].position(work.blocks[i].begin), /*dense=*/false);
      add_tokens(params.cache, params.tokens, row, summed, oldest, key_sum, value_sum);
      summed = std::max(summed, oldest);
      key_before = key_sum, value_before = value_sum;
    }
  });
}

void zero_padding(const AttentionParams& params) {
  if (params.tokens.pad == nullptr) return;
  const int64_t row_bytes = params.cache.head_dim * element_size(params.cache.format);
  for (int64_t bh = 0; bh < params.cache.batch * params.num_heads; ++bh) {
    std::fill_n(static_cast<char*>(params.out) + bh * params.tokens.q_len * row_bytes,
                params.tokens.pad[bh / params.num_heads] * row_bytes, 0);
  }
}

}  // namespace

void attention(const AttentionParams& params, ParallelFor parallel_for) {
  (void)cpu::kernels();  // refuses a wrong RAZOR_ISA before anything runs in parallel
  check_cache(params.cache, params.tokens, /*with_new_tokens=*/false);
  zero_padding(params);
  if (params.tokens.q_len <= kMostDecodeTokens) return decode(params, parallel_for);
  const int64_t group = params.num_heads / params.cache.num_kv_heads, head_dim = params.cache.head_dim;
  const WorkList work = cut(params);
  std::vector<float> sums(work.num_sums * 2 * head_dim);
  if (work.num_sums > 0) sum_dropped(params, work, parallel_for, sums.data());

  const int64_t block_rows = work.block_tokens * group;
  for_each_item(parallel_for, static_cast<int64_t>(work.blocks.size()), [&](int64_t i) {
    const Block& block = work.blocks[work.order[i]];
    Scratch scratch(block_rows, head_dim);
    Worker worker{params, block, scratch, SoftmaxState(scratch.state, block_rows)};
    worker.state.clear(block_rows, head_dim);
    worker.load_queries();
    worker.attend_visible();
    if (block.row.compensate) {
      worker.attend_dropped(block.dropped_sums < 0 ? nullptr : sums.data() + block.dropped_sums * 2 * head_dim);
    }
    worker.store();
  });
}

}  // namespace razor
