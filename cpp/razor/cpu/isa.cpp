// SPDX-License-Identifier: Apache-2.0
#include "razor/cpu/isa.h"

#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace razor::cpu {
namespace {

// Ascending on each processor.
constexpr Isa kAll[] = {Isa::kScalar, Isa::kNeon, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx};

#if defined(__x86_64__)
// What __builtin_cpu_supports does not know by name in every compiler.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
bool has_amx_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
}

// Linux lets a process use the tile registers once it has asked.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kNeon:
      return false;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    case Isa::kAvx512:
      return has(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case Isa::kAvx512Bf16:
      return has(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::kAmx:
      return has(Isa::kAvx512Bf16) && has_amx_bf16() && may_use_tiles();
  }
  return false;
#elif defined(__aarch64__)
  return isa == Isa::kScalar || isa == Isa::kNeon;  // every such CPU has NEON
#else
  return isa == Isa::kScalar;
#endif
}

std::string names(bool only_present) {
  std::string list;
  for (Isa isa : kAll) {
    if (only_present && !has(isa)) continue;
    list += (list.empty() ? "" : ", ") + std::string(name(isa));
  }
  return list;
}

Isa choose() {
  const char* wanted = std::getenv("RAZOR_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    Isa best = Isa::kScalar;
    for (Isa isa : kAll) {
      if (has(isa)) best = isa;
    }
    return best;
  }
  for (Isa isa : kAll) {
    if (std::string(wanted) != name(isa)) continue;
    RAZOR_CHECK(has(isa), "RAZOR_ISA: expected an instruction set of this CPU (", names(/*only_present=*/true),
                "), got ", wanted);
    return isa;
  }
  detail::fail("RAZOR_ISA: expected one of ", names(/*only_present=*/false), ", got ", wanted);
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kNeon:
      return "neon";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmx:
      return "amx";
  }
  return "unknown";
}

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace razor::cpu

namespace razor {
const char* isa() { return cpu::name(cpu::chosen_isa()); }
}  // namespace razor
