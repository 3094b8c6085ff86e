// One vector of floats whose width follows the compiler flags. Files under isa/ are compiled several times with
// different flags and must not instantiate templates of the standard library: the linker could keep a copy of such a
// function that uses instructions which the processor lacks.
#pragma once
#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/floats.h"

#ifndef FASTLORA_ISA
#error "FASTLORA_ISA names the instruction set, see setup.py"
#endif

#define FASTLORA_INLINE inline __attribute__((always_inline))

namespace fastlora::FASTLORA_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
// With 32 registers a tile keeps 24 accumulators, with 16 registers 12.
constexpr int kAccumulators = kWidth == 16 ? 24 : 12;

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t VecU32 __attribute__((vector_size(4 * kWidth)));
typedef uint16_t VecU16 __attribute__((vector_size(2 * kWidth)));
typedef uint64_t VecU64 __attribute__((vector_size(4 * kWidth)));
typedef double VecHalfF64 __attribute__((vector_size(4 * kWidth)));

FASTLORA_INLINE Vec set1(float value) { return value - Vec{}; }

FASTLORA_INLINE VecU32 bits_of(Vec v) { return reinterpret_cast<VecU32>(v); }
FASTLORA_INLINE Vec float_of(VecU32 v) { return reinterpret_cast<Vec>(v); }

FASTLORA_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

FASTLORA_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

// The upper half of a float is a bfloat16.
FASTLORA_INLINE Vec load(const bf16* p) {
  VecU16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return float_of(__builtin_convertvector(v, VecU32) << 16);
}

// Of 2 * kWidth elements the even, or the odd, ones: less work than two loads. `zip` puts the columns in order again.
template <int Odd>
FASTLORA_INLINE Vec load_half(const bf16* p) {
  VecU32 v;
  __builtin_memcpy(&v, p, sizeof v);
  return float_of(Odd ? v & 0xffff0000u : v << 16);
}

// Rounds to nearest even; NaN becomes the quiet NaN that torch writes.
FASTLORA_INLINE VecU16 round_to_bf16(Vec v) {
  const VecU32 u = bits_of(v);
  const VecU32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU32 nan = reinterpret_cast<VecU32>(v != v);
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), VecU16);
}

#if defined(__AVX512BF16__)
// Whether the instruction below rounds v otherwise: it writes subnormal values as zero, and other quiet NaNs.
FASTLORA_INLINE uint32_t rounds_otherwise(Vec v) {
  constexpr int kQuiet = 0x01, kSubnormal = 0x20, kSignalling = 0x80;
  return _mm512_fpclass_ps_mask((__m512)v, kQuiet | kSubnormal | kSignalling);
}
FASTLORA_INLINE void store_rounded(bf16* p, Vec v) {
  const __m256bh u = _mm512_cvtneps_pbh((__m512)v);
  __builtin_memcpy(p, &u, sizeof u);
}
#endif

FASTLORA_INLINE void store(bf16* p, Vec v) {
  const VecU16 u = round_to_bf16(v);
  __builtin_memcpy(p, &u, sizeof u);
}

// Bits of a float16 to and from fp32, by hand where the target has no instruction for it. Subnormals go through an
// addition that lets the adder normalise, or round, them.
FASTLORA_INLINE float widen_bits(uint16_t bits) {
  constexpr uint32_t kExponent = 0x7c00u << 13, kMagic = 113u << 23;
  uint32_t u = (bits & 0x7fffu) << 13;
  const uint32_t exponent = u & kExponent;
  u += 112u << 23;
  float value;
  if (exponent == kExponent) u += 112u << 23;
  if (exponent == 0) {
    u += 1u << 23;
    float magic;
    __builtin_memcpy(&value, &u, sizeof value);
    __builtin_memcpy(&magic, &kMagic, sizeof magic);
    value -= magic;
    __builtin_memcpy(&u, &value, sizeof u);
  }
  u |= (bits & 0x8000u) << 16;
  __builtin_memcpy(&value, &u, sizeof value);
  return value;
}

