// SPDX-License-Identifier: Apache-2.0
// Work is cut into items of one page-table row and a range of its tokens; every item serves all queries of the row, so
// that each key and value is read once. The cuts depend on shapes alone, so results do not change with the number of
// threads. Each item leaves a softmax state; the states of a row are merged in order.
#include "razor/decode.h"

#include <algorithm>
#include <memory>
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
float* scratch(int64_t floats) {
  static thread_local KeptFloats kept;
  return kept.get(floats);
}

class Worker {
 public:
  explicit Worker(const AttentionParams& params)
      : params_(params),
        head_dim_(params.cache.head_dim),
        group_(params.num_heads / params.cache.num_kv_heads),
        rows_(params.tokens.q_len * group_),
        kernel_scratch_(scratch(cpu::decode_scratch(rows_, head_dim_) + 5 * head_dim_ + rows_ +
                                SoftmaxState::floats(rows_, head_dim_))),
        means_(kernel_scratch_ + cpu::decode_scratch(rows_, head_dim_)),
        query_(means_ + 4 * head_dim_),
        slope_(query_ + head_dim_),
        bounds_(2 * rows_) {}

  // Memory for the state of an item that is the only one of its part.
  [[nodiscard]] SoftmaxState own_state() const { return {slope_ + rows_, rows_}; }

  void attend(const Part& part, const Item& item, const SoftmaxState& state) {
    part_ = &part;
    state_ = state;
    state.clear(rows(), head_dim_);
    task_ = task();
    // A single query sees all of them: one call of the kernel takes sinks and window.
    const bool alone = rows() == group_;
    see(/*sinks=*/true);
    add_runs(std::min(item.begin, part.sink_end), std::min(item.end, part.sink_end));
    if (!alone) {
      attend_runs();
      see(/*sinks=*/false);
    }
    const int64_t shift = part.window_begin - part.sink_end;
    add_runs(std::max(item.begin, part.sink_end) + shift, std::max(item.end, part.sink_end) + shift);
    attend_runs();
    if (part.row.compensate && item.end == part.visible()) attend_dropped();
  }

 private:
  [[nodiscard]] int64_t rows() const { return (params_.tokens.q_len - part_->row.pad) * group_; }

  // Row r of the part: query token r / group, head r % group.
  [[nodiscard]] const char* query_row(int64_t r) const {
    const auto& stride = params_.query_stride;
    const CacheRow& row = part_->row;
    const int64_t offset =
        row.batch_index * stride[0] + (row.head * group_ + r % group_) * stride[1] + (row.pad + r / group_) * stride[2];
    return static_cast<const char*>(params_.query) + offset * element_size(params_.cache.format);
  }

  // All rows of the part, no runs yet.
  [[nodiscard]] cpu::DecodeTask task() {
    return {.query = query_row(0),
            .runs = runs_,
            .first = bounds_.data(),
            .last = bounds_.data() + rows(),
            .slope = params_.alibi_slopes ? slope_ : nullptr,
            .maximum = state_.maximum,
            .sum = state_.sum,
            .weighted = state_.weighted,
            .scratch = kernel_scratch_,
            .query_stride = {params_.query_stride[2], params_.query_stride[1]},
            .rows = rows(),
            .group = group_,
            .head_dim = head_dim_,
            .format = params_.cache.format,
            .codes = params_.cache.codes,
            .scale = params_.scale};
  }

  // Which tokens each row sees, of the sinks or of those beyond.
  void see(bool sinks) {
    const CacheRow& row = part_->row;
    int64_t *first = bounds_.data(), *last = first + rows();
    for (int64_t r = 0; r < rows(); ++r) {
      const int64_t position = row.seen + r / group_;
      first[r] = sinks ? 0 : oldest_kept(row, position, params_.dense);
      last[r] = position + 1;
      if (params_.alibi_slopes) slope_[r] = params_.alibi_slopes[row.head * group_ + r % group_];
    }
  }

  void add_runs(int64_t begin, int64_t end) {
    for (int64_t position = begin; position < end;) {
      if (task_.num_runs == kMostRuns) attend_runs();
      const Run run = next_run(params_.cache, params_.tokens, part_->row, position, end, cpu::kTileColumns);
      runs_[task_.num_runs++] = {.key = run.key,
                                 .value = run.value,
                                 .key_numbers = run.key_numbers,
                                 .value_numbers = run.value_numbers,
                                 .key_stride = run.key_stride,
                                 .value_stride = run.value_stride,
                                 .count = run.count,
                                 .begin = position};
      position += run.count;
    }
  }

  void attend_runs() {
    if (task_.num_runs > 0) kernels_.decode_runs(task_);
    task_.num_runs = 0;
  }

  // The compensation row: for each query token its own mean.
  void attend_dropped() {
    const CacheRow& row = part_->row;
    const DroppedMeans means(means_, head_dim_);
    int64_t summed = means.start(params_.cache, row);
    for (int64_t i = 0; i < params_.tokens.q_len - row.pad; ++i) {
      const int64_t oldest = oldest_kept(row, row.seen + i, params_.dense);
      const int64_t dropped = means.move(params_.cache, params_.tokens, row, oldest, summed);
      if (dropped == 0) continue;
      absorb(means, dropped, params_, query_row(i * group_), query_, i * group_, state_);
    }
  }

  const AttentionParams& params_;
  const cpu::Kernels& kernels_ = cpu::kernels();
  int64_t head_dim_, group_, rows_;  // rows of the part with the least padding
  float* kernel_scratch_;
  float *means_, *query_, *slope_;  // [4, head_dim], [head_dim], [rows]
  std::vector<int64_t> bounds_;     // first[rows], last[rows]
  cpu::DecodeRun runs_[kMostRuns];
  const Part* part_ = nullptr;
  SoftmaxState state_{nullptr, 0};
  cpu::DecodeTask task_{};
};

}  // namespace

void decode(const AttentionParams& params, ParallelFor parallel_for) {
  const WorkList work = cut(params);
  const int64_t head_dim = params.cache.head_dim;
  const int64_t rows = params.tokens.q_len * (params.num_heads / params.cache.num_kv_heads);
  const int64_t state_floats = SoftmaxState::floats(rows, head_dim);
  const auto num_items = static_cast<int64_t>(work.items.size());
  const bool in_parts = num_items > static_cast<int64_t>(work.parts.size());
  const Floats states(in_parts ? num_items * state_floats : 0);
  const auto state = [&](int64_t item) { return SoftmaxState(states.get() + item * state_floats, rows); };
  if (work.tokens * 2 * params.cache.row().all() < kSerialBytes) parallel_for = serial_for;

  for_each_item(
      parallel_for, num_items, [&] { return Worker(params); },
      [&](int64_t i, Worker& worker) {
        const Part& part = work.parts[work.items[i].part];
        if (part.num_items > 1) return worker.attend(part, work.items[i], state(i));
        worker.attend(part, work.items[i], worker.own_state());
        store(worker.own_state(), params, part.row, part.row.pad, params.tokens.q_len);
      });
  if (!in_parts) return;

  for_each_item(parallel_for, static_cast<int64_t>(work.parts.size()), [&](int64_t p) {
    const Part& part = work.parts[p];
    if (part.num_items == 1) return;
    const SoftmaxState total = state(part.first_item);
    for (int64_t i = 1; i < part.num_items; ++i) merge(state(part.first_item + i), rows, head_dim, total);
    store(total, params, part.row, part.row.pad, params.tokens.q_len);
  });
}

}  // namespace razor
