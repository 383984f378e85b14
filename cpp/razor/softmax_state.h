// SPDX-License-Identifier: Apache-2.0
// Softmax over part of a query's tokens, as attention_block and decode_runs leave it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "razor/attention.h"
#include "razor/cpu/kernels.h"

namespace razor {

// Of `rows` queries: maximum[rows], sum[rows], weighted[rows, head_dim]; in memory that others own.
struct SoftmaxState {
  float* maximum;
  float* sum;
  float* weighted;

  static int64_t floats(int64_t rows, int64_t head_dim) { return rows * (head_dim + 2); }
  SoftmaxState(float* maximum, float* sum, float* weighted) : maximum(maximum), sum(sum), weighted(weighted) {}
  SoftmaxState(float* memory, int64_t rows) : SoftmaxState(memory, memory + rows, memory + 2 * rows) {}
  [[nodiscard]] SoftmaxState from_row(int64_t row, int64_t head_dim) const {
    return {maximum + row, sum + row, weighted + row * head_dim};
  }
  void clear(int64_t rows, int64_t head_dim) const {
    std::fill_n(maximum, rows, -std::numeric_limits<float>::infinity());
    std::fill_n(sum, rows, 0.0f);
    std::fill_n(weighted, rows * head_dim, 0.0f);
  }
};

// into := softmax over the tokens of both.
inline void merge(const SoftmaxState& from, int64_t rows, int64_t head_dim, const SoftmaxState& into) {
  for (int64_t r = 0; r < rows; ++r) {
    if (from.sum[r] == 0.0f) continue;
    const float maximum = std::max(into.maximum[r], from.maximum[r]);
    const float mine = into.sum[r] == 0.0f ? 0.0f : std::exp(into.maximum[r] - maximum);
    const float theirs = std::exp(from.maximum[r] - maximum);
    into.maximum[r] = maximum;
    into.sum[r] = mine * into.sum[r] + theirs * from.sum[r];
    for (int64_t d = 0; d < head_dim; ++d) {
      float& x = into.weighted[r * head_dim + d];
      x = mine * x + theirs * from.weighted[r * head_dim + d];
    }
  }
}

// The compensation row joins the `group` rows of one query token: one more token, of means, whose logit is
// scale * query . key_mean + log(dropped). query: of the first of these rows; scaled: [head_dim] scratch.
inline void absorb(const DroppedMeans& means, int64_t dropped, const AttentionParams& params, const char* query,
                   float* scaled, int64_t first_row, const SoftmaxState& into) {
  const cpu::Kernels& kernels = cpu::kernels();
  const int64_t head_dim = means.head_dim, group = params.num_heads / params.cache.num_kv_heads;
  const float weight = std::log(static_cast<float>(dropped));
  for (int64_t g = 0; g < group; ++g) {
    const int64_t offset = g * params.query_stride[1] * element_size(params.cache.format);
    kernels.load_row(query + offset, head_dim, params.cache.format, params.scale, scaled);
    float logit = kernels.dot(scaled, means.key_mean, head_dim, KvFormat::kF32) + weight, one = 1.0f;
    if (logit == -std::numeric_limits<float>::infinity()) continue;  // no weight
    merge({&logit, &one, means.value_mean}, 1, head_dim, into.from_row(first_row + g, head_dim));
  }
}

// The outputs of queries [begin, end) of a page-table row, whose states have taken in all of their tokens.
inline void store(const SoftmaxState& state, const AttentionParams& params, const CacheRow& row, int64_t begin,
                  int64_t end) {
  const int64_t head_dim = params.cache.head_dim, group = params.num_heads / params.cache.num_kv_heads;
  char* out = static_cast<char*>(params.out);
  for (int64_t r = 0; r < (end - begin) * group; ++r) {
    const int64_t head = row.head * group + r % group, i = begin + r / group;
    const int64_t offset = ((row.batch_index * params.num_heads + head) * params.tokens.q_len + i) * head_dim;
    const float factor = state.sum[r] == 0.0f ? 0.0f : 1.0f / state.sum[r];
    cpu::kernels().store_row(state.weighted + r * head_dim, head_dim, params.cache.format, factor,
                             out + offset * element_size(params.cache.format));
  }
}

}  // namespace razor
