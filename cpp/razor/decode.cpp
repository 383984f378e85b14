// SPDX-License-Identifier: Apache-2.0
// Work is cut into items of one page-table row and a range of its tokens; every item serves all queries of the row, so
// that each key and value is read once. The cuts depend on shapes alone, so results do not change with the number of
// threads. Each item leaves a softmax state; the states of a row are merged in order.
#include "razor/decode.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "razor/cpu/kernels.h"
#include "razor/floats.h"
#include "razor/softmax_state.h"

namespace razor {
namespace {

constexpr int64_t kItemTokens = 1024;
constexpr int64_t kMostRuns = 32;  // of one kernel call

// A page-table row with the tokens that any query sees: the sinks, and everything from the oldest window on.
struct Part {
  CacheRow row;
  int64_t sink_end, window_begin, window_end;
  int64_t first_item, num_items;

  int64_t visible() const { return sink_end + window_end - window_begin; }
};

struct Item {
  int64_t part;
  int64_t begin, end;  // of the part's visible tokens, sinks first
};

struct WorkList {
  std::vector<Part> parts;  // one for each page-table row with queries
  std::vector<Item> items;  // in order of parts
  int64_t tokens = 0;       // of all items
};

WorkList cut(const AttentionParams& params) {
  WorkList work;
  const int64_t table_rows = params.cache.batch * params.cache.num_kv_heads;
  work.parts.reserve(table_rows);
  work.items.reserve(table_rows);
  for (int64_t r = 0; r < table_rows; ++r) {
    const CacheRow row = cache_row(params.cache, params.tokens, r);
    const int64_t queries = params.tokens.q_len - row.pad;
    if (queries == 0) continue;
    Part part{.row = row, .window_end = row.seen + queries, .first_item = static_cast<int64_t>(work.items.size())};
    part.sink_end = std::min(row.sink, part.window_end);
    part.window_begin = std::min(oldest_kept(row, row.seen, params.dense), part.window_end);
    for (int64_t t = 0; t == 0 || t < part.visible(); t += kItemTokens) {
      work.items.push_back({.part = static_cast<int64_t>(work.parts.size()),
                            .begin = t,
                            .end = std::min(t + kItemTokens, part.visible())});
    }
    part.num_items = static_cast<int64_t>(work.items.size()) - part.first_item;
    work.tokens += part.visible();
    work.parts.push_back(part);
  }
  return work;
}

// What one thread needs for any item.
class Worker {
 public:
  explicit Worker(const AttentionParams& params)
      : params_(params),
        head_dim_(params.cache.head_dim),
        group_(params.num_heads / params.cache.num_kv_heads),
        rows_(params.tokens.q_len * group_),
        floats_(cpu::decode_scratch(rows_, head_dim_) + 4 * head_dim_ + rows_),
        bounds_(2 * rows_) {}

  void attend(const Part& part, const Item& item, const SoftmaxState& state) {
    part_ = &part;
    state_ = state;
    state.clear(rows(), head_dim_);
    attend_tokens(std::min(item.begin, part.sink_end), std::min(item.end, part.sink_end));
    const int64_t shift = part.window_begin - part.sink_end;
    attend_tokens(std::max(item.begin, part.sink_end) + shift, std::max(item.end, part.sink_end) + shift);
    if (part.row.compensate && item.end == part.visible()) attend_dropped();
  }

 private:
  [[nodiscard]] int64_t rows() const { return (params_.tokens.q_len - part_->row.pad) * group_; }

  // Rows [first_row, first_row + rows) of the part; runs and visible tokens are still missing.
  [[nodiscard]] cpu::DecodeTask task(int64_t first_row, int64_t rows) const {
    const CacheRow& row = part_->row;
    const auto& stride = params_.query_stride;
    const int64_t offset =
        row.batch_index * stride[0] + row.head * group_ * stride[1] + (row.pad + first_row / group_) * stride[2];
    return {.query = static_cast<const char*>(params_.query) + offset * element_size(params_.cache.format),
            .maximum = state_.maximum + first_row,
            .sum = state_.sum + first_row,
            .weighted = state_.weighted + first_row * head_dim_,
            .scratch = floats_.get(),
            .query_stride = {stride[2], stride[1]},
            .rows = rows,
            .group = group_,
            .head_dim = head_dim_,
            .query_format = params_.cache.format,
            .format = params_.cache.format,
            .scale = params_.scale};
  }

