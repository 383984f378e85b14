// SPDX-License-Identifier: Apache-2.0
// Windows of ALiBi heads from one layer's query and key projections.
//
// With S_h = Q_h K_h^T over all rows, bound_h = max(bound of the layers before, sqrt(max S_h), 0), and the window
//     msmodelslim   trunc(((bound_h + ln theta) + alpha) / slope_h), every step rounded to float32; while bound_h is 0,
//                   the sum is a double, rounded to float32 and multiplied by the rounded 1 / slope_h
//     per_head      ceil((bound_h - ln theta + alpha) / slope_h) in double, kept within 1..FULL
// S is never stored. msmodelslim ignores a head of a layer in which any product is NaN.
#pragma once

#include <cstdint>
#include <string_view>

#include "razor/check.h"
#include "razor/kv_format.h"
#include "razor/parallel.h"

namespace razor {

enum class WindowMethod { kMsmodelslim, kPerHead };

[[nodiscard]] RAZOR_API WindowMethod window_method(std::string_view name);

struct AlibiWindowsParams {
  const void* query;                       // [q_rows, num_heads, cols] of format
  const void* key;                         // [k_rows, num_heads, cols] of format
  const float* slopes;                     // [num_heads], logit per token of distance
  const float* bound;                      // [num_heads], of the layers before; nullable
  int64_t* windows;                        // [num_heads], tokens
  float* largest_bound;                    // [num_heads], with this layer
  int64_t query_stride[3], key_stride[3];  // elements: row, head, column
  int64_t q_rows, k_rows, num_heads, cols;
  KvFormat format;
  double theta, alpha;
  WindowMethod method;
};

RAZOR_API void alibi_windows(const AlibiWindowsParams& params, ParallelFor parallel_for);

}  // namespace razor
