// What the files of this folder define for the instruction set FASTLORA_ISA; see cpu/kernels.h for the formulas.
#pragma once
#include "cpu/kernels.h"

namespace fastlora::FASTLORA_ISA {

extern const Kernels table;

void dot(const float* x, int64_t ldx, int64_t rows, const float* a, int64_t lda, int64_t rank, int64_t depth, float* s,
         int64_t lds);
void outer(const float* d, int64_t ldd, int64_t rank, const float* x, int64_t ldx, int64_t rows, int64_t columns,
           float* g, int64_t ldg);
void dot_bf16(const bf16* x, int64_t ldx, int64_t rows, const bf16* a, int64_t lda, int64_t rank, int64_t depth,
              float* s, int64_t lds);
void outer_bf16(const bf16* d, int64_t ldd, int64_t rank, const bf16* x, int64_t ldx, int64_t rows, int64_t columns,
                float* g, int64_t ldg);
void keep_bits(int64_t columns, const DropoutRow& row, int64_t rows, uint32_t* bits);
void keep(const float* x, const uint32_t* bits, float* out, int64_t count);
void keep_bf16(const bf16* x, const uint32_t* bits, bf16* out, int64_t count);
void signs(uint64_t first, const DropoutRow& row, int64_t counters, float* out);
void norms(const float* t, int64_t count, double* squares, double* absolute);
template <class T>
void expand(const float* s, int64_t lds, int64_t rows, const float* b, int64_t ldb, int64_t rank, int64_t columns, T* y,
            int64_t ldy);
template <class T>
void expand_kept(const float* s, int64_t lds, int64_t rows, const float* b, int64_t ldb, const Kept* parts,
                 int64_t count, int64_t columns, T* y, int64_t ldy);
template <class T>
void moments(const T* y, int64_t ldy, int64_t rows, int64_t columns, double* sum, double* squares);
template <class T>
void dropout(const T* x, const uint32_t* bits, float scale, T* out, int64_t count);
template <class T>
void widen(const T* from, float* to, int64_t count);
template <class T>
void narrow(const float* from, T* to, int64_t count);

}  // namespace fastlora::FASTLORA_ISA
