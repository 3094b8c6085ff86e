// Chooses the instruction set once per process.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

#include "cpu/kernels.h"

namespace fastlora {

namespace portable {
extern const Kernels table;
}
#ifdef FASTLORA_WITH_AVX2
namespace avx2 {
extern const Kernels table;
}
#endif
#ifdef FASTLORA_WITH_AVX512
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

const Kernels& choose() {
  const char* variable = std::getenv("FASTLORA_CPU_ISA");
  const std::string limit = variable ? variable : "avx512";
  STD_TORCH_CHECK(limit == "avx512" || limit == "avx2" || limit == "portable", "FASTLORA_CPU_ISA is '", limit,
                  "'; accepted: avx512, avx2, portable");
#ifdef FASTLORA_WITH_AVX512
  if (limit == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return avx512::table;
  }
#endif
#ifdef FASTLORA_WITH_AVX2
  if (limit != "portable" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return avx2::table;
  }
#endif
  return portable::table;
}

std::string cpu_isa() { return kernels().name; }

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&fastlora::cpu_isa)); }