  // Tokens [begin, end), all sinks or all beyond the sinks.
  void attend_tokens(int64_t begin, int64_t end) {
    if (begin >= end) return;
    const CacheRow& row = part_->row;
    cpu::DecodeTask t = task(0, rows());
    int64_t *first = bounds_.data(), *last = first + t.rows;
    float* slope = floats_.get() + cpu::decode_scratch(rows_, head_dim_) + 4 * head_dim_;
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t position = row.seen + r / group_;
      first[r] = end <= row.sink ? 0 : oldest_kept(row, position, params_.dense) - begin;
      last[r] = position + 1 - begin;
      if (params_.alibi_slopes) slope[r] = params_.alibi_slopes[row.head * group_ + r % group_];
    }
    t.first = first, t.last = last;
    t.slope = params_.alibi_slopes ? slope : nullptr;
    cpu::DecodeRun runs[kMostRuns];
    t.runs = runs;
    for (int64_t position = begin; position < end;) {
      const Run run = next_run(params_.cache, params_.tokens, row, position, end, cpu::kTileColumns);
      runs[t.num_runs++] = {.key = run.key,
                            .value = run.value,
                            .key_stride = run.key_stride,
                            .value_stride = run.value_stride,
                            .count = run.count,
                            .begin = position - begin};
      position += run.count;
      if (t.num_runs < kMostRuns && position < end) continue;
      kernels_.decode_runs(t);
      t.num_runs = 0;
    }
  }

  // The compensation row: for each query token its own mean, one column.
  void attend_dropped() {
    const CacheRow& row = part_->row;
    const DroppedMeans means(floats_.get() + cpu::decode_scratch(rows_, head_dim_), head_dim_);
    int64_t summed = means.start(params_.cache, row);
    int64_t *first = bounds_.data(), *last = first + group_;
    std::fill_n(first, group_, 0);
    std::fill_n(last, group_, 1);
    const cpu::DecodeRun mean = {.key = means.key_mean,
                                 .value = means.value_mean,
                                 .key_stride = head_dim_,
                                 .value_stride = head_dim_,
                                 .count = 1};
    for (int64_t i = 0; i < params_.tokens.q_len - row.pad; ++i) {
      const int64_t oldest = oldest_kept(row, row.seen + i, params_.dense);
      const int64_t dropped = means.move(params_.cache, params_.tokens, row, oldest, summed);
      if (dropped == 0) continue;
      cpu::DecodeTask t = task(i * group_, group_);
      t.first = first, t.last = last;
      t.runs = &mean, t.num_runs = 1;
      t.format = KvFormat::kF32;
      t.bias = std::log(static_cast<float>(dropped));
      kernels_.decode_runs(t);
    }
  }

  const AttentionParams& params_;
  const cpu::Kernels& kernels_ = cpu::kernels();
  int64_t head_dim_, group_, rows_;  // rows of the part with the least padding
  Floats floats_;                    // kernel's scratch, key sum, value sum, mean key, mean value, slopes
  std::vector<int64_t> bounds_;      // first[rows], last[rows]
  const Part* part_ = nullptr;
  SoftmaxState state_{nullptr, 0};
};

}  // namespace

void decode(const AttentionParams& params, ParallelFor parallel_for) {
  const WorkList work = cut(params);
  const int64_t head_dim = params.cache.head_dim;
  const int64_t rows = params.tokens.q_len * (params.num_heads / params.cache.num_kv_heads);
  const int64_t state_floats = SoftmaxState::floats(rows, head_dim);
  const auto num_items = static_cast<int64_t>(work.items.size());
  const Floats states(num_items * state_floats);
  const auto state = [&](int64_t item) { return SoftmaxState(states.get() + item * state_floats, rows); };
  if (work.tokens * 2 * head_dim * element_size(params.cache.format) < kSerialBytes) parallel_for = serial_for;

  for_each_item(
      parallel_for, num_items, [&] { return Worker(params); },
      [&](int64_t i, Worker& worker) {
        const Part& part = work.parts[work.items[i].part];
        worker.attend(part, work.items[i], state(i));
        if (part.num_items == 1) store(state(i), params, part.row, part.row.pad, params.tokens.q_len);
      });
  if (num_items == static_cast<int64_t>(work.parts.size())) return;

  for_each_item(parallel_for, static_cast<int64_t>(work.parts.size()), [&](int64_t p) {
    const Part& part = work.parts[p];
    if (part.num_items == 1) return;
    const SoftmaxState total = state(part.first_item);
    for (int64_t i = 1; i < part.num_items; ++i) merge(state(part.first_item + i), rows, head_dim, total);
    store(total, params, part.row, part.row.pad, params.tokens.q_len);
  });
}

}  // namespace razor
