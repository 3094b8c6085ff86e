// What Philox4x32-10 decides: dropout, whose mask is a function of (seed, projection, row, column), and signs.
#include "cpu/isa/table.h"
#include "cpu/isa/vec.h"

namespace fastlora::FASTLORA_ISA {
namespace {

// Counters per vector: each 64-bit lane holds one 32-bit word, whose upper half may hold anything.
constexpr int kCounters = kWidth / 2;
// Words of as many counters, one of a column each.
constexpr int kWords = 4 * kCounters;
constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;

FASTLORA_INLINE VecU64 splat(uint64_t value) { return VecU64{} + value; }

// words[2 * g], words[2 * g + 1]: the words of the counters (first + g * kCounters + i, row, row >> 32, projection),
// one counter after another. Groups advance side by side, since one waits for its products most of the time.
template <int Groups>
FASTLORA_INLINE void philox(uint64_t first, const DropoutRow& row, VecU32* words) {
  VecU64 c0[Groups], c1[Groups], c2[Groups], c3[Groups];
  // Even lanes hold the first half of the counters: interleaving whole lanes then puts all words in order.
  VecU64 lanes{};
  for (int i = 0; i < kCounters; ++i) lanes[i] = static_cast<uint64_t>(i % 2 ? (kCounters + i) / 2 : i / 2);
#pragma GCC unroll 6
  for (int g = 0; g < Groups; ++g) {
    c0[g] = splat(first + static_cast<uint64_t>(g * kCounters)) + lanes;
    c1[g] = splat(static_cast<uint64_t>(row.row) & 0xffffffffu);
    c2[g] = splat(static_cast<uint64_t>(row.row) >> 32);
    c3[g] = splat(row.projection);
  }
  uint32_t key0 = static_cast<uint32_t>(row.seed), key1 = static_cast<uint32_t>(row.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 6
    for (int g = 0; g < Groups; ++g) {
      const VecU64 product0 = multiply_low(c0[g], splat(kMultiplier0));
      const VecU64 product1 = multiply_low(c2[g], splat(kMultiplier1));
      c0[g] = (product1 >> 32) ^ c1[g] ^ splat(key0);
      c1[g] = product1;
      c2[g] = (product0 >> 32) ^ c3[g] ^ splat(key1);
      c3[g] = product0;
    }
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
#pragma GCC unroll 6
  for (int g = 0; g < Groups; ++g) {
    const VecU64 low = (c0[g] & 0xffffffffu) | (c1[g] << 32), high = (c2[g] & 0xffffffffu) | (c3[g] << 32);
    words[2 * g] = reinterpret_cast<VecU32>(interleave_pairs<0>(low, high));
    words[2 * g + 1] = reinterpret_cast<VecU32>(interleave_pairs<1>(low, high));
  }
}

// The bits of 32 * Count columns of rows from `from` on, `stride` words apart: rows in the inner loop, since what the
// first rounds make of a column is the same for all of them.
template <int Count>
FASTLORA_INLINE void keep_words(uint64_t first, const DropoutRow& from, int64_t rows, uint32_t* bits, int64_t stride) {
  constexpr int kGroups = 32 / kWords * Count;
  for (int64_t m = 0; m < rows; ++m, bits += stride) {
    DropoutRow row = from;
    row.row += m;
    VecU32 words[2 * kGroups];
    philox<kGroups>(first, row, words);
#pragma GCC unroll 6
    for (int w = 0; w < Count; ++w) {
      uint32_t kept = 0;
#pragma GCC unroll 8
      for (int v = 0; v < 32 / kWidth; ++v) {
        kept |= lanes_of_at_least(words[w * (32 / kWidth) + v], row.threshold) << (v * kWidth);
      }
      bits[w] = kept;
    }
  }
}

// out[k] = f(x[k] where it is kept, else 0)
template <class T, class F>
FASTLORA_INLINE void for_kept(const T* x, const uint32_t* bits, T* out, int64_t count, const F& f) {
  for (int64_t k = 0; k < count; k += kWidth) {
    const uint32_t some = bits[k / 32] >> (k % 32);
    if (count - k >= kWidth) {
      store(out + k, f(kept(some, load(x + k))));
    } else {
      const int rest = static_cast<int>(count - k);
      store(out + k, f(kept(some, load(x + k, rest))), rest);
    }
  }
}

}  // namespace

void keep_bits(int64_t columns, const DropoutRow& row, int64_t rows, uint32_t* bits) {
  const int64_t words = (columns + 31) / 32;
  const auto first = [](int64_t w) { return static_cast<uint64_t>(8 * w); };
  int64_t w = 0;
  // As many groups side by side as there are registers for.
#if defined(__AVX512F__)
  for (; w + 6 <= words; w += 6) keep_words<6>(first(w), row, rows, bits + w, words);
  for (; w + 2 <= words; w += 2) keep_words<2>(first(w), row, rows, bits + w, words);
#endif
  for (; w < words; ++w) keep_words<1>(first(w), row, rows, bits + w, words);
}

void keep(const float* x, const uint32_t* bits, float* out, int64_t count) {
  for_kept(x, bits, out, count, [](Vec v) { return v; });
}

#if defined(FASTLORA_BF16_PAIRS)
void keep_bf16(const bf16* x, const uint32_t* bits, bf16* out, int64_t count) {
  for (int64_t k = 0; k < count; k += 32) {
    const uint32_t all = count - k < 32 ? (1u << (count - k)) - 1 : ~0u;
    _mm512_mask_storeu_epi16(out + k, all, _mm512_maskz_loadu_epi16(all & bits[k / 32], x + k));
  }
}
#endif

template <class T>
void dropout(const T* x, const uint32_t* bits, float scale, T* out, int64_t count) {
  for_kept(x, bits, out, count, [scale](Vec v) { return v * scale; });
}

void signs(uint64_t first, const DropoutRow& row, int64_t counters, float* out) {
  VecU32 lane{};
  for (int i = 0; i < kWidth; ++i) lane[i] = static_cast<uint32_t>(i);
  for (int64_t done = 0; done < counters; done += kCounters) {
    VecU32 vectors[2];
    philox<1>(first + static_cast<uint64_t>(done), row, vectors);
    uint32_t bits[kWords];
    __builtin_memcpy(bits, vectors, sizeof bits);
    const int64_t words = counters - done < kCounters ? 4 * (counters - done) : kWords;
    for (int64_t w = 0; w < words; ++w, out += 32) {
      for (int part = 0; part < 32; part += kWidth) {
        const VecU32 bit = ((VecU32{} + (bits[w] >> part)) >> lane) << 31;
        store(out + part, float_of(bit | bits_of(set1(1.0f))));
      }
    }
  }
}

template void dropout<float>(const float*, const uint32_t*, float, float*, int64_t);
template void dropout<bf16>(const bf16*, const uint32_t*, float, bf16*, int64_t);
template void dropout<fp16>(const fp16*, const uint32_t*, float, fp16*, int64_t);

}  // namespace fastlora::FASTLORA_ISA