FASTLORA_INLINE uint16_t narrow_bits(float value) {
  constexpr uint32_t kInfinity = 255u << 23, kTooLarge = 143u << 23, kSmallestNormal = 113u << 23;
  uint32_t u;
  __builtin_memcpy(&u, &value, sizeof u);
  const uint32_t sign = u & 0x80000000u;
  u ^= sign;
  if (u >= kTooLarge) {
    u = u > kInfinity ? 0x7e00u : 0x7c00u;
  } else if (u < kSmallestNormal) {
    __builtin_memcpy(&value, &u, sizeof value);
    value += 0.5f;
    __builtin_memcpy(&u, &value, sizeof u);
    u -= 126u << 23;
  } else {
    u = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(u | (sign >> 16));
}

FASTLORA_INLINE Vec widen_half(VecU16 u) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)u);  // the plain forms warn in GCC 12
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps((__m128i)u);
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = widen_bits(u[i]);
  return v;
#endif
}

FASTLORA_INLINE VecU16 narrow_half(Vec v) {
#if defined(__AVX512F__)
  return (VecU16)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (VecU16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  VecU16 u;
  for (int i = 0; i < kWidth; ++i) u[i] = narrow_bits(v[i]);
  return u;
#endif
}

FASTLORA_INLINE Vec load(const fp16* p) {
  VecU16 u;
  __builtin_memcpy(&u, p, sizeof u);
  return widen_half(u);
}

FASTLORA_INLINE void store(fp16* p, Vec v) {
  const VecU16 u = narrow_half(v);
  __builtin_memcpy(p, &u, sizeof u);
}

// Partial vectors: the first count elements, the others read as zero and are not written.
#if defined(__AVX512F__)
FASTLORA_INLINE Vec load(const float* p, int count) {
  return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
}
FASTLORA_INLINE void store(float* p, Vec v, int count) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
}
FASTLORA_INLINE Vec load(const bf16* p, int count) {
  const VecU16 u = (VecU16)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p);
  return float_of(__builtin_convertvector(u, VecU32) << 16);
}
FASTLORA_INLINE void store(bf16* p, Vec v, int count) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), (__m256i)round_to_bf16(v));
}
FASTLORA_INLINE Vec load(const fp16* p, int count) {
  return widen_half((VecU16)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p));
}
FASTLORA_INLINE void store(fp16* p, Vec v, int count) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), (__m256i)narrow_half(v));
}
#else
template <class T>
FASTLORA_INLINE Vec load(const T* p, int count) {
  T buffer[kWidth] = {};
  for (int i = 0; i < count; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
FASTLORA_INLINE void store(T* p, Vec v, int count) {
  T buffer[kWidth];
  store(buffer, v);
  for (int i = 0; i < count; ++i) p[i] = buffer[i];
}
#endif

// a * b + c in one rounding where the target can; by name, since the compiler contracts some copies of a loop only, and
// a row's result must not depend on the tile that it falls into.
FASTLORA_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

#if defined(__AVX512BF16__) || defined(FASTLORA_EMULATE_BF16)
#define FASTLORA_BF16_PAIRS 1

// Each lane of a and b holds two bfloat16; sum + a[1] * b[1] + a[0] * b[0], as the instruction does it: the upper pair
// first, each product exact, each sum rounded to nearest even, subnormal values taken and written as zero.
#if defined(FASTLORA_EMULATE_BF16)
FASTLORA_INLINE Vec flush(Vec v) {
  const VecU32 u = bits_of(v);
  const VecU32 subnormal = reinterpret_cast<VecU32>((u & 0x7f800000u) == 0);
  return float_of(u & ~(subnormal & 0x7fffffffu));
}
FASTLORA_INLINE Vec dot_pairs(Vec sum, VecU32 a, VecU32 b) {
  const Vec upper = flush(fma(flush(float_of(a & 0xffff0000u)), flush(float_of(b & 0xffff0000u)), flush(sum)));
  return flush(fma(flush(float_of(a << 16)), flush(float_of(b << 16)), upper));
}
#else
FASTLORA_INLINE Vec dot_pairs(Vec sum, VecU32 a, VecU32 b) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

// 2 * kWidth elements of a row as pairs; of a partial vector the first count, the others are zero.
FASTLORA_INLINE VecU32 load_pairs(const bf16* p) {
  VecU32 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FASTLORA_INLINE VecU32 load_pairs(const bf16* p, int count) {
  return (VecU32)_mm512_maskz_loadu_epi16((__mmask32)((uint64_t{1} << count) - 1), p);
}

// Pairs (upper[n], lower[n]) of two rows: of the first, or the last, four of each eight columns n.
template <int Last>
FASTLORA_INLINE VecU32 interleave_rows(VecU32 lower, VecU32 upper) {
  if constexpr (Last) {
    return (VecU32)_mm512_unpackhi_epi16((__m512i)lower, (__m512i)upper);
  } else {
    return (VecU32)_mm512_unpacklo_epi16((__m512i)lower, (__m512i)upper);
  }
}
// The first, or the last, half of the columns whose sums lie as `interleave_rows` left them.
template <int Last>
FASTLORA_INLINE Vec in_order(Vec first, Vec last) {
  const __m512i index = Last ? _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31)
                             : _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  return (Vec)_mm512_permutex2var_ps((__m512)first, index, (__m512)last);
}
#endif

// Products of the lower 32 bits of each 64-bit lane.
FASTLORA_INLINE VecU64 multiply_low(VecU64 a, VecU64 b) {
#if defined(__AVX512F__)
  return (VecU64)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);  // the plain form warns in GCC 12
#elif defined(__AVX2__)
  return (VecU64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (VecU64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Lanes 2l and 2l + 1 of the result are lanes 2l + Odd of a and of b.
template <int Odd>
FASTLORA_INLINE VecU64 interleave_pairs(VecU64 a, VecU64 b) {
  VecU64 index;
#pragma GCC unroll 8
  for (int lane = 0; lane < kWidth / 2; ++lane) index[lane] = (lane & 1 ? kWidth / 2 : 0) + lane / 2 * 2 + Odd;
#if defined(__clang__)
  VecU64 out;
  for (int lane = 0; lane < kWidth / 2; ++lane) out[lane] = (lane & 1 ? b : a)[lane / 2 * 2 + Odd];
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Bit l: whether lane l is at least the threshold; no bits above those of the lanes.
FASTLORA_INLINE uint32_t lanes_of_at_least(VecU32 v, uint32_t threshold) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epu32_mask((__m512i)v, _mm512_set1_epi32(static_cast<int>(threshold)));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)(v >= threshold)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)(v >= threshold)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kWidth; ++lane) bits |= static_cast<uint32_t>(v[lane] >= threshold) << lane;
  return bits;
#endif
}

// The lanes whose bits are set, the others zero.
FASTLORA_INLINE Vec kept(uint32_t bits, Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v);
#else
  VecU32 own;
#pragma GCC unroll 8
  for (int lane = 0; lane < kWidth; ++lane) own[lane] = 1u << lane;
  return float_of(reinterpret_cast<VecU32>((own & bits) != 0) & bits_of(v));
#endif
}

