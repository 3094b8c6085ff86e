// Numbers of any floating-point type as fp32, by their C++ type or, in tables of many matrices, by a tag.
#pragma once
#include <cstdint>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace fastlora::cuda {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

enum class Number : int32_t { kFloat, kHalf, kBFloat16, kDouble };

__device__ __forceinline__ float load_number(const void* data, Number type, int64_t index) {
  switch (type) {
    case Number::kHalf:
      return to_float(static_cast<const __half*>(data)[index]);
    case Number::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
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
      static_cast<__half*>(data)[index] = from_float<__half>(value);
      break;
    case Number::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(value);
      break;
    default:
      static_cast<float*>(data)[index] = value;
  }
}

}  // namespace fastlora::cuda
