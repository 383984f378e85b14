// SPDX-License-Identifier: Apache-2.0
#include "razor/head_scores.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "razor/cpu/kernels.h"
#include "razor/tiled_scratch.h"

namespace razor {
namespace {

constexpr int64_t kBlockRows = 512;  // query rows (tokens x group) for which keys are packed once

const char* token_row(const void* base, const int64_t (&stride)[3], KvFormat format, int64_t b, int64_t h, int64_t t) {
  return static_cast<const char*>(base) + (b * stride[0] + h * stride[1] + t * stride[2]) * element_size(format);
}

// Of one thread.
struct Scratch {
  TiledScratch tiled;
  std::vector<float> query;         // [rows, head_dim], scaled
  std::vector<float> maximum, sum;  // [rows]

  Scratch(int64_t rows, int64_t head_dim) : tiled(rows, head_dim), query(rows * head_dim), maximum(rows), sum(rows) {}
};

// Queries [begin, end) of one (sequence, kv head); echo[group] and induction[group] receive their sums.
void score_block(const HeadScoresParams& p, int64_t b, int64_t kv_head, int64_t begin, int64_t end, Scratch& scratch,
                 double* echo, double* induction) {
  const auto& kernels = cpu::kernels();
  const int64_t group = p.num_heads / p.num_kv_heads, rows = (end - begin) * group;
  TiledScratch& tiled = scratch.tiled;
  auto &query = scratch.query, &maximum = scratch.maximum, &sum = scratch.sum;
  const auto key = [&](int64_t t) { return token_row(p.key, p.key_stride, p.format, b, kv_head, t); };
  for (int64_t r = 0; r < rows; ++r) {
    tiled.queries[r] = token_row(p.query, p.query_stride, p.format, b, kv_head * group + r % group, begin + r / group);
    kernels.load_row(tiled.queries[r], p.head_dim, p.format, p.scale, query.data() + r * p.head_dim);
  }
  kernels.pack_queries(tiled.queries.data(), rows, p.head_dim, p.format, tiled.query);
  std::fill_n(tiled.first.data(), rows, 0);
  std::fill_n(maximum.data(), rows, -std::numeric_limits<float>::infinity());
  std::fill_n(sum.data(), rows, 0.0f);
  for (int64_t t = 0; t < end; t += kTiledColumns) {
    const int64_t columns = std::min(kTiledColumns, end - t);
    for (int64_t c = 0; c < columns; ++c) tiled.keys[c] = key(t + c);
    for (int64_t r = 0; r < rows; ++r) {
      tiled.last[r] = static_cast<int32_t>(std::clamp<int64_t>(begin + r / group + 1 - t, 0, columns));
    }
    kernels.score_block({.query = tiled.query,
                         .key_rows = tiled.keys.data(),
                         .first = tiled.first.data(),
                         .last = tiled.last.data(),
                         .maximum = maximum.data(),
                         .sum = sum.data(),
                         .scratch = tiled.packed,
                         .rows = rows,
                         .columns = columns,
                         .head_dim = p.head_dim,
                         .format = p.format,
                         .scale = p.scale});
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = begin + r / group - 1;  // row of the map without the prefix
    const auto weight = [&](int64_t j) {      // A[i, j]
      const float logit = kernels.dot(query.data() + r * p.head_dim, key(j + 1), p.head_dim, p.format);
      return std::exp(static_cast<double>(logit) - maximum[r]) / sum[r];
    };
    for (int64_t j = i % p.period; j < i; j += p.period) {
      echo[r % group] += weight(j);
      induction[r % group] += weight(j + 1);
    }
  }
}

}  // namespace

void head_scores(const HeadScoresParams& p, ParallelFor parallel_for) {
  (void)cpu::kernels();  // refuses a wrong RAZOR_ISA before anything runs in parallel
  RAZOR_CHECK(p.period >= 1, "period: expected a value >= 1, got ", p.period);
  RAZOR_CHECK((p.tokens - 1) % p.period == 0 && (p.tokens - 1) / p.period >= 2,
              "query: expected 1 + period * repeats tokens with period ", p.period, " and at least 2 repeats, got ",
              p.tokens);
  const int64_t group = p.num_heads / p.num_kv_heads;
  const int64_t block_tokens = std::max<int64_t>(1, kBlockRows / group);
  const int64_t first_query = 1 + p.period;  // the prefix and the first copy have no earlier copies
  const int64_t blocks = (p.tokens - first_query + block_tokens - 1) / block_tokens;
  const int64_t kv_rows = p.batch * p.num_kv_heads;
  std::vector<double> sums(kv_rows * blocks * 2 * group, 0.0);

  const auto make_scratch = [&] { return Scratch(block_tokens * group, p.head_dim); };
  for_each_item(parallel_for, kv_rows * blocks, make_scratch, [&](int64_t i, Scratch& scratch) {
    const int64_t row = i % kv_rows, block = blocks - 1 - i / kv_rows;  // late blocks see most keys: dearest first
    const int64_t begin = first_query + block * block_tokens;
    double* echo = sums.data() + (row * blocks + block) * 2 * group;
    score_block(p, row / p.num_kv_heads, row % p.num_kv_heads, begin, std::min(begin + block_tokens, p.tokens), scratch,
                echo, echo + group);
  });

  for (int64_t h = 0; h < p.batch * p.num_heads; ++h) {
    const int64_t row = h / group, g = h % group;
    double echo = 0.0, induction = 0.0;
    for (int64_t block = 0; block < blocks; ++block) {
      const double* block_sums = sums.data() + (row * blocks + block) * 2 * group;
      echo += block_sums[g];
      induction += block_sums[group + g];
    }
    p.echo[h] = static_cast<float>(echo / static_cast<double>(p.tokens - first_query));
    p.induction[h] = static_cast<float>(induction / static_cast<double>(p.tokens - first_query));
  }
}

}  // namespace razor
