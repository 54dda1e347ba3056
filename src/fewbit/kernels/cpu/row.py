"""Decode single rows of a packed weight by the CPU library: an embedding needs one for each token."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbit.errors import KernelError
from fewbit.kernels.cpu.kernel import weights_of
from fewbit.schemes.base import Codec
from fewbit.system import native


class Row:
    """Gives rows of a weight [N, K] in float32. KernelError without the library, or for another format."""

    def __init__(self, codec: Codec, prepared: tuple[Tensor, ...], shape: tuple[int, int]) -> None:
        """prepared: the device tensors of the kernel `cpu`."""
        lib, weights = native.library(), weights_of(codec, prepared, shape)
        if isinstance(lib, str):
            raise KernelError(lib, native.HINT)
        if len(weights) != 1:
            raise KernelError(f"{codec} has no single rows")
        self._kept, self._decode, self._count = prepared, lib.fewbit_decode, shape[0]
        self._places = [part.data_ptr() for part in prepared]
        ((self._weight, _),) = weights
        columns = int(lib.fewbit_columns(self._weight))
        if columns < shape[1]:
            raise KernelError(f"the CPU library does not read rows of {codec}")
        # Rows are decoded in the library's order of columns. The numbers of the columns show where each is.
        numbers = torch.arange(1, shape[1] + 1, dtype=torch.float32, device="cpu")
        arranged = torch.empty(columns, dtype=torch.float32, device="cpu")
        lib.fewbit_arrange(self._weight, numbers.data_ptr(), 1, arranged.data_ptr(), 1)
        self._order = arranged.argsort()[columns - shape[1] :]  # behind the padding, which is 0
        self._decoded = torch.empty(columns, dtype=torch.float32, device="cpu")

    def moved(self) -> bool:
        """Whether a tensor has another address by now: then rows must not be read any more."""
        return [part.data_ptr() for part in self._kept] != self._places

    def __call__(self, index: int) -> Tensor:
        if not 0 <= index < self._count:
            raise KernelError(f"row {index} of {self._count}")
        if status := self._decode(self._weight, index, index + 1, self._decoded.data_ptr(), 1):
            raise KernelError(f"the CPU library rejects a row: status {status}")
        return self._decoded[self._order]
