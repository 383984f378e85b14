// SPDX-License-Identifier: Apache-2.0
// Launches of the kernels on a stream. All pointers are the device's but those to structs; `tiling` is a copy of a
// completed tiling in device memory. Nothing here waits. Built with CANN only; never run on an NPU.
//
// A launch returns the status of the toolkit's launch function: 0, or why the kernel is not on the stream. What goes
// wrong while it runs shows when the stream is waited for.
#pragma once

#include "ascend/op_host/tiling.h"

namespace razor::ascend {

[[nodiscard]] Device current_device();

// states: states_floats(...) of float32, written and read by these two launches alone.
[[nodiscard]] uint32_t launch_attention(const AttentionParams& params, int64_t workers, float* states,
                                        const void* tiling, void* stream);
[[nodiscard]] uint32_t launch_append(const KvCacheView& cache, const NewTokens& tokens, int64_t workers,
                                     const void* tiling, void* stream);
// scores: partial_scores_floats(...) of float32.
[[nodiscard]] uint32_t launch_head_scores(const HeadScoresParams& params, int64_t workers, float* scores,
                                          const void* tiling, void* stream);

}  // namespace razor::ascend
