// SPDX-License-Identifier: Apache-2.0
// torch.ops.razor.* on Ascend NPUs: checks -> tiling -> launch on torch_npu's stream. The schemas are torch_ops.cpp's.
// A library of its own, built for one exact torch and torch_npu, only where CANN is; loaded on request. Calls are
// queued and wait for nothing, but for one thing: a prompt (more than 16 tokens) reads the policy and lengths, to hand
// the heads that keep every token to the framework's attention. Values in device memory are not checked, which would
// take a wait as well. alibi_windows stays with the reference. Never run on an NPU.
#include <torch/library.h>

#include <cstring>
#include <map>
#include <string>
#include <tuple>

#include "ascend/op_host/launch.h"
#include "full_heads.h"
#include "torch_arrays.h"
#include "torch_npu/csrc/core/npu/NPUGuard.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"
#include "torch_npu/csrc/framework/OpCommand.h"

namespace {

using at::Tensor;
using razor::bindings::Array;
using razor::bindings::CacheArrays;

Array array(const char* name, const Tensor& t) {
  RAZOR_CHECK(t.is_privateuseone(), name, ": expected a tensor on the NPU like the others, got one on another device");
  return razor::bindings::described(name, t);
}

std::optional<Array> array(const char* name, const std::optional<Tensor>& t) {
  return t ? std::optional(array(name, *t)) : std::nullopt;
}

constexpr auto to_array = [](const char* name, const auto& tensor) { return array(name, tensor); };

// Errors of ours are ValueError in Python.
template <class Body>
auto checked(Body body) {
  try {
    return body();
  } catch (const razor::Error& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

void refuse_float32(const char* op, const Tensor& query) {
  TORCH_CHECK_NOT_IMPLEMENTED(query.scalar_type() != at::kFloat, "razor::", op,
                              ": expected float16 or bfloat16 on an NPU, got float32; razor_attention.reference.", op,
                              " takes it");
}

// Kernels here read elements, not codes.
void refuse_quantised(const char* op, const Tensor& pages) {
  TORCH_CHECK_NOT_IMPLEMENTED(pages.scalar_type() != at::kChar && pages.scalar_type() != at::kByte, "razor::", op,
                              ": expected pages of float16 or bfloat16 on an NPU, got quantised ones; ",
                              "razor_attention.reference.", op, " takes them");
}

// A tiling in device memory. Shapes repeat from call to call: few copies are made, from pinned memory.
template <class Tiling>
const void* on_device(const Tiling& tiling, const Tensor& like) {
  constexpr size_t kMost = 256;
  static thread_local std::map<std::pair<int, std::string>, Tensor> kept;
  const std::string text(reinterpret_cast<const char*>(&tiling), sizeof tiling);
  if (kept.size() > kMost) kept.clear();
  Tensor& copy = kept[{like.get_device(), text}];
  if (!copy.defined()) {
    const Tensor host =
        at::empty({static_cast<int64_t>(sizeof tiling)}, at::TensorOptions(at::kByte).pinned_memory(true));
    std::memcpy(host.data_ptr(), text.data(), text.size());
    copy = host.to(like.device(), at::kByte, /*non_blocking=*/true);
  }
  return copy.data_ptr();
}

// Runs on torch_npu's queue: `launch` keeps copies of pointers and numbers alone. torch_npu raises for a status other
// than 0: in this call or, where its queue has a thread of its own, in a later one.
template <class Launch>
void enqueue(const char* name, Launch launch) {
  void* stream = c10_npu::getCurrentNPUStream().stream(/*need_empty=*/false);
  at_npu::native::OpCommand::RunOpApi(name, [launch, stream]() -> int { return static_cast<int>(launch(stream)); });
}

std::vector<int64_t> to_host(const Tensor& numbers) {
  const Tensor host = numbers.to(at::kCPU, at::kLong).contiguous();
  return {host.data_ptr<int64_t>(), host.data_ptr<int64_t>() + host.numel()};
}

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& key_pages,
                 const Tensor& value_pages, const Tensor& page_table, const Tensor& seen, const Tensor& sink_size,
                 const Tensor& window_size, const Tensor& compensate, const Tensor& key_sum, const Tensor& value_sum,
                 const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& pad, double scale, bool dense,
                 const std::optional<Tensor>& exact, int64_t exact_sink) {
  refuse_float32("attention", query);
  refuse_quantised("attention", key_pages);
  const c10_npu::NPUGuard guard(query.device());
  return checked([&] {
    const CacheArrays cache =
        razor::bindings::cache_arrays(to_array, key_pages, value_pages, page_table, seen, sink_size, window_size,
                                      compensate, key_sum, value_sum, exact, exact_sink);
    razor::AttentionParams params =
        razor::bindings::attention_params(array("query", query), array("key", key), array("value", value), cache,
                                          array("alibi_slopes", alibi_slopes), array("pad", pad), scale, dense);
    razor::ascend::AttentionTiling tiling = razor::ascend::tiling_of(params);
    razor::ascend::complete(razor::ascend::current_device(), tiling);
    const Tensor out = at::empty(query.sizes(), query.options());
    if (out.numel() == 0) return out;
    params.out = out.data_ptr();
    razor::bindings::FullHeads full{query, key, value, key_pages, value_pages, page_table, alibi_slopes};
    if (params.tokens.q_len > razor::ascend::kMostDecodeTokens) {
      const std::vector<int64_t> windows = to_host(window_size);
      for (size_t h = 0; h < windows.size(); ++h) {
        if (windows[h] == razor::ascend::kFull) full.heads.push_back(static_cast<int64_t>(h));
      }
      tiling.skip_full = !full.heads.empty();
    }
    const Tensor states = at::empty({razor::ascend::states_floats(tiling)}, key_sum.options());
    enqueue("razor_attention", [params, workers = tiling.cache.workers, states = states.data_ptr<float>(),
                                tiling = on_device(tiling, query)](void* stream) {
      return razor::ascend::launch_attention(params, workers, states, tiling, stream);
    });
    if (tiling.skip_full) {
      full.seen = to_host(seen);
      full.pad = pad ? to_host(*pad) : std::vector<int64_t>(query.size(0), 0);
      full.scale = scale;
      attend_full_heads(full, out);
    }
    return out;
  });
}

void append(const Tensor& key, const Tensor& value, const Tensor& key_pages, const Tensor& value_pages,
            const Tensor& page_table, const Tensor& seen, const Tensor& sink_size, const Tensor& window_size,
            const Tensor& compensate, const Tensor& key_sum, const Tensor& value_sum, const std::optional<Tensor>& pad,
            const std::optional<Tensor>& exact, int64_t exact_sink) {
  refuse_float32("append", key);
  refuse_quantised("append", key_pages);
  const c10_npu::NPUGuard guard(key.device());
  checked([&] {
    const CacheArrays arrays =
        razor::bindings::cache_arrays(to_array, key_pages, value_pages, page_table, seen, sink_size, window_size,
                                      compensate, key_sum, value_sum, exact, exact_sink);
    const Array keys = array("key", key);
    const razor::NewTokens tokens = razor::bindings::new_tokens(keys, array("value", value), array("pad", pad));
    const razor::KvCacheView cache = razor::bindings::cache_view(arrays, keys);
    if (key.numel() == 0) return;
    razor::ascend::CacheTiling tiling = razor::ascend::tiling_of(cache, tokens);
    razor::ascend::complete(razor::ascend::current_device(), tiling);
    enqueue("razor_append", [cache, tokens, workers = tiling.workers, tiling = on_device(tiling, key)](void* stream) {
      return razor::ascend::launch_append(cache, tokens, workers, tiling, stream);
    });
    seen.add_(tokens.q_len);
    if (pad) seen.sub_(*pad);
  });
}

std::tuple<Tensor, Tensor> head_scores(const Tensor& query, const Tensor& key, int64_t period, double scale) {
  refuse_float32("head_scores", query);
  const c10_npu::NPUGuard guard(query.device());
  return checked([&] {
    const razor::HeadScoresParams params =
        razor::bindings::head_scores_params(array("query", query), array("key", key), period, scale);
    razor::ascend::HeadScoresTiling tiling = razor::ascend::tiling_of(params);
    razor::ascend::complete(razor::ascend::current_device(), tiling);
    const auto floats = query.options().dtype(at::kFloat);
    const Tensor scores = at::empty({razor::ascend::partial_scores_floats(tiling)}, floats);
    enqueue("razor_head_scores",
            [params, workers = tiling.workers, scores = scores.data_ptr<float>(), tiling = on_device(tiling, query)](
                void* stream) { return razor::ascend::launch_head_scores(params, workers, scores, tiling, stream); });
    const int64_t rows = (params.tokens - 1 - period) * tiling.group;
    const Tensor by_row = scores.view({params.batch, params.num_kv_heads, 2, tiling.blocks_per_row, -1})
                              .slice(-1, 0, tiling.block_rows)
                              .flatten(-2)
                              .slice(-1, 0, rows);
    const Tensor sums = by_row.unflatten(-1, {-1, tiling.group}).sum(-2) / (params.tokens - 1 - period);
    const auto heads = [&](int64_t side) { return sums.select(2, side).reshape({params.batch, params.num_heads}); };
    return std::make_tuple(heads(0), heads(1));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(razor, PrivateUse1, m) {
  m.impl("attention", &attention);
  m.impl("append", &append);
  m.impl("head_scores", &head_scores);
}
