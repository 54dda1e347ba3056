// The AVX2 code, compiled with the dot product of AVX-VNNI.
#include "simd_avx2.h"

#include "kernels.inl"

FEWBIT_ISA(isa_avxvnni, "avxvnni")
