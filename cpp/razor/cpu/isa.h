// SPDX-License-Identifier: Apache-2.0
// Which instruction set the kernels use: the best of this CPU, or the one that RAZOR_ISA names.
#pragma once

#include "razor/check.h"

namespace razor::cpu {

enum class Isa { kScalar, kNeon, kAvx2, kAvx512, kAvx512Bf16, kAmx };

[[nodiscard]] const char* name(Isa isa);

// Decided at the first call. Throws if RAZOR_ISA names an unknown instruction set or one that this CPU lacks.
[[nodiscard]] Isa chosen_isa();

}  // namespace razor::cpu

namespace razor {
// Name of the instruction set in use: "scalar", "neon", "avx2", "avx512", "avx512_bf16" or "amx".
[[nodiscard]] RAZOR_API const char* isa();
}  // namespace razor
