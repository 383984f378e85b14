// SPDX-License-Identifier: Apache-2.0
// Work is cut into blocks of queries of one (sequence, kv head), each walking its tokens in tiles. The cuts depend on
// shapes alone, so results do not change with the number of threads. A few queries are decode.cpp's.
#include "razor/attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "razor/cpu/kernels.h"
#include "razor/decode.h"
#include "razor/softmax_state.h"
#include "razor/tiled_scratch.h"

namespace razor {
namespace {

// Rows of a block: query tokens x group, for which keys are packed once. Packing them for 128 rows takes a sixth of the
// time with registers, a quarter with tiles of bf16.
constexpr int64_t kLeastRows = 128, kMostRows = 512;
constexpr int64_t kManyBlocks = 32;      // to make before blocks have more than the least rows
constexpr int64_t kLongPrompt = 4096;    // tokens from which on there are enough blocks of twice the most rows
constexpr int64_t kDecodedTokens = 256;  // of a quantised cache, decoded at once

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

int64_t tokens_of_block(const AttentionParams& params) {
  const int64_t group = params.num_heads / params.cache.num_kv_heads;
  const int64_t all_rows = params.cache.batch * params.num_heads * params.tokens.q_len;
  const int64_t most_rows = params.tokens.q_len < kLongPrompt ? kMostRows : 2 * kMostRows;
  return std::max<int64_t>(std::clamp(all_rows / kManyBlocks, kLeastRows, most_rows) / group, 1);
}

WorkList cut(const AttentionParams& params) {
  WorkList work;
  work.block_tokens = std::min(tokens_of_block(params), params.tokens.q_len);
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

// Of one thread.
struct Scratch {
  TiledScratch tiled;
  Floats memory;
  SoftmaxState state;       // [rows]
  float *slope, *origin;    // [rows]
  float *dropped, *scaled;  // key sum, value sum, mean key, mean value; a query
  // For the tokens of a quantised cache: rows and scales of their keys and values.
  Floats decoded;                  // [2, kDecodedTokens, head_dim]
  float *key_scale, *value_scale;  // [kDecodedTokens]

  Scratch(int64_t rows, int64_t head_dim, bool coded)
      : tiled(rows, head_dim),
        memory(SoftmaxState::floats(rows, head_dim) + 2 * rows + 5 * head_dim),
        state(memory.get(), rows),
        slope(state.weighted + rows * head_dim),
        origin(slope + rows),
        dropped(origin + rows),
        scaled(dropped + 4 * head_dim),
        decoded(coded ? 2 * kDecodedTokens * (head_dim + 1) : 0),
        key_scale(decoded.get()),
        value_scale(key_scale + kDecodedTokens) {}
};

struct Worker {
  const AttentionParams& params;
  const Block& block;
  Scratch& scratch;
  const cpu::Kernels& kernels = cpu::kernels();
  int64_t head_dim = params.cache.head_dim;
  int64_t group = params.num_heads / params.cache.num_kv_heads;

  int64_t rows() const { return (block.end - block.begin) * group; }

  // Row (query - block.begin) * group + g of the block is query head head * group + g.
  const char* query_row(int64_t r) const {
    const int64_t offset = block.row.batch_index * params.query_stride[0] +
                           (block.row.head * group + r % group) * params.query_stride[1] +
                           (block.begin + r / group) * params.query_stride[2];
    return static_cast<const char*>(params.query) + offset * element_size(params.cache.format);
  }

  void pack_queries() {
    for (int64_t r = 0; r < rows(); ++r) scratch.tiled.queries[r] = query_row(r);
    kernels.pack_queries(scratch.tiled.queries.data(), rows(), head_dim, params.cache.format, scratch.tiled.query);
  }

  // What rows of a quantised cache are decoded to: the format that queries were packed from, or float32, which is
  // packed in the same way as float16.
  KvFormat decoded_format() const { return params.cache.format == KvFormat::kBF16 ? KvFormat::kBF16 : KvFormat::kF32; }

  // Codes to rows, the first of them being column c.
  Run decode(const Run& run, int64_t c) {
    const KvFormat format = decoded_format();
    char* keys = reinterpret_cast<char*>(scratch.value_scale + kDecodedTokens);
    char* values = keys + kDecodedTokens * head_dim * element_size(format);
    const auto rows = [&](const void* codes, const void* numbers, char* to, float* scales) {
      to += c * head_dim * element_size(format);
      kernels.decode_rows(codes, numbers, run.count, head_dim, params.cache.codes, format, to, scales + c);
      return to;
    };
    return {.key = rows(run.key, run.key_numbers, keys, scratch.key_scale),
            .value = rows(run.value, run.value_numbers, values, scratch.value_scale),
            .key_stride = head_dim,
            .value_stride = head_dim,
            .count = run.count,
            .format = format};
  }

  // Which of the tokens [begin, begin + columns) the rows see.
  void see_columns(int64_t begin, int64_t columns, bool sinks) {
    int64_t r = 0;
    for (int64_t i = block.begin; i < block.end; ++i) {
      const int64_t p = block.position(i);
      const int64_t oldest = sinks ? 0 : oldest_kept(block.row, p, params.dense);
      for (int64_t g = 0; g < group; ++g, ++r) {
        scratch.tiled.first[r] = static_cast<int32_t>(std::clamp<int64_t>(oldest - begin, 0, columns));
        scratch.tiled.last[r] = static_cast<int32_t>(std::clamp<int64_t>(p + 1 - begin, 0, columns));
        scratch.slope[r] = params.alibi_slopes ? params.alibi_slopes[block.row.head * group + g] : 0.0f;
        scratch.origin[r] = static_cast<float>(p - begin);
      }
    }
  }

  // Tokens [begin, end), all sinks or all beyond the sinks.
  void attend_tokens(int64_t begin, int64_t end) {
    const bool sinks = end <= block.row.sink;
    TiledScratch& tiled = scratch.tiled;
    for (int64_t columns; begin < end; begin += columns) {
      columns = std::min(kTiledColumns, end - begin);
      bool coded = false;
      for (int64_t c = 0; c < columns;) {
        Run run = next_run(params.cache, params.tokens, block.row, begin + c, begin + columns, kDecodedTokens);
        if (c == 0 && run.key_numbers != nullptr) {
          coded = true;
          columns = std::min(columns, kDecodedTokens);
        } else if (coded != (run.key_numbers != nullptr)) {  // rows and decoded rows may differ in format
          columns = c;
          break;
        }
        if (coded) run = decode(run, c);
        const int64_t element_bytes = element_size(run.format);
        for (int64_t i = 0; i < run.count; ++i, ++c) {
          tiled.keys[c] = static_cast<const char*>(run.key) + i * run.key_stride * element_bytes;
          tiled.values[c] = static_cast<const char*>(run.value) + i * run.value_stride * element_bytes;
        }
      }
      const bool scaled = coded && params.cache.codes == KvCodes::kInt8;  // scales of int4 are 1
      see_columns(begin, columns, sinks);
      kernels.attention_block({.query = tiled.query,
                               .key_rows = tiled.keys.data(),
                               .value_rows = tiled.values.data(),
                               .key_scale = scaled ? scratch.key_scale : nullptr,
                               .value_scale = scaled ? scratch.value_scale : nullptr,
                               .first = tiled.first.data(),
                               .last = tiled.last.data(),
                               .slope = params.alibi_slopes ? scratch.slope : nullptr,
                               .origin = scratch.origin,
                               .maximum = scratch.state.maximum,
                               .sum = scratch.state.sum,
                               .weighted = scratch.state.weighted,
                               .scratch = tiled.packed,
                               .rows = rows(),
                               .columns = columns,
                               .head_dim = head_dim,
                               .format = coded ? decoded_format() : params.cache.format,
                               .scale = params.scale});
    }
  }

  void attend_visible() {
    attend_tokens(0, block.sink_end);
    attend_tokens(block.window_begin, block.window_end);
  }

  // The compensation row: for each query its own mean.
  void attend_dropped(const float* block_sums) {
    const CacheRow& row = block.row;
    const DroppedMeans means(scratch.dropped, head_dim);
    int64_t summed = means.start(params.cache, row);
    if (block_sums != nullptr) {
      std::copy_n(block_sums, 2 * head_dim, means.key_sum);  // and value_sum
      summed = oldest_kept(row, block.position(block.begin), params.dense);
    }
    for (int64_t i = block.begin; i < block.end; ++i) {
      const int64_t oldest = oldest_kept(row, block.position(i), params.dense);
      const int64_t dropped = means.move(params.cache, params.tokens, row, oldest, summed);
      if (dropped == 0) continue;
      const int64_t first_row = (i - block.begin) * group;
      absorb(means, dropped, params, query_row(first_row), scratch.scaled, first_row, scratch.state);
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
  const bool coded = params.cache.codes != KvCodes::kNone;
  const auto make_scratch = [&] { return Scratch(block_rows, head_dim, coded); };
  for_each_item(parallel_for, static_cast<int64_t>(work.blocks.size()), make_scratch, [&](int64_t i, Scratch& scratch) {
    const Block& block = work.blocks[work.order[i]];
    Worker worker{params, block, scratch};
    scratch.state.clear(block_rows, head_dim);
    worker.pack_queries();
    worker.attend_visible();
    if (block.row.compensate) {
      worker.attend_dropped(block.dropped_sums < 0 ? nullptr : sums.data() + block.dropped_sums * 2 * head_dim);
    }
    store(scratch.state, params, block.row, block.begin, block.end);
  });
}

}  // namespace razor
