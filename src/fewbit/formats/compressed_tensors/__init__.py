"""The format of compressed-tensors, with a module for its config and one for each kind of numbers."""

from fewbit.formats.compressed_tensors.format import CompressedTensors

__all__ = ["CompressedTensors"]
