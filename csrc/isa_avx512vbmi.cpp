// The AVX-512 code, compiled with the permutations and shifts of bytes of AVX-512 VBMI.
#include "simd_avx512.h"

#include "kernels.inl"

FEWBIT_ISA(isa_avx512vbmi, "avx512vbmi")
