// SPDX-License-Identifier: Apache-2.0
// Encodings of one cache row (head_dim elements). Python and Ascend use the same values.
#pragma once

#include <stdint.h>

namespace razor {

enum class KvFormat : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

constexpr int64_t element_size(KvFormat format) { return format == KvFormat::kF32 ? 4 : 2; }

}  // namespace razor
