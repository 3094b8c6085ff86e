// h = x A^T for a skinny A, any M, K, R; fp32 sums in a fixed order, so results repeat bit by bit.
#include <algorithm>
#include <cstdint>

#include "cuda/block.cuh"
#include "cuda/common.cuh"

namespace fastlora::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kRows = kThreads / kWarp * 4;  // rows of x per thread block: four per warp
constexpr int kRanks = 8;                    // columns of h per thread block
constexpr int kDepth = 128;                  // depth of one tile of A in shared memory

struct Problem {
  int64_t rows, depth, rank, ldx, lda;
};

// Stages A[first rank.., k..k + kDepth) as fp32; what lies outside reads as zero.
template <class T>
__device__ void stage(const T* a, const Problem& p, int64_t first_rank, int64_t k, float (*tile)[kDepth]) {
  for (int i = threadIdx.x; i < kRanks * kDepth; i += kThreads) {
    const int64_t r = first_rank + i / kDepth, column = k + i % kDepth;
    tile[i / kDepth][i % kDepth] = r < p.rank && column < p.depth ? to_float(a[r * p.lda + column]) : 0.0f;
  }
}

// Each lane sums its columns k = lane, lane + 32, ...; then the lanes of the warp are added in a butterfly.
template <class T>
__global__ void __launch_bounds__(kThreads)
    shrink_kernel(const T* __restrict__ x, const T* __restrict__ a, T* __restrict__ h, Problem p) {
  __shared__ float tile[kRanks][kDepth];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first_rank = static_cast<int64_t>(blockIdx.y) * kRanks;
  for (int64_t block = blockIdx.x; block * kRows < p.rows; block += gridDim.x) {
    const int64_t first_row = block * kRows + warp * 4;
    float sums[4][kRanks] = {};
    for (int64_t k = 0; k < p.depth; k += kDepth) {
      __syncthreads();
      stage(a, p, first_rank, k, tile);
      __syncthreads();
#pragma unroll
      for (int step = 0; step < kDepth; step += kWarp) {
        const int64_t column = k + step + lane;
        float value[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool inside = first_row + i < p.rows && column < p.depth;
          value[i] = inside ? to_float(x[(first_row + i) * p.ldx + column]) : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < kRanks; ++r) {
          const float factor = tile[r][step + lane];
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[i][r] = fmaf(value[i], factor, sums[i][r]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int r = 0; r < kRanks; ++r) {
        float sum = sums[i][r];
#pragma unroll
        for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        const int64_t row = first_row + i, rank = first_rank + r;
        if (lane == 0 && row < p.rows && rank < p.rank) h[row * p.rank + rank] = from_float<T>(sum);
      }
    }
  }
}

template <class T>
void launch(const Tensor& x, const Tensor& A, Tensor& h, const Problem& p, cudaStream_t stream) {
  const int64_t blocks = std::min<int64_t>((p.rows + kRows - 1) / kRows, 1 << 20);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>((p.rank + kRanks - 1) / kRanks));
  shrink_kernel<T><<<grid, kThreads, 0, stream>>>(static_cast<const T*>(x.const_data_ptr()),
                                                  static_cast<const T*>(A.const_data_ptr()),
                                                  static_cast<T*>(h.mutable_data_ptr()), p);
}

Tensor with_unit_columns(const Tensor& tensor) {
  return tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Tensor shrink(const Tensor& x_, const Tensor& A_) {
  STD_TORCH_CHECK(x_.dim() == 2, "x has ", x_.dim(), " dimensions; a matrix with 2 is needed");
  STD_TORCH_CHECK(A_.dim() == 2, "A has ", A_.dim(), " dimensions; a matrix with 2 is needed");
  STD_TORCH_CHECK(A_.scalar_type() == x_.scalar_type(), "A has dtype ", A_.scalar_type(), ", but x has ",
                  x_.scalar_type(), "; they must be the same");
  STD_TORCH_CHECK(A_.size(1) == x_.size(1), "A has ", A_.size(1), " columns, but x has ", x_.size(1), " (in_features)");
  STD_TORCH_CHECK(A_.is_cuda() && A_.get_device_index() == x_.get_device_index(), "A is not on the device of x");
  STD_TORCH_CHECK(A_.size(0) <= 65535 * kRanks, "A has ", A_.size(0), " rows; accepted: up to ", 65535 * kRanks);
  const torch::stable::accelerator::DeviceGuard guard(x_.get_device_index());
  const Tensor x = with_unit_columns(x_), A = with_unit_columns(A_);
  Tensor h = torch::stable::new_empty(x, {x.size(0), A.size(0)});
  const Problem p{x.size(0), x.size(1), A.size(0), x.stride(0), A.stride(0)};
  if (p.rows == 0 || p.rank == 0) return h;
  const cudaStream_t stream = current_stream(x.get_device_index());
  switch (x.scalar_type()) {
    case ScalarType::Float:
      launch<float>(x, A, h, p, stream);
      break;
    case ScalarType::Half:
      launch<__half>(x, A, h, p, stream);
      break;
    case ScalarType::BFloat16:
      launch<__nv_bfloat16>(x, A, h, p, stream);
      break;
    default:
      STD_TORCH_CHECK(false, "x has dtype ", x.scalar_type(), "; the CUDA operator takes Float, Half and BFloat16");
  }
  check_launch(cudaGetLastError(), "shrink");
  return h;
}

}  // namespace
}  // namespace fastlora::cuda

STABLE_TORCH_LIBRARY_IMPL(fastlora, CUDA, m) { m.impl("shrink", TORCH_BOX(&fastlora::cuda::shrink)); }
