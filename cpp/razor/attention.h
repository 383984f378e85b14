// SPDX-License-Identifier: Apache-2.0
// Attention of this call's queries over one layer's compressed cache and this call's own tokens.
//
// A query at position p (padding not counted) on a kv head with policy (sink, window) reads exactly the tokens
//     kept(p) = { j <= p : j < sink or p - j < window }
// and, if the head compensates and something is left over, one more row: the mean key and value of the
// dropped(p) = { j <= p } \ kept(p), with log(#dropped) added to its scaled logit (RazorAttention, equation of the
// compensation token). ALiBi subtracts slope * (p - j) from the logits of kept tokens. dense: kept(p) also holds every
// token of this call and every row the cache still has. A query that sees nothing yields zeros.
#pragma once

#include "razor/kv_cache.h"

namespace razor {

struct AttentionParams {
  const void* query;          // [batch, num_heads, q_len, head_dim] of the cache's format
  NewTokens tokens;           // keys, values and padding of this call
  KvCacheView cache;          // read only
  const float* alibi_slopes;  // [num_heads], nullable (no ALiBi)
  void* out;                  // [batch, num_heads, q_len, head_dim] contiguous, of the cache's format
  int64_t query_stride[3];    // elements: batch, head, token; the last dimension is contiguous
  int64_t num_heads;
  float scale;  // multiplies query . key before any bias
  bool dense;
};

RAZOR_API void attention(const AttentionParams& params, ParallelFor parallel_for);

}  // namespace razor
