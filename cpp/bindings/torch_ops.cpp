// SPDX-License-Identifier: Apache-2.0
// torch.ops.razor.*: schemas, and CPU implementations through torch's stable ABI. Checks -> params -> core.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "torch_arrays.h"

namespace {

using razor::bindings::Array;
using razor::bindings::CacheArrays;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void torch_parallel_for_razor(int64_t begin, int64_t end, int64_t grain, razor::RangeFn body, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

Array array(const char* name, const Tensor& t) {
  RAZOR_CHECK(t.is_cpu(), name, ": expected a tensor on the CPU like the others, got one on another device");
  return razor::bindings::described(name, t);
}

std::optional<Array> array(const char* name, const std::optional<Tensor>& t) {
  return t ? std::optional(array(name, *t)) : std::nullopt;
}

constexpr auto to_array = [](const char* name, const auto& tensor) { return array(name, tensor); };

// Contiguous, of the dtype and device of `like`, not initialised. torch::stable::new_empty looks its operator up by
// name at every call, which costs as much as a third of a short attention call.
Tensor result_like(const Tensor& like) {
  constexpr int64_t kMostDims = 4;
  int64_t strides[kMostDims];
  int64_t stride = 1;
  for (int64_t i = like.dim() - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(like.size(i), 1);
  }
  int32_t dtype, device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(like.dim(), like.sizes().data(), strides, dtype, device_type, device_index, &out));
  return Tensor(out);
}

Tensor attention(Tensor query, Tensor key, Tensor value, Tensor key_pages, Tensor value_pages, Tensor page_table,
                 Tensor seen, Tensor sink_size, Tensor window_size, Tensor compensate, Tensor key_sum, Tensor value_sum,
                 std::optional<Tensor> alibi_slopes, std::optional<Tensor> pad, double scale, bool dense,
                 std::optional<Tensor> exact, int64_t exact_sink) {
  const CacheArrays cache =
      razor::bindings::cache_arrays(to_array, key_pages, value_pages, page_table, seen, sink_size, window_size,
                                    compensate, key_sum, value_sum, exact, exact_sink);
  razor::AttentionParams params =
      razor::bindings::attention_params(array("query", query), array("key", key), array("value", value), cache,
                                        array("alibi_slopes", alibi_slopes), array("pad", pad), scale, dense);
  Tensor out = result_like(query);  // 4 dimensions, as just checked
  params.out = out.data_ptr();
  razor::attention(params, torch_parallel_for_razor);
  return out;
}

void append(Tensor key, Tensor value, Tensor key_pages, Tensor value_pages, Tensor page_table, Tensor seen,
            Tensor sink_size, Tensor window_size, Tensor compensate, Tensor key_sum, Tensor value_sum,
            std::optional<Tensor> pad, std::optional<Tensor> exact, int64_t exact_sink) {
  const CacheArrays cache =
      razor::bindings::cache_arrays(to_array, key_pages, value_pages, page_table, seen, sink_size, window_size,
                                    compensate, key_sum, value_sum, exact, exact_sink);
  const Array keys = array("key", key);
  const razor::NewTokens tokens = razor::bindings::new_tokens(keys, array("value", value), array("pad", pad));
  razor::append(razor::bindings::cache_view(cache, keys), tokens, torch_parallel_for_razor);
}

std::tuple<Tensor, Tensor> head_scores(Tensor query, Tensor key, int64_t period, double scale) {
  razor::HeadScoresParams params =
      razor::bindings::head_scores_params(array("query", query), array("key", key), period, scale);
  Tensor echo = torch::stable::new_empty(query, {params.batch, params.num_heads}, ScalarType::Float);
  Tensor induction = torch::stable::new_empty(query, {params.batch, params.num_heads}, ScalarType::Float);
  params.echo = static_cast<float*>(echo.data_ptr());
  params.induction = static_cast<float*>(induction.data_ptr());
  razor::head_scores(params, torch_parallel_for_razor);
  return {echo, induction};
}

std::tuple<Tensor, Tensor> alibi_windows(Tensor query, Tensor key, Tensor slopes, std::optional<Tensor> bound,
                                         double theta, double alpha, std::string method) {
  razor::AlibiWindowsParams params = razor::bindings::alibi_windows_params(
      array("query", query), array("key", key), array("slopes", slopes), array("bound", bound), theta, alpha, method);
  Tensor windows = torch::stable::new_empty(query, {params.num_heads}, ScalarType::Long);
  Tensor largest_bound = torch::stable::new_empty(query, {params.num_heads}, ScalarType::Float);
  params.windows = static_cast<int64_t*>(windows.data_ptr());
  params.largest_bound = static_cast<float*>(largest_bound.data_ptr());
  razor::alibi_windows(params, torch_parallel_for_razor);
  return {windows, largest_bound};
}

}  // namespace

STABLE_TORCH_LIBRARY(razor, m) {
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor key_pages, Tensor value_pages, Tensor page_table, "
      "Tensor seen, Tensor sink_size, Tensor window_size, Tensor compensate, Tensor key_sum, Tensor value_sum, *, "
      "Tensor? alibi_slopes=None, Tensor? pad=None, float scale, bool dense=False, Tensor? exact=None, "
      "int exact_sink=0) -> Tensor");
  m.def(
      "append(Tensor key, Tensor value, Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor page_table, "
      "Tensor(c!) seen, Tensor sink_size, Tensor window_size, Tensor compensate, Tensor(d!) key_sum, "
      "Tensor(e!) value_sum, *, Tensor? pad=None, Tensor(f!)? exact=None, int exact_sink=0) -> ()");
  m.def("head_scores(Tensor query, Tensor key, int period, *, float scale) -> (Tensor echo, Tensor induction)");
  m.def(
      "alibi_windows(Tensor query, Tensor key, Tensor slopes, Tensor? bound=None, *, float theta, float alpha, "
      "str method) -> (Tensor windows, Tensor bound)");
}

STABLE_TORCH_LIBRARY_IMPL(razor, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("append", TORCH_BOX(&append));
  m.impl("head_scores", TORCH_BOX(&head_scores));
  m.impl("alibi_windows", TORCH_BOX(&alibi_windows));
}
