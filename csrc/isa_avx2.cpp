#include "simd_avx2.h"

#include "kernels.inl"

FEWBIT_ISA(isa_avx2, "avx2")
