// Which rows of a mixed batch belong to which adapter, without a word to the host.
#include "cuda/segments.cuh"

#include <tuple>

#include "cuda/common.cuh"

namespace fastlora::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t* pointer(Tensor& tensor) { return static_cast<int64_t*>(tensor.mutable_data_ptr()); }
const int64_t* pointer(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }

std::tuple<Tensor, Tensor> build_segments(const Tensor& ids_, int64_t adapters) {
  STD_TORCH_CHECK(ids_.dim() == 1 && ids_.scalar_type() == ScalarType::Long, "ids has ", ids_.dim(),
                  " dimensions and dtype ", ids_.scalar_type(), "; a Long vector with one id per row is needed");
  STD_TORCH_CHECK(adapters >= 0 && adapters < (int64_t{1} << 31) - 1, "adapters is ", adapters,
                  "; accepted: 0 to 2^31 - 2");
  const torch::stable::accelerator::DeviceGuard guard(ids_.get_device_index());
  const Tensor ids = torch::stable::contiguous(ids_);
  const SortProblem p = sort_problem(ids.numel(), adapters);
  Tensor order = torch::stable::new_empty(ids, {p.rows});
  Tensor ranges = torch::stable::new_empty(ids, {adapters, 2});
  Tensor counts = torch::stable::new_empty(ids, {adapters + 1, p.chunks});
  Tensor totals = torch::stable::new_empty(ids, {2, adapters + 1});
  const cudaStream_t stream = current_stream(ids.get_device_index());
  check_launch(sort_rows(pointer(ids), pointer(counts), pointer(totals), pointer(totals) + adapters + 1, pointer(order),
                         pointer(ranges), p, stream),
               "build_segments");
  return {order, ranges};
}

Tensor segment_tiles(const Tensor& ranges_, int64_t rows, int64_t block) {
  STD_TORCH_CHECK(ranges_.dim() == 2 && ranges_.size(1) == 2 && ranges_.scalar_type() == ScalarType::Long,
                  "ranges has ", ranges_.dim(), " dimensions and dtype ", ranges_.scalar_type(),
                  "; a Long matrix [adapters, 2] is needed");
  STD_TORCH_CHECK(rows >= 0, "rows is ", rows, "; accepted: 0 or more");
  STD_TORCH_CHECK(block >= 1, "block is ", block, "; accepted: 1 or more");
  const torch::stable::accelerator::DeviceGuard guard(ranges_.get_device_index());
  const Tensor ranges = torch::stable::contiguous(ranges_);
  const int64_t adapters = ranges.size(0), count = rows / block + (rows % block != 0) + adapters;
  Tensor tiles = torch::stable::new_empty(ranges, {count, 2});
  if (count == 0) return tiles;
  Tensor ends = torch::stable::new_empty(ranges, {adapters});
  const cudaStream_t stream = current_stream(ranges.get_device_index());
  check_launch(write_tiles(pointer(ranges), pointer(ends), pointer(tiles), adapters, block, count, stream),
               "segment_tiles");
  return tiles;
}

}  // namespace
}  // namespace fastlora::cuda

STABLE_TORCH_LIBRARY_IMPL(fastlora, CUDA, m) {
  m.impl("build_segments", TORCH_BOX(&fastlora::cuda::build_segments));
  m.impl("segment_tiles", TORCH_BOX(&fastlora::cuda::segment_tiles));
}
