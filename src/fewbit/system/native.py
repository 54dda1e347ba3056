"""Finds and loads the native CPU library, and connects it to torch's threads.

The library is in `fewbit/native/` if a C++ compiler was available at installation. With an editable install it is in
site-packages. The environment variable `FEWBIT_CPU_LIBRARY` gives another file (`none`: do not use the library).
`FEWBIT_CPU_ISA` selects an instruction set (`scalar`, `avx2`, `avxvnni`, `avx512`, `avx512vbmi`, `neon`,
`neondot`) instead of the best one.

The library runs on the threads of the OpenMP runtime that torch has loaded, which it finds awake after torch's
operations. While these get no cores, because other programs compute, it runs on threads of its own
(`csrc/threads.cpp`).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fewbit.lazy import Tensor, torch

_ABI = 14
_FILE = "fewbit_cpu.so"
TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}  # `fewbit_type`, by torch's names
HINT = "Install fewbit from source with a C++ compiler (gcc 9, clang 10 or later), or from a wheel with the library."


class Weight(ctypes.Structure):
    """`fewbit_weight` of csrc/fewbit.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("part", ctypes.c_void_p * 6),
        ("bytes", ctypes.c_int64 * 6),
    )


class Fp8(ctypes.Structure):
    """`fewbit_fp8` of csrc/fewbit.h."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("w", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("top", ctypes.c_void_p),
        ("lost", ctypes.c_void_p),
    )


class Vectors(ctypes.Structure):
    """`fewbit_vectors` of csrc/fewbit.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("entries", "columns", "halves", "even", "magnitudes", "tries")),
        *((name, ctypes.c_int64) for name in ("rows", "vectors")),
        *((name, ctypes.c_void_p) for name in ("grid", "ranks", "x", "h")),
        ("step", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("s", "metric", "least", "square", "cross", "codes")),
    )


class Rows(ctypes.Structure):
    """`fewbit_rows` of csrc/fewbit.h."""

    _fields_ = (("w", ctypes.POINTER(Weight)), ("bias", ctypes.c_void_p), ("order", ctypes.c_void_p))


class Norm(ctypes.Structure):
    """`fewbit_norm` of csrc/fewbit.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        ("eps", ctypes.c_float),
        ("centered", ctypes.c_int32),
    )


class Block(ctypes.Structure):
    """`fewbit_block` of csrc/fewbit.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("type", "activation", "pairs", "whole")),
        *((name, ctypes.c_int32) for name in ("late", "mixed", "parallel", "plain", "together")),
        ("counts", ctypes.c_int32 * 4),
        *((name, ctypes.c_int64) for name in ("width", "inner", "heads", "shared", "head", "rotated")),
        *((name, ctypes.c_float) for name in ("scale", "cap", "residual")),
        ("norm", Norm * 6),
        ("sinks", ctypes.c_void_p),
        ("products", Rows * 3 * 4),
    )


class Pages(ctypes.Structure):
    """`fewbit_pages` of csrc/fewbit.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("write", "read", "begin", "count")),
        *((name, ctypes.c_int64) for name in ("step", "most")),
    )


class Call(ctypes.Structure):
    """`fewbit_call` of csrc/fewbit.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "filled", "length")),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine")),
        ("turn", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "allowed", "added")),
        *((name, ctypes.c_int64) for name in ("text", "row")),
        ("pages", ctypes.POINTER(Pages)),
    )


@cache
def available() -> ctypes.CDLL | str:
    """The library, which loads without torch but does not compute yet, or a sentence that says why there is none."""
    path = where()
    if isinstance(path, str):
        return path
    try:
        found = ctypes.CDLL(str(path))
        abi = int(found.fewbit_abi())
    except (OSError, AttributeError) as error:
        return f"the CPU library cannot be loaded: {error}"
    if abi != _ABI:
        return f"the CPU library is of another version of fewbit (its interface is {abi}, {_ABI} is needed)"
    return found


