"""CPU kernels for packed weights, in C++ (csrc/)."""

from fewbit.kernels.cpu import kernel as kernel
