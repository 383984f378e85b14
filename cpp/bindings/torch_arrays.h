// SPDX-License-Identifier: Apache-2.0
// Arrays of torch tensors, of the stable interface and of ATen alike.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "array_args.h"

namespace razor::bindings {

inline DType dtype_of(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Long:
      return DType::kInt64;
    case ScalarType::Bool:
      return DType::kBool;
    case ScalarType::Char:
      return DType::kInt8;
    case ScalarType::Byte:
      return DType::kUInt8;
    default:
      return DType::kOther;
  }
}

template <class Tensor>
Array described(const char* name, const Tensor& t) {
  return {.name = name,
          .data = t.data_ptr(),
          .dtype = dtype_of(t.scalar_type()),
          .dims = t.dim(),
          .sizes = t.sizes().data(),
          .strides = t.strides().data()};
}

// The cache's tensors in the order of the schemas, each by `array(name, tensor)`.
template <class Describe, class Tensor>
CacheArrays cache_arrays(Describe array, const Tensor& key_pages, const Tensor& value_pages, const Tensor& page_table,
                         const Tensor& seen, const Tensor& sink_size, const Tensor& window_size,
                         const Tensor& compensate, const Tensor& key_sum, const Tensor& value_sum,
                         const std::optional<Tensor>& exact, int64_t exact_sink) {
  return {array("key_pages", key_pages),
          array("value_pages", value_pages),
          array("page_table", page_table),
          array("seen", seen),
          array("sink_size", sink_size),
          array("window_size", window_size),
          array("compensate", compensate),
          array("key_sum", key_sum),
          array("value_sum", value_sum),
          array("exact", exact),
          exact_sink};
}

}  // namespace razor::bindings