@cache
def library() -> ctypes.CDLL | str:
    """The library, ready to compute on torch's threads, or a sentence that says why there is none."""
    torch.get_num_threads()  # loads torch: its OpenMP runtime is looked for below
    if isinstance(found := available(), str):
        return found
    weight, number, pointer = ctypes.POINTER(Weight), ctypes.c_int64, ctypes.c_void_p
    signatures: dict[str, tuple[object, list[object]]] = {
        "fewbit_isa": (ctypes.c_char_p, []),
        "fewbit_force": (ctypes.c_int, [ctypes.c_char_p]),
        "fewbit_use_openmp": (None, [pointer]),
        "fewbit_columns": (number, [weight]),
        "fewbit_linear": (ctypes.c_int, [weight, pointer, number, pointer, ctypes.c_int, ctypes.c_int]),
        "fewbit_grouped": (
            ctypes.c_int,
            [weight, number, pointer, pointer, pointer, number, pointer, ctypes.c_int, ctypes.c_int],
        ),
        "fewbit_decode": (ctypes.c_int, [weight, number, number, pointer, ctypes.c_int]),
        "fewbit_arrange": (ctypes.c_int, [weight, pointer, number, pointer, ctypes.c_int]),
        "fewbit_fp8_codes": (ctypes.c_int, [ctypes.POINTER(Fp8), ctypes.c_int]),
        "fewbit_fp8_lost": (ctypes.c_int, [ctypes.POINTER(Fp8), ctypes.c_int]),
        "fewbit_nearest_vectors": (ctypes.c_int, [ctypes.POINTER(Vectors), ctypes.c_int]),
        "fewbit_decode_block": (ctypes.c_int, [ctypes.POINTER(Block), ctypes.POINTER(Call), ctypes.c_int]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    # torch loads its OpenMP runtime with global symbols. Without one, the library uses threads of its own.
    with contextlib.suppress(AttributeError, TypeError, OSError):
        found.fewbit_use_openmp(ctypes.cast(ctypes.CDLL(None).GOMP_parallel, pointer))
    return found


def fp8_codes(w: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """Codes (uint8) of w [N, K] by FP8's plain scale, and the largest magnitude of each block of rows and columns.

    None if the library is missing, or w is not a contiguous float32 or bfloat16 on the CPU.
    """
    if not _takes(w):
        return None
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    top = torch.empty(_blocks(w, block), dtype=torch.float32, device="cpu")
    _fp8("fewbit_fp8_codes", w, block, codes=codes, top=top)
    return codes, top


def fp8_lost(w: Tensor, codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor | None:
    """Sums over w [N, K]: of the codes' squared error, of w², and the number of groups that became 0. float64 [3].

    None if the library is missing, or cannot read a tensor as it is.
    """
    fits = codes.shape == w.shape and scale.shape == _blocks(w, block)
    fits = fits and codes.dtype == torch.uint8 and scale.dtype == torch.float32
    if not (_takes(w) and fits and all(each.is_cpu and each.is_contiguous() for each in (codes, scale))):
        return None
    lost = torch.empty(scale.shape[0], 3, dtype=torch.float64, device="cpu")
    _fp8("fewbit_fp8_lost", w, block, codes=codes, scale=scale, lost=lost)
    return lost.sum(0)


def _blocks(w: Tensor, block: tuple[int, int]) -> tuple[int, int]:
    return -(-w.shape[0] // block[0]), -(-w.shape[1] // block[1])


def _takes(w: Tensor) -> bool:
    whole = w.is_cpu and w.is_contiguous() and w.dtype in (torch.float32, torch.bfloat16) and w.numel() > 0
    return whole and not isinstance(library(), str)


def _fp8(function: str, w: Tensor, block: tuple[int, int], **parts: Tensor) -> None:
    kind, places = TYPES[str(w.dtype).removeprefix("torch.")], {name: part.data_ptr() for name, part in parts.items()}
    status = getattr(library(), function)(
        Fp8(kind, *w.shape, *block, w=w.data_ptr(), **places), torch.get_num_threads()
    )
    assert status == 0, f"{function}: {status}"


@dataclass(frozen=True)
class Book:
    """A codebook: magnitudes float32 [columns, entries], their ranks uint8 [entries, columns] among `magnitudes`.

    halves: entries of a vector. even: the number of minus signs in a vector is even.
    """

    grid: Tensor
    ranks: Tensor
    magnitudes: int
    halves: int
    even: bool


def nearest_vectors(book: Book, x: Tensor, h: Tensor, s: Tensor, **parts: Tensor) -> None:
    """Find the nearest vectors of a codebook: see `fewbit_vectors` of csrc/fewbit.h, which has the names of `parts`.

    x [rows, vectors, columns], h [rows or 1, vectors, columns] and s [tries, rows, vectors]: float32, on the CPU. The
    library must be there. The outputs among `parts` are written in place.
    """
    (columns, entries), tensors = book.grid.shape, {"x": x, "h": h, "s": s, **parts}
    assert all(each.is_cpu and each.is_contiguous() for each in tensors.values())
    found = Vectors(entries, columns, book.halves, book.even, book.magnitudes, s.shape[0], x.shape[0], x.shape[1])
    for name, tensor in {"grid": book.grid, "ranks": book.ranks, **tensors}.items():
        setattr(found, name, tensor.data_ptr())
    found.step = h[0].numel() if h.shape[0] > 1 else 0
    status = library().fewbit_nearest_vectors(found, torch.get_num_threads())  # type: ignore[union-attr]
    assert status == 0, f"fewbit_nearest_vectors: {status}"


def where() -> Path | str:
    """The path of the library, or a sentence that says why there is none."""
    if asked := os.environ.get("FEWBIT_CPU_LIBRARY"):
        if asked == "none":
            return "the CPU library is switched off by FEWBIT_CPU_LIBRARY"
        return Path(asked) if Path(asked).is_file() else f"FEWBIT_CPU_LIBRARY names no file: {asked}"
    beside = Path(__file__).parents[1] / "native" / _FILE
    if beside.is_file():
        return beside
    try:
        installed = importlib.metadata.files("fewbit") or []
    except importlib.metadata.PackageNotFoundError:
        installed = []
    for file in installed:
        if file.name == _FILE and (path := Path(str(file.locate()))).is_file():
            return path
    return "the CPU library was not built when fewbit was installed"


def instructions() -> str:
    """The instruction set in use; an empty string without the library."""
    found = library()
    return "" if isinstance(found, str) else str(found.fewbit_isa().decode())
