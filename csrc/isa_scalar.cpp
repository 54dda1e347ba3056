#include "simd_scalar.h"

#include "kernels.inl"

FEWBIT_ISA(isa_scalar, "scalar")
