// Chooses the instruction set once per process.
#include <torch/csrc/stable/library.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace fastlora {

#define FASTLORA_DECLARE(isa) \
  namespace isa {             \
  extern const Kernels table; \
  }
FASTLORA_DECLARE(portable)
FASTLORA_DECLARE(avx2)
FASTLORA_DECLARE(avx512)
FASTLORA_DECLARE(avx512_bf16)
FASTLORA_DECLARE(avx512_bf16_emulated)

// The table of an instruction set, or null where it is not part of this build.
#ifdef FASTLORA_WITH_AVX2
#define FASTLORA_AVX2 &avx2::table
#else
#define FASTLORA_AVX2 nullptr
#endif
#ifdef FASTLORA_WITH_AVX512
#define FASTLORA_AVX512 &avx512::table
#else
#define FASTLORA_AVX512 nullptr
#endif
#ifdef FASTLORA_WITH_AVX512_BF16
#define FASTLORA_AVX512_BF16 &avx512_bf16::table
#else
#define FASTLORA_AVX512_BF16 nullptr
#endif
#ifdef FASTLORA_WITH_AVX512_BF16_EMULATED
#define FASTLORA_AVX512_BF16_EMULATED &avx512_bf16_emulated::table
#else
#define FASTLORA_AVX512_BF16_EMULATED nullptr
#endif

namespace {

struct Candidate {
  const char* name;
  const Kernels* table;  // null where it is not part of this build
  bool runs;
};

// From the most to the least; the first is taken only when it is asked for.
std::vector<Candidate> candidates() {
  bool has_avx2 = false, has_avx512 = false, has_pairs = false;
#if defined(__x86_64__) || defined(_M_X64)
  has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("fma");
  has_pairs = has_avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return {{"avx512_bf16_emulated", FASTLORA_AVX512_BF16_EMULATED, has_avx512},
          {"avx512_bf16", FASTLORA_AVX512_BF16, has_pairs},
          {"avx512", FASTLORA_AVX512, has_avx512},
          {"avx2", FASTLORA_AVX2, has_avx2},
          {"portable", &portable::table, true}};
}

const Kernels& choose() {
  const char* variable = std::getenv("FASTLORA_CPU_ISA");
  const std::string limit = variable ? variable : "avx512_bf16";
  bool allowed = false;
  for (const Candidate& candidate : candidates()) {
    allowed = allowed || limit == candidate.name;
    if (allowed && candidate.table != nullptr && candidate.runs) return *candidate.table;
  }
  STD_TORCH_CHECK(false, "FASTLORA_CPU_ISA is '", limit, "'; accepted: avx512_bf16, avx512, avx2, portable");
  return portable::table;
}

const pid_t loaded_by = getpid();

std::string cpu_isa() { return kernels().name; }

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

bool in_forked_child() { return getpid() != loaded_by; }

}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&fastlora::cpu_isa)); }
