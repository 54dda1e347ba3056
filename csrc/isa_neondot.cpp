#include "simd_neon.h"

#include "kernels.inl"

FEWBIT_ISA(isa_neondot, "neondot")
