// SPDX-License-Identifier: Apache-2.0
// From described arrays (torch tensors or numpy arrays) to the core's params: dtype, shape and stride checks for every
// door, in one place. Values inside the arrays are checked by the core.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>

#include "razor/alibi_windows.h"
#include "razor/attention.h"
#include "razor/check.h"
#include "razor/head_scores.h"
#include "razor/kv_cache.h"

namespace razor::bindings {

enum class DType { kFloat32, kBFloat16, kFloat16, kInt32, kInt64, kBool, kInt8, kUInt8, kOther };

inline const char* name(DType dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "int32",        "int64",
                                    "bool",    "int8",     "uint8",   "another dtype"};
  return kNames[static_cast<int>(dtype)];
}

struct Array {
  const char* name;
  void* data;
  DType dtype;
  int64_t dims;
  const int64_t* sizes;    // [dims]
  const int64_t* strides;  // [dims] elements

  [[nodiscard]] std::string shape() const {
    std::string text = "[";
    for (int64_t i = 0; i < dims; ++i) text.append(i ? ", " : "").append(std::to_string(sizes[i]));
    return text.append("]");
  }
};

inline constexpr int64_t kAny = -1;

inline void expect_dims(const Array& a, int64_t dims, const char* meaning) {
  RAZOR_CHECK(a.dims == dims, a.name, ": expected ", dims, " dimensions ", meaning, ", got shape ", a.shape());
}

inline void expect_shape(const Array& a, std::initializer_list<int64_t> shape) {
  bool same = a.dims == static_cast<int64_t>(shape.size());
  std::string text = "[";
  int64_t i = 0;
  for (int64_t size : shape) {
    same = same && (size == kAny || size == a.sizes[i]);
    text.append(i++ ? ", " : "").append(size == kAny ? "any" : std::to_string(size));
  }
  RAZOR_CHECK(same, a.name, ": expected shape ", text, "], got ", a.shape());
}

inline void expect_dtype(const Array& a, DType dtype) {
  RAZOR_CHECK(a.dtype == dtype, a.name, ": expected dtype ", name(dtype), ", got ", name(a.dtype));
}

inline void expect_like(const Array& a, const Array& other) {
  RAZOR_CHECK(a.dtype == other.dtype, a.name, ": expected dtype ", name(other.dtype), " like ", other.name, ", got ",
              name(a.dtype));
}

inline bool is_empty(const Array& a) { return std::find(a.sizes, a.sizes + a.dims, 0) != a.sizes + a.dims; }

inline void expect_contiguous(const Array& a) {
  if (is_empty(a)) return;
  int64_t expected = 1;
  for (int64_t i = a.dims - 1; i >= 0; --i) {
    RAZOR_CHECK(a.sizes[i] == 1 || a.strides[i] == expected, a.name, ": expected a contiguous array, got stride ",
                a.strides[i], " in dimension ", i);
    expected *= a.sizes[i];
  }
}

inline void expect_rows(const Array& a) {
  RAZOR_CHECK(is_empty(a) || a.sizes[a.dims - 1] == 1 || a.strides[a.dims - 1] == 1, a.name,
              ": expected a contiguous last dimension, got stride ", a.strides[a.dims - 1]);
}

inline void expect_group(const Array& query, const Array& key) {
  RAZOR_CHECK(query.sizes[1] > 0 && key.sizes[1] > 0 && query.sizes[1] % key.sizes[1] == 0,
              "query: expected a multiple of the ", key.sizes[1], " kv heads as num_heads, got ", query.sizes[1]);
}

inline KvFormat format_of(const Array& a) {
  switch (a.dtype) {
    case DType::kFloat32:
      return KvFormat::kF32;
    case DType::kBFloat16:
      return KvFormat::kBF16;
    case DType::kFloat16:
      return KvFormat::kF16;
    default:
      detail::fail(a.name, ": expected dtype float32, bfloat16 or float16, got ", name(a.dtype));
  }
}

// How pages of tokens like `key` are quantised.
inline KvCodes codes_of(const Array& pages, const Array& key) {
  if (pages.dtype == DType::kInt8) return KvCodes::kInt8;
  if (pages.dtype == DType::kUInt8) return KvCodes::kInt4;
  RAZOR_CHECK(pages.dtype == key.dtype, pages.name, ": expected dtype ", name(key.dtype), " like ", key.name,
              ", int8 or uint8, got ", name(pages.dtype));
  return KvCodes::kNone;
}

