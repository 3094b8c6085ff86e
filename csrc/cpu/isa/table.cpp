// The dispatch table of one instruction set.
#include "cpu/isa/table.h"

#include "cpu/isa/vec.h"

#define FASTLORA_STRING_OF(name) #name
#define FASTLORA_STRING(name) FASTLORA_STRING_OF(name)

namespace fastlora::FASTLORA_ISA {

const Kernels table = {
    FASTLORA_STRING(FASTLORA_ISA),
    dot,
    outer,
#if defined(FASTLORA_BF16_PAIRS)
    dot_bf16,
    outer_bf16,
    keep_bf16,
#else
    nullptr,
    nullptr,
    nullptr,
#endif
    keep_bits,
    keep,
    signs,
    norms,
    {expand<float>, expand_kept<float>, moments<float>, dropout<float>, widen<float>, narrow<float>},
    {expand<bf16>, expand_kept<bf16>, moments<bf16>, dropout<bf16>, widen<bf16>, narrow<bf16>},
    {expand<fp16>, expand_kept<fp16>, moments<fp16>, dropout<fp16>, widen<fp16>, narrow<fp16>},
};

}  // namespace fastlora::FASTLORA_ISA
