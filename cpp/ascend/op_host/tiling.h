// SPDX-License-Identifier: Apache-2.0
// What the host decides before a launch, from shapes alone: tile and block sizes that fit the on-chip memory, the
// number of workers, strides. No CANN here: core counts and memory sizes are arguments.
#pragma once

#include "ascend/op_host/work_list.h"
#include "razor/attention.h"
#include "razor/head_scores.h"

namespace razor::ascend {

struct Device {
  int64_t vector_cores;
  int64_t ub_bytes;  // of one vector core that a kernel may use
};

// Shapes and strides of a call.
CacheTiling tiling_of(const KvCacheView& cache, const NewTokens& tokens);
AttentionTiling tiling_of(const AttentionParams& params);
HeadScoresTiling tiling_of(const HeadScoresParams& params);

// Completes a tiling whose shapes and strides are filled in: tile_tokens, block_rows, blocks_per_row, workers, group
// and the element counts. Throws razor::Error for what the kernels do not take: `<argument>: expected <what>, got
// <actual>`.
void complete(const Device& device, AttentionTiling& tiling);
void complete(const Device& device, CacheTiling& tiling);  // of append
void complete(const Device& device, HeadScoresTiling& tiling);

// float32 numbers that attention and combine share, and that head_scores writes: [batch * num_kv_heads, 2,
// blocks_per_row, block_rows rounded up to 8], the echo and the induction sum of every query row.
int64_t states_floats(const AttentionTiling& tiling);
int64_t partial_scores_floats(const HeadScoresTiling& tiling);

}  // namespace razor::ascend
