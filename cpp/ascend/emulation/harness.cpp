// SPDX-License-Identifier: Apache-2.0
// Emulation of a subset of Ascend C for tests; not CANN. A C interface for Python: launches of the emulated kernels,
// and the host's tiling. Every function returns 0, or 1 with a message.
#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>
#include <utility>

#include "ascend/op_host/tiling.h"
#include "machine.h"
#include "self_test.h"

using Address = uint8_t*;  // a kernel's argument; the kernels' own name for it is a macro

namespace {

namespace emu = razor::emulation;

struct Kernel {
  const char* name;
  int arguments;
  void (*run)(Address* arguments);
};

template <auto kernel, class... Arguments, size_t... i>
void call(void (*)(Arguments...), Address* arguments, std::index_sequence<i...>) {
  kernel(arguments[i]...);
}

template <class... Arguments>
constexpr int count_arguments(void (*)(Arguments...)) {
  return sizeof...(Arguments);
}

template <auto kernel>
constexpr Kernel named(const char* name) {
  constexpr int kCount = count_arguments(kernel);
  return {name, kCount,
          [](Address* arguments) { call<kernel>(kernel, arguments, std::make_index_sequence<kCount>()); }};
}

}  // namespace

// As the kernels' sources define them: address after address.
#define A Address
#define RAZOR_KERNELS(type)                                                                  \
  extern "C" void razor_attention_##type(A, A, A, A, A, A, A, A, A, A, A, A, A, A, A, A, A); \
  extern "C" void razor_combine_##type(A, A, A, A, A, A, A, A);                              \
  extern "C" void razor_append_##type(A, A, A, A, A, A, A, A, A, A, A, A, A);                \
  extern "C" void razor_head_scores_##type(A, A, A, A);
RAZOR_KERNELS(f16)
RAZOR_KERNELS(bf16)
#undef RAZOR_KERNELS
#undef A

namespace {

#define RAZOR_NAMED(kernel) named<kernel>(#kernel)
constexpr Kernel kKernels[] = {RAZOR_NAMED(razor_attention_f16),   RAZOR_NAMED(razor_attention_bf16),
                               RAZOR_NAMED(razor_combine_f16),     RAZOR_NAMED(razor_combine_bf16),
                               RAZOR_NAMED(razor_append_f16),      RAZOR_NAMED(razor_append_bf16),
                               RAZOR_NAMED(razor_head_scores_f16), RAZOR_NAMED(razor_head_scores_bf16)};

template <class F>
int guarded(char* error, F body) {
  constexpr int kMessageBytes = 512;
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    std::snprintf(error, kMessageBytes, "%s", e.what());
  }
  emu::set_machine(nullptr);
  return 1;
}

struct Rows {
  const razor::ascend::CacheTiling& tiling;
  const int64_t *seen, *pad;
  const int32_t *sink_size, *window_size;
  const uint8_t* compensate;

  [[nodiscard]] razor::ascend::CacheRow row(int64_t table_row) const {
    const int64_t b = table_row / tiling.num_kv_heads, h = table_row % tiling.num_kv_heads;
    return {.batch_index = b,
            .head = h,
            .table_row = table_row,
            .sink = sink_size[h],
            .window = window_size[h],
            .seen = seen[b],
            .pad = pad == nullptr ? 0 : pad[b],
            .compensate = compensate[h] != 0 && window_size[h] != razor::ascend::kFull};
  }
};

}  // namespace

#define RAZOR_EXPORT extern "C" __attribute__((visibility("default")))

struct RazorBuffer {
  const char* name;
  uint8_t* data;
  int64_t bytes, writable;
};

struct RazorCounters {
  int64_t repeats, instructions, barriers, copies, bytes_in, bytes_out, ub_bytes;
};

