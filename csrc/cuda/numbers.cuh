// Numbers of any floating-point type as fp32, by a tag in tables of many matrices.
#pragma once
#include <cstdint>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace fastlora::cuda {

enum class Number : int32_t { kFloat, kHalf, kBFloat16, kDouble };

__device__ __forceinline__ float load_number(const void* data, Number type, int64_t index) {
  switch (type) {
    case Number::kHalf:
      return __half2float(static_cast<const __half*>(data)[index]);
    case Number::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

__device__ __forceinline__ double load_double(const void* data, Number type, int64_t index) {
  return type == Number::kDouble ? static_cast<const double*>(data)[index] : load_number(data, type, index);
}

__device__ __forceinline__ void store_number(void* data, Number type, int64_t index, float value) {
  switch (type) {
    case Number::kHalf:
      static_cast<__half*>(data)[index] = __float2half_rn(value);
      break;
    case Number::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16_rn(value);
      break;
    default:
      static_cast<float*>(data)[index] = value;
  }
}

}  // namespace fastlora::cuda
