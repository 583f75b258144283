#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <string>

namespace natten2::cpu {

#define NATTEN2_DECLARE(isa)              \
  namespace isa {                         \
  Kernels kernels(Dtype, const Problem&); \
  UnfusedKernels unfused_kernels(Dtype);  \
  }
NATTEN2_DECLARE(baseline)
#ifdef NATTEN2_X86_SETS
NATTEN2_DECLARE(avx2)
NATTEN2_DECLARE(avx512)
NATTEN2_DECLARE(avx512_bf16)
#endif
#undef NATTEN2_DECLARE

namespace {

struct Capability {
  const char* name;
  Kernels (*kernels)(Dtype, const Problem&);
  UnfusedKernels (*unfused_kernels)(Dtype);
  bool (*runs_here)();
};

#ifdef NATTEN2_X86_SETS
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() {
#ifdef NATTEN2_EMULATE_BF16
  return has_avx512();
#else
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#endif
}
#endif

// Plainest first.
constexpr Capability kCapabilities[] = {
    {"baseline", baseline::kernels, baseline::unfused_kernels, [] { return true; }},
#ifdef NATTEN2_X86_SETS
    // Every processor with AVX2 has F16C, for which some compilers have no name here.
    {"avx2", avx2::kernels, avx2::unfused_kernels, has_avx2},
    {"avx512", avx512::kernels, avx512::unfused_kernels, has_avx512},
    {"avx512_bf16", avx512_bf16::kernels, avx512::unfused_kernels, has_avx512_bf16},
#endif
};

std::atomic<const Capability*>& current() {
  static std::atomic<const Capability*> capability = [] {
    const Capability* best = kCapabilities;
    for (const Capability& candidate : kCapabilities)
      if (candidate.runs_here()) best = &candidate;
    return best;
  }();
  return capability;
}

}  // namespace

Kernels kernels(Dtype dtype, const Problem& problem) { return current().load()->kernels(dtype, problem); }

UnfusedKernels unfused_kernels(Dtype dtype) { return current().load()->unfused_kernels(dtype); }

}  // namespace natten2::cpu

#define NATTEN2_EXPORT extern "C" __attribute__((visibility("default")))

NATTEN2_EXPORT const char* natten2_cpu_capability() { return natten2::cpu::current().load()->name; }

// Comma-separated, plainest first.
NATTEN2_EXPORT const char* natten2_cpu_capabilities() {
  static const std::string names = [] {
    std::string joined;
    for (const auto& capability : natten2::cpu::kCapabilities)
      if (capability.runs_here()) joined += (joined.empty() ? "" : ",") + std::string(capability.name);
    return joined;
  }();
  return names.c_str();
}

// Returns whether the instruction set is known and runs here; if not, nothing changes.
NATTEN2_EXPORT bool natten2_set_cpu_capability(const char* name) {
  for (const auto& capability : natten2::cpu::kCapabilities) {
    if (std::strcmp(capability.name, name) != 0 || !capability.runs_here()) continue;
    natten2::cpu::current().store(&capability);
    return true;
  }
  return false;
}
