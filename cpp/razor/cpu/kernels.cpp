// SPDX-License-Identifier: Apache-2.0
#include "razor/cpu/kernels.h"

#include "razor/cpu/isa.h"

namespace razor::cpu {
namespace {

const Kernels& table(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return kernels_avx2;
    case Isa::kAvx512:
      return kernels_avx512;
    case Isa::kAvx512Bf16:
      return kernels_avx512_bf16;
    case Isa::kAmx:
      return kernels_amx;
#elif defined(__aarch64__)
    case Isa::kNeon:
      return kernels_neon;
#endif
    default:
      return kernels_scalar;
  }
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = table(chosen_isa());
  return chosen;
}

}  // namespace razor::cpu
