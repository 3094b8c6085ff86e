// What the tracker's statistics need on the CPU: probe signs, and norms of a tile of a weight gradient.
#include "cpu/checks.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "sample.h"

namespace fastlora {

void fold_sample(const Sample& sample, const SampleAverages& averages);  // multi_tensor.cpp

namespace {

constexpr int64_t kSignsPerCounter = 128;

bool fits_word(int64_t value) { return value >= 0 && value <= 0xffffffffll; }

void write_signs(float* out, uint64_t seed, int64_t step, int64_t first, int64_t tag,
                 const std::vector<int64_t>& counts) {
  DropoutRow row{};
  row.seed = seed;
  row.projection = static_cast<uint32_t>(tag);
  for (size_t group = 0; group < counts.size(); ++group) {
    const uint64_t word = static_cast<uint64_t>(first) + group;
    row.row = static_cast<int64_t>((word << 32) | static_cast<uint64_t>(step));
    kernels().signs(0, row, counts[group], out);
    out += counts[group] * kSignsPerCounter;
  }
}

// out: 128 signs for each counter (i, step, first + group, tag), i < counts[group]
void philox_signs_(Tensor out, const Tensor& seed, int64_t step, int64_t first, int64_t tag,
                   const std::vector<int64_t>& counts) {
  STD_TORCH_CHECK(out.dim() == 1 && out.scalar_type() == ScalarType::Float && out.is_contiguous(), "out has dtype ",
                  out.scalar_type(), " and ", out.dim(), " dimensions; a contiguous Float vector is ", "needed");
  STD_TORCH_CHECK(
      fits_word(step) && fits_word(tag) && fits_word(first) && fits_word(first + static_cast<int64_t>(counts.size())),
      "step is ", step, ", first ", first, ", tag ", tag, "; accepted: 0 to 2^32 - 1");
  int64_t total = 0;
  for (const int64_t count : counts) {
    STD_TORCH_CHECK(count >= 0, "counts has ", count, "; accepted: 0 or more");
    total += count;
  }
  STD_TORCH_CHECK(out.numel() == total * kSignsPerCounter, "out has ", out.numel(), " elements; counts need ",
                  total * kSignsPerCounter);
  write_signs(static_cast<float*>(out.mutable_data_ptr()), read_seed(seed), step, first, tag, counts);
}

// sums += [sum of tile^2, sum of |tile|]
void add_norms_(Tensor sums, const Tensor& tile) {
  STD_TORCH_CHECK(
      sums.dim() == 1 && sums.size(0) == 2 && sums.scalar_type() == ScalarType::Double && sums.is_contiguous(),
      "sums has dtype ", sums.scalar_type(), "; a contiguous Double vector of 2 is needed");
  STD_TORCH_CHECK(tile.scalar_type() == ScalarType::Float && tile.is_contiguous(), "tile has dtype ",
                  tile.scalar_type(), "; a contiguous Float tensor is needed");
  double* out = static_cast<double*>(sums.mutable_data_ptr());
  const float* data = static_cast<const float*>(tile.const_data_ptr());
  const Parts parts(tile.numel() / 16, 64);
  const Scratch<double> partial(2 * parts.count);
  std::fill_n(partial.get(), 2 * parts.count, 0.0);
  parts.run([&](int64_t part, int64_t begin, int64_t end) {
    const int64_t stop = part + 1 == parts.count ? tile.numel() : 16 * end;
    kernels().norms(data + 16 * begin, stop - 16 * begin, partial.get() + 2 * part, partial.get() + 2 * part + 1);
  });
  for (int64_t part = 0; part < parts.count; ++part) {
    out[0] += partial.get()[2 * part];
    out[1] += partial.get()[2 * part + 1];
  }
}

const SampleCalls calls{SampleCalls::kFormat, &fold_sample, &write_signs};

int64_t sample_calls() { return reinterpret_cast<int64_t>(&calls); }

}  // namespace
}  // namespace fastlora

STABLE_TORCH_LIBRARY_IMPL(fastlora, CompositeExplicitAutograd, m) {
  m.impl("sample_calls", TORCH_BOX(&fastlora::sample_calls));
}

STABLE_TORCH_LIBRARY_IMPL(fastlora, CPU, m) {
  m.impl("philox_signs_", TORCH_BOX(&fastlora::philox_signs_));
  m.impl("add_norms_", TORCH_BOX(&fastlora::add_norms_));
}
