"""Products by packed weights on a CPU, in C++ (csrc/)."""

from fewbit.kernels.cpu import kernel as kernel
