// One pass over the rows in each direction, after the library's matmul: lora_forward_ and lora_backward_.
#pragma once
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/memory.h"

namespace fastlora {

using Gradients = std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>>;

std::tuple<Tensor, std::vector<Tensor>> lora_forward_(std::vector<Tensor> y, const Tensor& x,
                                                      const std::vector<Tensor>& A, const std::optional<Tensor>& P,
                                                      const std::vector<Tensor>& B, const std::vector<int64_t>& outputs,
                                                      const std::vector<int64_t>& columns,
                                                      const std::vector<double>& scales, bool moments,
                                                      const std::optional<Tensor>& seed, double p,
                                                      const std::vector<int64_t>& streams);

Gradients lora_backward_(std::optional<Tensor> dx, const std::vector<Tensor>& dy, const Tensor& x, const Tensor& h,
                         const std::vector<Tensor>& A, const std::vector<Tensor>& B,
                         const std::vector<int64_t>& outputs, const std::vector<int64_t>& columns,
                         const std::vector<double>& scales, int64_t probes, bool need_dA, bool need_dB,
                         const std::optional<Tensor>& seed, double p, const std::vector<int64_t>& streams);

}  // namespace fastlora
