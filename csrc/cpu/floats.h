// The narrow floating-point types as plain bits, so that kernels need no header of torch.
#pragma once
#include <cstdint>

namespace fastlora {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

}  // namespace fastlora
