#include "simd_avx512.h"

#include "kernels.inl"

FEWBIT_ISA(isa_avx512, "avx512")
