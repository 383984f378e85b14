// SPDX-License-Identifier: Apache-2.0
#include "razor/alibi_windows.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "razor/cpu/kernels.h"
#include "razor/floats.h"
#include "razor/kv_cache.h"

namespace razor {
namespace {

constexpr int64_t kBlockElements = 2560 * 128;  // of packed query rows: they stay in the L2 cache

const char* head_start(const void* base, const int64_t (&stride)[3], KvFormat format, int64_t row, int64_t head) {
  return static_cast<const char*>(base) + (row * stride[0] + head * stride[1]) * element_size(format);
}

// max over i, j of S_h[i, j] for each head, NaN if one entry is NaN.
std::vector<float> largest_products(const AlibiWindowsParams& p, ParallelFor parallel_for) {
  const int64_t block_rows = std::clamp<int64_t>(kBlockElements / p.cols, 1, p.q_rows);
  const int64_t blocks = (p.q_rows + block_rows - 1) / block_rows;
  std::vector<float> largest(p.num_heads * blocks);
  for_each_item(parallel_for, p.num_heads * blocks, [&](int64_t item) {
    const int64_t head = item / blocks, row = item % blocks * block_rows;
    const int64_t rows = std::min(block_rows, p.q_rows - row);
    const Floats scratch(cpu::product_scratch(rows, p.k_rows, p.cols));
    largest[item] = cpu::kernels().largest_product({.left = head_start(p.query, p.query_stride, p.format, row, head),
                                                    .right = head_start(p.key, p.key_stride, p.format, /*row=*/0, head),
                                                    .scratch = scratch.get(),
                                                    .left_stride = {p.query_stride[0], p.query_stride[2]},
                                                    .right_stride = {p.key_stride[0], p.key_stride[2]},
                                                    .left_rows = rows,
                                                    .right_rows = p.k_rows,
                                                    .cols = p.cols,
                                                    .format = p.format});
  });
  for (int64_t head = 0; head < p.num_heads; ++head) {
    const float* of_head = largest.data() + head * blocks;
    const bool nan = std::any_of(of_head, of_head + blocks, [](float x) { return std::isnan(x); });
    largest[head] = nan ? std::numeric_limits<float>::quiet_NaN() : *std::max_element(of_head, of_head + blocks);
  }
  largest.resize(p.num_heads);
  return largest;
}

// Without the sign that a NaN may have.
float printable(float x) { return std::isnan(x) ? std::numeric_limits<float>::quiet_NaN() : x; }

int64_t window_of_msmodelslim(float bound, float slope, double theta, double alpha, int64_t head) {
  const double log_theta = std::log(theta);
  const float window = bound > 0.0f ? ((bound + static_cast<float>(log_theta)) + static_cast<float>(alpha)) / slope
                                    : static_cast<float>(log_theta + alpha) * (1.0f / slope);
  RAZOR_CHECK(std::fabs(window) < 0x1p63f, "slopes: expected windows within int64, got ", window, " for head ", head);
  return static_cast<int64_t>(window);
}

int64_t window_per_head(float bound, float slope, double theta, double alpha) {
  const double window = std::ceil((bound - std::log(theta) + alpha) / slope);
  return static_cast<int64_t>(std::clamp<double>(window, 1, kFull));
}

}  // namespace

WindowMethod window_method(std::string_view name) {
  if (name == "msmodelslim") return WindowMethod::kMsmodelslim;
  if (name == "per_head") return WindowMethod::kPerHead;
  detail::fail("method: expected msmodelslim or per_head, got ", name);
}

void alibi_windows(const AlibiWindowsParams& p, ParallelFor parallel_for) {
  (void)cpu::kernels();  // refuses a wrong RAZOR_ISA before anything runs in parallel
  RAZOR_CHECK(p.theta > 0 && p.theta <= 1, "theta: expected a value > 0 and <= 1, got ",
              std::isnan(p.theta) ? std::numeric_limits<double>::quiet_NaN() : p.theta);
  RAZOR_CHECK(p.alpha >= 0 && std::isfinite(p.alpha), "alpha: expected a finite value >= 0, got ",
              std::isnan(p.alpha) ? std::numeric_limits<double>::quiet_NaN() : p.alpha);
  for (int64_t h = 0; h < p.num_heads; ++h) {
    RAZOR_CHECK(p.slopes[h] > 0, "slopes: expected values > 0, got ", printable(p.slopes[h]), " for head ", h);
    RAZOR_CHECK(std::isfinite(p.slopes[h]), "slopes: expected finite values, got ", p.slopes[h], " for head ", h);
  }
  for (int64_t h = 0; p.bound != nullptr && h < p.num_heads; ++h) {
    RAZOR_CHECK(p.bound[h] >= 0 && std::isfinite(p.bound[h]), "bound: expected finite values >= 0, got ",
                printable(p.bound[h]), " for head ", h);
  }
  const std::vector<float> largest = largest_products(p, parallel_for);
  for (int64_t h = 0; h < p.num_heads; ++h) {
    const bool fits = p.method == WindowMethod::kPerHead ? std::isfinite(largest[h]) : !(largest[h] == INFINITY);
    RAZOR_CHECK(fits, "query: expected finite products with key, got ", printable(largest[h]), " in head ", h);
    const float before = p.bound == nullptr ? 0.0f : p.bound[h];
    const float bound = largest[h] > 0 ? std::max(before, std::sqrt(largest[h])) : before;  // NaN is ignored
    p.windows[h] = p.method == WindowMethod::kPerHead ? window_per_head(bound, p.slopes[h], p.theta, p.alpha)
                                                      : window_of_msmodelslim(bound, p.slopes[h], p.theta, p.alpha, h);
    p.largest_bound[h] = bound;
  }
}

}  // namespace razor