// out[l] = l has bit Step ? b[l - Step + Shift] : a[l + Shift], the two halves of one step of a transposed sum.
template <int Step, int Shift>
FASTLORA_INLINE Vec interleave(Vec a, Vec b) {
  typedef int32_t Index __attribute__((vector_size(4 * kWidth)));
  Index index;
#pragma GCC unroll 16
  for (int lane = 0; lane < kWidth; ++lane) {
    index[lane] = (lane & Step) ? kWidth + lane - Step + Shift : lane + Shift;
  }
#if defined(__clang__)
  Vec out;
  for (int lane = 0; lane < kWidth; ++lane) out[lane] = index[lane] < kWidth ? a[index[lane]] : b[index[lane] - kWidth];
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// even[0], odd[0], even[1], odd[1], ...: the first, or the last, kWidth of them.
template <int Last>
FASTLORA_INLINE Vec zip(Vec even, Vec odd) {
#if defined(__clang__)
  Vec out;
  for (int lane = 0; lane < kWidth; ++lane) out[lane] = (lane & 1 ? odd : even)[Last * kWidth / 2 + lane / 2];
  return out;
#else
  typedef int32_t Index __attribute__((vector_size(4 * kWidth)));
  Index index;
#pragma GCC unroll 16
  for (int lane = 0; lane < kWidth; ++lane) index[lane] = (lane & 1) * kWidth + Last * kWidth / 2 + lane / 2;
  return __builtin_shuffle(even, odd, index);
#endif
}

// Lane i of the result is the sum of the lanes of v[i * Step]; v holds kWidth vectors and is overwritten.
template <int Step = 1>
FASTLORA_INLINE Vec transposed_sum(Vec* v) {
  if constexpr (Step == kWidth) {
    return v[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i += 2 * Step) {
      v[i] = interleave<Step, 0>(v[i], v[i + Step]) + interleave<Step, Step>(v[i], v[i + Step]);
    }
    return transposed_sum<2 * Step>(v);
  }
}

}  // namespace fastlora::FASTLORA_ISA
