// SPDX-License-Identifier: Apache-2.0
// razor_attention._core: the same functions for numpy arrays, no torch. Serial; the GIL is released while they run.
// bfloat16 arrays are those of the ml_dtypes package.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>

#include "array_args.h"
#include "razor/cpu/isa.h"

namespace {

namespace py = pybind11;
using razor::bindings::Array;
using razor::bindings::CacheArrays;
using razor::bindings::DType;

DType dtype_of(const py::array& a) {
  if (!a.dtype().attr("isnative").cast<bool>()) return DType::kOther;  // byte-swapped
  const auto name = a.dtype().attr("name").cast<std::string>();
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kInt32, DType::kInt64, DType::kBool,
                      DType::kInt8, DType::kUInt8}) {
    if (name == razor::bindings::name(dtype)) return dtype;
  }
  return DType::kOther;
}

// An Array with its sizes and strides in elements.
struct Described {
  static constexpr int kMaxDims = 4;
  int64_t sizes[kMaxDims], strides[kMaxDims];
  Array array;

  Described(const char* name, const py::array& a, bool writable = false) {
    RAZOR_CHECK(a.ndim() <= kMaxDims, name, ": expected at most 4 dimensions, got ", a.ndim());
    RAZOR_CHECK(a.itemsize() > 0, name, ": expected elements of at least one byte, got none");
    RAZOR_CHECK(!writable || a.writeable(), name, ": expected a writable array, got a read-only one");
    for (int i = 0; i < a.ndim(); ++i) {
      sizes[i] = a.shape(i);
      RAZOR_CHECK(a.strides(i) % a.itemsize() == 0, name, ": expected strides in whole elements, got ", a.strides(i),
                  " bytes");
      strides[i] = a.strides(i) / a.itemsize();
    }
    array = {.name = name,
             .data = const_cast<void*>(a.data()),
             .dtype = dtype_of(a),
             .dims = a.ndim(),
             .sizes = sizes,
             .strides = strides};
  }
  Described(const Described&) = delete;
};

std::optional<Array> optional_array(const std::optional<Described>& d) {
  return d ? std::optional(d->array) : std::nullopt;
}

struct DescribedCache {
  Described key_pages, value_pages, page_table, seen, sink_size, window_size, compensate, key_sum, value_sum;

  int64_t exact_sink;
  std::optional<Described> exact = std::nullopt;

  [[nodiscard]] CacheArrays arrays() const {
    return {key_pages.array, value_pages.array,     page_table.array, seen.array,
            sink_size.array, window_size.array,     compensate.array, key_sum.array,
            value_sum.array, optional_array(exact), exact_sink};
  }
};

py::array attention(const py::array& query, const py::array& key, const py::array& value, const py::array& key_pages,
                    const py::array& value_pages, const py::array& page_table, const py::array& seen,
                    const py::array& sink_size, const py::array& window_size, const py::array& compensate,
                    const py::array& key_sum, const py::array& value_sum, const std::optional<py::array>& alibi_slopes,
                    const std::optional<py::array>& pad, double scale, bool dense,
                    const std::optional<py::array>& exact, int64_t exact_sink) {
  DescribedCache cache{{"key_pages", key_pages},   {"value_pages", value_pages},
                       {"page_table", page_table}, {"seen", seen},
                       {"sink_size", sink_size},   {"window_size", window_size},
                       {"compensate", compensate}, {"key_sum", key_sum},
                       {"value_sum", value_sum},   exact_sink};
  if (exact) cache.exact.emplace("exact", *exact);
  const Described q("query", query), k("key", key), v("value", value);
  std::optional<Described> slopes, padding;
  if (alibi_slopes) slopes.emplace("alibi_slopes", *alibi_slopes);
  if (pad) padding.emplace("pad", *pad);
  razor::AttentionParams params = razor::bindings::attention_params(
      q.array, k.array, v.array, cache.arrays(), optional_array(slopes), optional_array(padding), scale, dense);
  py::array out(query.dtype(), std::vector<py::ssize_t>(query.shape(), query.shape() + 4));
  params.out = out.mutable_data();
  py::gil_scoped_release release;
  razor::attention(params, razor::serial_for);
  return out;
}

