// SPDX-License-Identifier: Apache-2.0
#include "razor/cpu/kernels.h"

#include "razor/cpu/isa.h"

namespace razor::cpu {

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels& table = chosen_isa() == Isa::kAmx      ? kernels_amx
                                : chosen_isa() == Isa::kAvx512 ? kernels_avx512
                                : chosen_isa() == Isa::kAvx2   ? kernels_avx2
                                                               : kernels_scalar;
  return table;
#else
  (void)chosen_isa();  // refuses a wrong RAZOR_ISA here too
  return kernels_scalar;
#endif
}

}  // namespace razor::cpu
