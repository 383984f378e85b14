// SPDX-License-Identifier: Apache-2.0
#include "ascend/op_host/tiling.h"

#include <initializer_list>

#include "razor/check.h"

namespace razor::ascend {
namespace {

constexpr int64_t kTileTokens[] = {64, 32, 16};  // a page is a multiple of 16 rows
constexpr int64_t kMostHeadDim = 256;

void check_head_dim(int64_t head_dim) {
  RAZOR_CHECK(head_dim > 0 && head_dim % 16 == 0 && head_dim <= kMostHeadDim,
              "query: expected head_dim a multiple of 16 up to ", kMostHeadDim, " on an NPU, got ", head_dim);
}

// A copy skips from row to row, never back.
void check_stride(const char* name, int64_t stride, int64_t head_dim, int64_t rows) {
  RAZOR_CHECK(rows <= 1 || stride >= head_dim, name, ": expected rows that do not overlap on an NPU, got stride ",
              stride);
}

int64_t extent(std::initializer_list<int64_t> sizes, const int64_t (&stride)[3], int64_t head_dim) {
  int64_t last = head_dim, i = 0;
  for (const int64_t size : sizes) {
    if (size == 0) return 0;
    last += (size - 1) * stride[i++];
  }
  return last;
}

void complete_tokens(CacheTiling& t) {
  check_head_dim(t.head_dim);
  RAZOR_CHECK(t.page_size > 0 && t.page_size % 16 == 0,
              "key_pages: expected a page_size that is a multiple of 16, got ", t.page_size);
  check_stride("key", t.key_stride[2], t.head_dim, t.q_len);
  check_stride("value", t.value_stride[2], t.head_dim, t.q_len);
  t.key_elements = extent({t.batch, t.num_kv_heads, t.q_len}, t.key_stride, t.head_dim);
  t.value_elements = extent({t.batch, t.num_kv_heads, t.q_len}, t.value_stride, t.head_dim);
}

// Largest tile that leaves room for `rows` query rows, at most the rows of the tile: the queries are loaded through it.
template <class Bytes>
void fit(const Device& device, int64_t rows, int64_t& tile_tokens, int64_t& block_rows, Bytes bytes) {
  rows = smaller(larger(rows, 1), kMostBlockRows);
  for (const int64_t n : kTileTokens) {
    tile_tokens = n;
    block_rows = rows;
    if (bytes(n, rows) <= device.ub_bytes) return;
  }
  while (block_rows > 1 && bytes(tile_tokens, block_rows) > device.ub_bytes) --block_rows;
  RAZOR_CHECK(bytes(tile_tokens, block_rows) <= device.ub_bytes, "ub_bytes: expected at least ",
              bytes(tile_tokens, block_rows), ", got ", device.ub_bytes);
}

void copy3(const int64_t (&from)[3], int64_t (&to)[3]) {
  for (int i = 0; i < 3; ++i) to[i] = from[i];
}

}  // namespace

CacheTiling tiling_of(const KvCacheView& cache, const NewTokens& tokens) {
  CacheTiling t{.batch = cache.batch,
                .num_kv_heads = cache.num_kv_heads,
                .head_dim = cache.head_dim,
                .num_pages = cache.num_pages,
                .page_size = cache.page_size,
                .max_pages = cache.max_pages,
                .q_len = tokens.q_len,
                .has_pad = tokens.pad != nullptr};
  copy3(tokens.key_stride, t.key_stride);
  copy3(tokens.value_stride, t.value_stride);
  return t;
}

AttentionTiling tiling_of(const AttentionParams& params) {
  AttentionTiling t{.cache = tiling_of(params.cache, params.tokens),
                    .num_heads = params.num_heads,
                    .has_slopes = params.alibi_slopes != nullptr,
                    .dense = params.dense,
                    .scale = params.scale};
  copy3(params.query_stride, t.query_stride);
  return t;
}

HeadScoresTiling tiling_of(const HeadScoresParams& params) {
  HeadScoresTiling t{.batch = params.batch,
                     .num_heads = params.num_heads,
                     .num_kv_heads = params.num_kv_heads,
                     .tokens = params.tokens,
                     .head_dim = params.head_dim,
                     .period = params.period,
                     .scale = params.scale};
  copy3(params.query_stride, t.query_stride);
  copy3(params.key_stride, t.key_stride);
  return t;
}

void complete(const Device& device, AttentionTiling& t) {
  complete_tokens(t.cache);
  t.group = t.num_heads / t.cache.num_kv_heads;
  check_stride("query", t.query_stride[1], t.cache.head_dim, t.group);
  t.query_elements = extent({t.cache.batch, t.num_heads, t.cache.q_len}, t.query_stride, t.cache.head_dim);
  fit(device, t.cache.q_len * t.group, t.cache.tile_tokens, t.block_rows,
      [&](int64_t n, int64_t rows) { return attention_ub_bytes(n, rows, t.cache.head_dim); });
  t.blocks_per_row = divide_up(t.cache.q_len * t.group, t.block_rows);
  t.cache.workers = device.vector_cores;
}

void complete(const Device& device, CacheTiling& t) {
  complete_tokens(t);
  for (const int64_t n : kTileTokens) {
    t.tile_tokens = n;
    if (append_ub_bytes(n, t.head_dim) <= device.ub_bytes) break;
  }
  t.workers = smaller(device.vector_cores, 2 * t.batch * t.num_kv_heads);
}

void complete(const Device& device, HeadScoresTiling& t) {
  check_head_dim(t.head_dim);
  RAZOR_CHECK(t.period >= 1, "period: expected a value >= 1, got ", t.period);
  RAZOR_CHECK((t.tokens - 1) % t.period == 0 && (t.tokens - 1) / t.period >= 2,
              "query: expected 1 + period * repeats tokens with period ", t.period, " and at least 2 repeats, got ",
              t.tokens);
  t.group = t.num_heads / t.num_kv_heads;
  check_stride("query", t.query_stride[1], t.head_dim, t.group);
  check_stride("key", t.key_stride[2], t.head_dim, t.tokens);
  t.query_elements = extent({t.batch, t.num_heads, t.tokens}, t.query_stride, t.head_dim);
  t.key_elements = extent({t.batch, t.num_kv_heads, t.tokens}, t.key_stride, t.head_dim);
  const int64_t rows = (t.tokens - 1 - t.period) * t.group;
  fit(device, rows, t.tile_tokens, t.block_rows,
      [&](int64_t n, int64_t rows) { return head_scores_ub_bytes(n, rows, t.head_dim); });
  t.blocks_per_row = divide_up(rows, t.block_rows);
  t.workers = smaller(device.vector_cores, t.batch * t.num_kv_heads * t.blocks_per_row);
}

int64_t states_floats(const AttentionTiling& t) {
  return 2 * t.cache.workers * state_floats(t.block_rows, t.cache.head_dim);
}

int64_t partial_scores_floats(const HeadScoresTiling& t) {
  return t.batch * t.num_kv_heads * 2 * t.blocks_per_row * round_up(t.block_rows, 8);
}

}  // namespace razor::ascend