void append(const py::array& key, const py::array& value, const py::array& key_pages, const py::array& value_pages,
            const py::array& page_table, const py::array& seen, const py::array& sink_size,
            const py::array& window_size, const py::array& compensate, const py::array& key_sum,
            const py::array& value_sum, const std::optional<py::array>& pad, const std::optional<py::array>& exact,
            int64_t exact_sink) {
  DescribedCache cache{{"key_pages", key_pages, true}, {"value_pages", value_pages, true},
                       {"page_table", page_table},     {"seen", seen, true},
                       {"sink_size", sink_size},       {"window_size", window_size},
                       {"compensate", compensate},     {"key_sum", key_sum, true},
                       {"value_sum", value_sum, true}, exact_sink};
  if (exact) cache.exact.emplace("exact", *exact, true);
  const Described k("key", key), v("value", value);
  std::optional<Described> padding;
  if (pad) padding.emplace("pad", *pad);
  const razor::NewTokens tokens = razor::bindings::new_tokens(k.array, v.array, optional_array(padding));
  const razor::KvCacheView view = razor::bindings::cache_view(cache.arrays(), k.array);
  py::gil_scoped_release release;
  razor::append(view, tokens, razor::serial_for);
}

std::pair<py::array, py::array> head_scores(const py::array& query, const py::array& key, int64_t period,
                                            double scale) {
  const Described q("query", query), k("key", key);
  razor::HeadScoresParams params = razor::bindings::head_scores_params(q.array, k.array, period, scale);
  py::array_t<float> echo({params.batch, params.num_heads}), induction({params.batch, params.num_heads});
  params.echo = echo.mutable_data();
  params.induction = induction.mutable_data();
  {
    py::gil_scoped_release release;
    razor::head_scores(params, razor::serial_for);
  }
  return {echo, induction};
}

std::pair<py::array, py::array> alibi_windows(const py::array& query, const py::array& key, const py::array& slopes,
                                              const std::optional<py::array>& bound, double theta, double alpha,
                                              const std::string& method) {
  const Described q("query", query), k("key", key), s("slopes", slopes);
  std::optional<Described> before;
  if (bound) before.emplace("bound", *bound);
  razor::AlibiWindowsParams params =
      razor::bindings::alibi_windows_params(q.array, k.array, s.array, optional_array(before), theta, alpha, method);
  py::array_t<int64_t> windows(params.num_heads);
  py::array_t<float> largest_bound(params.num_heads);
  params.windows = windows.mutable_data();
  params.largest_bound = largest_bound.mutable_data();
  {
    py::gil_scoped_release release;
    razor::alibi_windows(params, razor::serial_for);
  }
  return {windows, largest_bound};
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "razor_attention's C++ core for numpy arrays.";
  m.def("isa", &razor::isa, "Name of the instruction set in use.");
  m.def("attention", &attention, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("key_pages"),
        py::arg("value_pages"), py::arg("page_table"), py::arg("seen"), py::arg("sink_size"), py::arg("window_size"),
        py::arg("compensate"), py::arg("key_sum"), py::arg("value_sum"), py::kw_only(),
        py::arg("alibi_slopes") = py::none(), py::arg("pad") = py::none(), py::arg("scale"), py::arg("dense") = false,
        py::arg("exact") = py::none(), py::arg("exact_sink") = 0,
        "See razor_attention.ops.attention; numpy arrays instead of tensors.");
  m.def("append", &append, py::arg("key"), py::arg("value"), py::arg("key_pages"), py::arg("value_pages"),
        py::arg("page_table"), py::arg("seen"), py::arg("sink_size"), py::arg("window_size"), py::arg("compensate"),
        py::arg("key_sum"), py::arg("value_sum"), py::kw_only(), py::arg("pad") = py::none(),
        py::arg("exact") = py::none(), py::arg("exact_sink") = 0,
        "See razor_attention.ops.append; numpy arrays instead of tensors, changed in place.");
  m.def("head_scores", &head_scores, py::arg("query"), py::arg("key"), py::arg("period"), py::kw_only(),
        py::arg("scale"), "See razor_attention.ops.head_scores; numpy arrays instead of tensors.");
  m.def("alibi_windows", &alibi_windows, py::arg("query"), py::arg("key"), py::arg("slopes"),
        py::arg("bound") = py::none(), py::kw_only(), py::arg("theta"), py::arg("alpha"), py::arg("method"),
        "See razor_attention.ops.alibi_windows; numpy arrays instead of tensors.");
}
