// What Philox4x32-10 decides: dropout, whose mask is a function of (seed, projection, row, column), and signs.
#include "cpu/isa/table.h"
#include "cpu/isa/vec.h"

namespace fastlora::FASTLORA_ISA {
namespace {

// Counters per vector: each 64-bit lane holds one 32-bit word, whose upper half may hold anything.
constexpr int kCounters = kWidth / 2;
constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;

FASTLORA_INLINE VecU64 splat(uint64_t value) { return VecU64{} + value; }

// bits[4 * i + w] is word w of the counter (first + i, row, row >> 32, projection).
FASTLORA_INLINE void philox(uint64_t first, const DropoutRow& row, uint32_t* bits) {
  VecU64 c0 = splat(first);
  for (int i = 0; i < kCounters; ++i) c0[i] += static_cast<uint64_t>(i);
  VecU64 c1 = splat(static_cast<uint64_t>(row.row) & 0xffffffffu);
  VecU64 c2 = splat(static_cast<uint64_t>(row.row) >> 32);
  VecU64 c3 = splat(row.projection);
  uint32_t key0 = static_cast<uint32_t>(row.seed), key1 = static_cast<uint32_t>(row.seed >> 32);
  const VecU64 multiplier0 = splat(kMultiplier0), multiplier1 = splat(kMultiplier1);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const VecU64 product0 = multiply_low(c0, multiplier0), product1 = multiply_low(c2, multiplier1);
    c0 = (product1 >> 32) ^ c1 ^ splat(key0);
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ splat(key1);
    c3 = product0;
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  const VecU64 low = (c0 & 0xffffffffu) | (c1 << 32), high = (c2 & 0xffffffffu) | (c3 << 32);
  uint64_t words[2 * kCounters];
  for (int i = 0; i < kCounters; ++i) {
    words[2 * i] = low[i];
    words[2 * i + 1] = high[i];
  }
  __builtin_memcpy(bits, words, sizeof words);
}

FASTLORA_INLINE Vec multiplier(const uint32_t* bits, const DropoutRow& row) {
  VecU32 u;
  __builtin_memcpy(&u, bits, sizeof u);
  const VecU32 keep = reinterpret_cast<VecU32>(u >= row.threshold);
  return float_of(keep & bits_of(set1(row.scale)));
}

}  // namespace

template <class T>
void dropout(const T* x, T* out, int64_t columns, const DropoutRow& row) {
  constexpr int kChunk = 4 * kCounters;
  uint32_t bits[kChunk];
  for (int64_t k = 0; k < columns; k += kChunk) {
    philox(static_cast<uint64_t>(k / 4), row, bits);
    for (int part = 0; part < kChunk && k + part < columns; part += kWidth) {
      const int64_t at = k + part, rest = columns - at;
      const Vec factor = multiplier(bits + part, row);
      if (rest >= kWidth) {
        store(out + at, load(x + at) * factor);
      } else {
        store(out + at, load(x + at, static_cast<int>(rest)) * factor, static_cast<int>(rest));
      }
    }
  }
}

void signs(uint64_t first, const DropoutRow& row, int64_t counters, float* out) {
  constexpr int kWords = 4 * kCounters;
  uint32_t bits[kWords];
  VecU32 lane{};
  for (int i = 0; i < kWidth; ++i) lane[i] = static_cast<uint32_t>(i);
  for (int64_t done = 0; done < counters; done += kCounters) {
    philox(first + static_cast<uint64_t>(done), row, bits);
    const int64_t words = counters - done < kCounters ? 4 * (counters - done) : kWords;
    for (int64_t w = 0; w < words; ++w, out += 32) {
      for (int part = 0; part < 32; part += kWidth) {
        const VecU32 bit = ((VecU32{} + (bits[w] >> part)) >> lane) << 31;
        store(out + part, float_of(bit | bits_of(set1(1.0f))));
      }
    }
  }
}

template void dropout<float>(const float*, float*, int64_t, const DropoutRow&);
template void dropout<bf16>(const bf16*, bf16*, int64_t, const DropoutRow&);
template void dropout<fp16>(const fp16*, fp16*, int64_t, const DropoutRow&);

}  // namespace fastlora::FASTLORA_ISA
