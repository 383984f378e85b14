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

}  // namespace razor::bindings