struct CacheArrays {
  Array key_pages, value_pages, page_table, seen, sink_size, window_size, compensate, key_sum, value_sum;
  std::optional<Array> exact = std::nullopt;
  int64_t exact_sink = 0;
};

// The cache of a layer whose new keys are `key`, already checked to have 4 dimensions.
inline KvCacheView cache_view(const CacheArrays& c, const Array& key) {
  expect_dims(c.key_pages, 3, "(num_pages, page_size, head_dim)");
  const int64_t batch = key.sizes[0], heads = key.sizes[1], head_dim = key.sizes[3];
  const KvFormat format = format_of(key);
  const KvCodes codes = codes_of(c.key_pages, key);
  const int64_t width = codes == KvCodes::kNone ? head_dim : row_bytes(format, codes, head_dim).all();
  expect_shape(c.key_pages, {kAny, kAny, width});
  expect_contiguous(c.key_pages);
  const int64_t page_size = c.key_pages.sizes[1];
  RAZOR_CHECK(page_size > 0 && page_size % 16 == 0, "key_pages: expected a page_size that is a multiple of 16, got ",
              page_size);
  expect_like(c.value_pages, c.key_pages);
  expect_shape(c.value_pages, {c.key_pages.sizes[0], page_size, width});
  expect_contiguous(c.value_pages);
  expect_dtype(c.page_table, DType::kInt32);
  expect_shape(c.page_table, {batch * heads, kAny});
  expect_contiguous(c.page_table);
  expect_dtype(c.seen, DType::kInt64);
  expect_shape(c.seen, {batch});
  expect_contiguous(c.seen);
  for (const Array* sizes : {&c.sink_size, &c.window_size}) {
    expect_dtype(*sizes, DType::kInt32);
    expect_shape(*sizes, {heads});
    expect_contiguous(*sizes);
  }
  expect_dtype(c.compensate, DType::kBool);
  expect_shape(c.compensate, {heads});
  expect_contiguous(c.compensate);
  for (const Array* sums : {&c.key_sum, &c.value_sum}) {
    expect_dtype(*sums, DType::kFloat32);
    expect_shape(*sums, {batch * heads, head_dim});
    expect_contiguous(*sums);
  }
  if (c.exact) {
    RAZOR_CHECK(codes != KvCodes::kNone, "exact: expected quantised key_pages beside it, got ",
                name(c.key_pages.dtype));
    expect_like(*c.exact, key);
    expect_shape(*c.exact, {2, batch * heads, kAny, head_dim});
    expect_contiguous(*c.exact);
  }
  const int64_t exact_rows = c.exact ? c.exact->sizes[2] : 0;
  RAZOR_CHECK(c.exact_sink >= 0 && c.exact_sink <= exact_rows, "exact_sink: expected a value from 0 to ", exact_rows,
              ", got ", c.exact_sink);
  return {.key_pages = c.key_pages.data,
          .value_pages = c.value_pages.data,
          .page_table = static_cast<const int32_t*>(c.page_table.data),
          .seen = static_cast<int64_t*>(c.seen.data),
          .sink_size = static_cast<const int32_t*>(c.sink_size.data),
          .window_size = static_cast<const int32_t*>(c.window_size.data),
          .compensate = static_cast<const bool*>(c.compensate.data),
          .key_sum = static_cast<float*>(c.key_sum.data),
          .value_sum = static_cast<float*>(c.value_sum.data),
          .exact = exact_rows > 0 ? c.exact->data : nullptr,
          .batch = batch,
          .num_kv_heads = heads,
          .head_dim = head_dim,
          .num_pages = c.key_pages.sizes[0],
          .page_size = page_size,
          .max_pages = c.page_table.sizes[1],
          .exact_rows = exact_rows,
          .exact_sink = c.exact_sink,
          .format = format,
          .codes = codes};
}

inline NewTokens new_tokens(const Array& key, const Array& value, const std::optional<Array>& pad) {
  expect_dims(key, 4, "(batch, num_kv_heads, q_len, head_dim)");
  (void)format_of(key);
  RAZOR_CHECK(key.sizes[1] > 0 && key.sizes[3] > 0, "key: expected at least one kv head and one element, got shape ",
              key.shape());
  expect_like(value, key);
  expect_shape(value, {key.sizes[0], key.sizes[1], key.sizes[2], key.sizes[3]});
  expect_rows(key);
  expect_rows(value);
  if (pad) {
    expect_dtype(*pad, DType::kInt64);
    expect_shape(*pad, {key.sizes[0]});
    expect_contiguous(*pad);
  }
  return {.key = key.data,
          .value = value.data,
          .pad = pad ? static_cast<const int64_t*>(pad->data) : nullptr,
          .key_stride = {key.strides[0], key.strides[1], key.strides[2]},
          .value_stride = {value.strides[0], value.strides[1], value.strides[2]},
          .q_len = key.sizes[2]};
}