// order: 0 forward, 1 reversed, otherwise a seed of a shuffle.
RAZOR_EXPORT int razor_emulate(const char* name, const RazorBuffer* buffers, int64_t count, int64_t blocks,
                               uint64_t order, int64_t ub_budget, RazorCounters* counters, char* error) {
  return guarded(error, [&] {
    const auto* kernel = std::find_if(std::begin(kKernels), std::end(kKernels),
                                      [&](const Kernel& k) { return std::string_view(k.name) == name; });
    auto* misuse = kernel == std::end(kKernels) ? emu::self_test(name) : nullptr;
    if (kernel == std::end(kKernels) && misuse == nullptr) emu::fail("kernel: expected a known name, got ", name);
    if (misuse == nullptr && kernel->arguments != count) {
      emu::fail(name, ": expected ", kernel->arguments, " arguments, got ", count);
    }
    emu::Machine core(emu::kUbBytes);
    core.ub_budget = ub_budget;
    std::vector<Address> arguments;
    for (int64_t i = 0; i < count; ++i) {
      const RazorBuffer& b = buffers[i];
      arguments.push_back(b.data);
      if (b.data == nullptr || b.bytes == 0) continue;
      const auto is_same = [&](const emu::GlobalBuffer& g) { return g.data == b.data; };
      if (std::any_of(core.globals.begin(), core.globals.end(), is_same)) continue;
      core.globals.push_back({.name = b.name,
                              .data = b.data,
                              .bytes = b.bytes,
                              .writable = b.writable != 0,
                              .touched = std::vector<emu::Touched>(b.bytes / emu::kGranule + 1),
                              .owner = std::vector<int32_t>(b.bytes),
                              .reader = std::vector<int32_t>(b.bytes)});
    }
    std::vector<int64_t> indices(blocks);
    std::iota(indices.begin(), indices.end(), int64_t{0});
    if (order == 1) std::reverse(indices.begin(), indices.end());
    if (order > 1) std::shuffle(indices.begin(), indices.end(), std::mt19937_64(order));
    emu::set_machine(&core);
    for (const int64_t block : indices) {
      core.start_block(block, blocks);
      misuse == nullptr ? kernel->run(arguments.data()) : misuse(arguments.data());
      core.end_block();
    }
    emu::set_machine(nullptr);
    *counters = {.repeats = core.counters.repeats,
                 .instructions = 0,
                 .barriers = core.counters.calls["PipeBarrier"],
                 .copies = core.counters.calls["DataCopy"] + core.counters.calls["DataCopyPad"],
                 .bytes_in = core.counters.bytes_in,
                 .bytes_out = core.counters.bytes_out,
                 .ub_bytes = core.most_ub_used};
    for (const auto& [call, calls] : core.counters.calls) counters->instructions += calls;
  });
}

RAZOR_EXPORT int razor_complete_attention(int64_t cores, int64_t ub_bytes, razor::ascend::AttentionTiling* tiling,
                                          int64_t* states_floats, char* error) {
  return guarded(error, [&] {
    razor::ascend::complete({.vector_cores = cores, .ub_bytes = ub_bytes}, *tiling);
    *states_floats = razor::ascend::states_floats(*tiling);
  });
}

RAZOR_EXPORT int razor_complete_append(int64_t cores, int64_t ub_bytes, razor::ascend::CacheTiling* tiling,
                                       char* error) {
  return guarded(error, [&] { razor::ascend::complete({.vector_cores = cores, .ub_bytes = ub_bytes}, *tiling); });
}

RAZOR_EXPORT int razor_complete_head_scores(int64_t cores, int64_t ub_bytes, razor::ascend::HeadScoresTiling* tiling,
                                            int64_t* floats, char* error) {
  return guarded(error, [&] {
    razor::ascend::complete({.vector_cores = cores, .ub_bytes = ub_bytes}, *tiling);
    *floats = razor::ascend::partial_scores_floats(*tiling);
  });
}

// Bytes of on-chip memory: attention, combine, append, head_scores.
RAZOR_EXPORT void razor_ub_bytes(int64_t tile_tokens, int64_t rows, int64_t head_dim, int64_t* bytes) {
  bytes[0] = razor::ascend::attention_ub_bytes(tile_tokens, rows, head_dim);
  bytes[1] = razor::ascend::combine_ub_bytes(rows, head_dim);
  bytes[2] = razor::ascend::append_ub_bytes(tile_tokens, head_dim);
  bytes[3] = razor::ascend::head_scores_ub_bytes(tile_tokens, rows, head_dim);
}

// The shares of all workers: [count, 8] worker, table row, first and end query row, first and end unit, units, state.
// Writes at most `most` of them and returns how many there are.
RAZOR_EXPORT int64_t razor_shares(const razor::ascend::AttentionTiling* tiling, const int64_t* seen, const int64_t* pad,
                                  const int32_t* sink_size, const int32_t* window_size, const uint8_t* compensate,
                                  int64_t* shares, int64_t most) {
  const Rows rows{tiling->cache, seen, pad, sink_size, window_size, compensate};
  int64_t count = 0;
  for (int64_t worker = 0; worker < tiling->cache.workers; ++worker) {
    razor::ascend::WorkList<Rows> work(*tiling, rows, worker);
    razor::ascend::Share share;
    for (; work.next(share); ++count) {
      if (count >= most) continue;
      const int64_t record[] = {
          worker,    share.part.row.table_row, share.part.first_row, share.part.end_row, share.begin,
          share.end, share.part.units,         share.state};
      std::copy(std::begin(record), std::end(record), shares + 8 * count);
    }
  }
  return count;
}
