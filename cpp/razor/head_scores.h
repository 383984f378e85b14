// SPDX-License-Identifier: Apache-2.0
// Echo and induction scores of attention heads on a prompt of one prefix token and `period` tokens repeated.
//
// With A the causal softmax map without the prefix's row and column, n = period * repeats tokens, and for each row
// i >= period the earlier copies J(i) = { i mod period + period * t < i }:
//     echo      = mean over i of sum over j in J(i) of A[i, j]
//     induction = mean over i of sum over j in J(i) of A[i, j + 1]
// Keys stream past each block of queries; only running softmax states are kept, O(tokens) memory, no map.
#pragma once

#include <cstdint>

#include "razor/check.h"
#include "razor/kv_format.h"
#include "razor/parallel.h"

namespace razor {

struct HeadScoresParams {
  const void* query;  // [batch, num_heads, tokens, head_dim] of format, tokens = 1 + period * repeats
  const void* key;    // [batch, num_kv_heads, tokens, head_dim] of format
  float* echo;        // [batch, num_heads]
  float* induction;   // [batch, num_heads]
  int64_t query_stride[3], key_stride[3];  // elements: batch, head, token; the last dimension is contiguous
  int64_t batch, num_heads, num_kv_heads, tokens, head_dim;
  int64_t period;  // tokens
  KvFormat format;
  float scale;  // multiplies query . key
};

RAZOR_API void head_scores(const HeadScoresParams& params, ParallelFor parallel_for);

}  // namespace razor
