// SPDX-License-Identifier: Apache-2.0
// Attention of a few new tokens: what attention.h says, cut by tokens of the cache instead of queries.
#pragma once

#include "razor/attention.h"

namespace razor {

inline constexpr int64_t kMostDecodeTokens = 16;  // new tokens of a call; more have enough work without such cuts

// For attention() alone, which has checked everything and zeroed the padding.
void decode(const AttentionParams& params, ParallelFor parallel_for);

}  // namespace razor