// Everything but `out`, which the binding allocates once the checks have passed.
inline AttentionParams attention_params(const Array& query, const Array& key, const Array& value,
                                        const CacheArrays& cache, const std::optional<Array>& alibi_slopes,
                                        const std::optional<Array>& pad, double scale, bool dense) {
  expect_dims(query, 4, "(batch, num_heads, q_len, head_dim)");
  const NewTokens tokens = new_tokens(key, value, pad);
  expect_like(query, key);
  expect_shape(query, {key.sizes[0], kAny, key.sizes[2], key.sizes[3]});
  expect_rows(query);
  expect_group(query, key);
  if (alibi_slopes) {
    expect_dtype(*alibi_slopes, DType::kFloat32);
    expect_shape(*alibi_slopes, {query.sizes[1]});
    expect_contiguous(*alibi_slopes);
  }
  return {.query = query.data,
          .tokens = tokens,
          .cache = cache_view(cache, key),
          .alibi_slopes = alibi_slopes ? static_cast<const float*>(alibi_slopes->data) : nullptr,
          .out = nullptr,
          .query_stride = {query.strides[0], query.strides[1], query.strides[2]},
          .num_heads = query.sizes[1],
          .scale = static_cast<float>(scale),
          .dense = dense};
}

// Everything but `echo` and `induction`.
inline HeadScoresParams head_scores_params(const Array& query, const Array& key, int64_t period, double scale) {
  expect_dims(query, 4, "(batch, num_heads, tokens, head_dim)");
  expect_dims(key, 4, "(batch, num_kv_heads, tokens, head_dim)");
  expect_like(key, query);
  expect_shape(key, {query.sizes[0], kAny, query.sizes[2], query.sizes[3]});
  expect_rows(query);
  expect_rows(key);
  expect_group(query, key);
  return {.query = query.data,
          .key = key.data,
          .echo = nullptr,
          .induction = nullptr,
          .query_stride = {query.strides[0], query.strides[1], query.strides[2]},
          .key_stride = {key.strides[0], key.strides[1], key.strides[2]},
          .batch = query.sizes[0],
          .num_heads = query.sizes[1],
          .num_kv_heads = key.sizes[1],
          .tokens = query.sizes[2],
          .head_dim = query.sizes[3],
          .period = period,
          .format = format_of(query),
          .scale = static_cast<float>(scale)};
}

// Everything but `windows` and `largest_bound`.
inline AlibiWindowsParams alibi_windows_params(const Array& query, const Array& key, const Array& slopes,
                                               const std::optional<Array>& bound, double theta, double alpha,
                                               std::string_view method) {
  expect_dims(query, 3, "(q_rows, num_heads, cols)");
  expect_dims(key, 3, "(k_rows, num_heads, cols)");
  const KvFormat format = format_of(query);
  expect_like(key, query);
  RAZOR_CHECK(!is_empty(query), "query: expected at least one row, head and column, got shape ", query.shape());
  expect_shape(key, {kAny, query.sizes[1], query.sizes[2]});
  RAZOR_CHECK(!is_empty(key), "key: expected at least one row, head and column, got shape ", key.shape());
  expect_dtype(slopes, DType::kFloat32);
  expect_shape(slopes, {query.sizes[1]});
  expect_contiguous(slopes);
  if (bound) {
    expect_dtype(*bound, DType::kFloat32);
    expect_shape(*bound, {query.sizes[1]});
    expect_contiguous(*bound);
  }
  return {.query = query.data,
          .key = key.data,
          .slopes = static_cast<const float*>(slopes.data),
          .bound = bound ? static_cast<const float*>(bound->data) : nullptr,
          .windows = nullptr,
          .largest_bound = nullptr,
          .query_stride = {query.strides[0], query.strides[1], query.strides[2]},
          .key_stride = {key.strides[0], key.strides[1], key.strides[2]},
          .q_rows = query.sizes[0],
          .k_rows = key.sizes[0],
          .num_heads = query.sizes[1],
          .cols = query.sizes[2],
          .format = format,
          .theta = theta,
          .alpha = alpha,
          .method = window_method(method)};
}

}  // namespace razor::bindings
