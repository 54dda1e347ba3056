"""llama.cpp as a peer: what tests and benchmarks ask of it, through the ctypes of the package llama-cpp-python.

`make interop` builds that package once (it needs a C++ compiler and some minutes; pip keeps the wheel). The functions
that read files want a path; all numbers come and go as numpy arrays.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]

VERSION = "0.3.36"
# ggml's numbers of tensor types, by the names of fewbit's schemes.
TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "q2_k": 10,
    "q3_k": 11,
    "q4_k": 12,
    "q5_k": 13,
    "q6_k": 14,
    "iq2_xxs": 16,
    "iq2_xs": 17,
    "iq3_xxs": 18,
    "iq4_nl": 20,
    "iq3_s": 21,
    "iq2_s": 22,
    "iq4_xs": 23,
    "bf16": 30,
}

_said: list[str] = []
_callback: Any = None


def missing() -> str | None:
    """Why the peer cannot be had here; None if it can."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        return f"make interop installs llama-cpp-python: {error}"
    if llama_cpp.__version__ != VERSION:
        return f"llama-cpp-python {llama_cpp.__version__} is here; {VERSION} is the reference"
    return None


def _library() -> Any:
    """The ctypes bindings, their log kept to explain failures instead of printed."""
    import llama_cpp

    global _callback
    if _callback is None:

        def record(level: int, text: bytes, _: Any) -> None:
            _said.append(text.decode(errors="replace"))
            del _said[:-200]

        _callback = llama_cpp.llama_log_callback(record)
        llama_cpp.llama_log_set(_callback, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
    return llama_cpp


def quantize(
    source: Path, out: Path, file_type: int, imatrix: Mapping[str, Floats] | None = None, *, threads: int = 1
) -> None:
    """llama-quantize: `out` from the 16- or 32-bit `source`.

    `imatrix`: tensor name (with .weight) -> mean x_j², [K]. The library takes values, no file: its tools divide the
    sums in a file by their counts before.
    """
    llama = _library()
    params = llama.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, file_type
    kept = []
    if imatrix is not None:
        entries = (llama.llama_model_imatrix_data * (len(imatrix) + 1))()
        for i, (name, values) in enumerate(imatrix.items()):
            flat = np.ascontiguousarray(values, np.float32)
            kept.append(flat)
            entries[i].name = name.encode()
            entries[i].data = flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entries[i].size = flat.size
        entries[len(imatrix)].name = None  # ends the list
        params.imatrix = entries
    if llama.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama_model_quantize: {''.join(_said[-5:])}")


def quantize_chunk(type_name: str, w: Floats, importance: Floats | None = None) -> npt.NDArray[np.uint8]:
    """The bytes [N, row] in which ggml's quantizer of that type stores w [N, K], errors weighed by importance [K]."""
    _library()
    from llama_cpp._ggml import libggml

    w = np.ascontiguousarray(w, np.float32)
    kind = TYPES[type_name]
    libggml.ggml_row_size.restype = ctypes.c_size_t
    libggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    out = np.zeros((w.shape[0], libggml.ggml_row_size(kind, w.shape[1])), np.uint8)
    floats = ctypes.POINTER(ctypes.c_float)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    libggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    libggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, floats, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, floats,
    ]  # fmt: skip
    written = libggml.ggml_quantize_chunk(
        kind,
        w.ctypes.data_as(floats),
        out.ctypes.data_as(ctypes.c_void_p),
        0,
        *w.shape,
        None if weights is None else weights.ctypes.data_as(floats),
    )
    if written != out.nbytes:
        raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes, not {out.nbytes}")
    return out


class Loaded:
    """A model that llama.cpp has loaded, with room for `context` tokens."""

    def __init__(self, path: Path, context: int = 512, threads: int = 1) -> None:
        self._llama = llama = _library()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        # Its layouts for one kind of processor: that for AMX ends the process where the system does not grant AMX.
        params.use_extra_bufts = False
        self._model = llama.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"{path} did not load: {''.join(_said[-5:])}")
        self._vocab = llama.llama_model_get_vocab(self._model)
        options = llama.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.n_threads = options.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, options)
        if not self._context:
            llama.llama_model_free(self._model)
            raise RuntimeError(f"no context for {path}: {''.join(_said[-5:])}")
        self.vocabulary = int(llama.llama_vocab_n_tokens(self._vocab))

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    def tokenize(self, text: str, *, special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids; `special`: with those that the model adds by itself. Names of special tokens are such tokens."""
        encoded = text.encode()
        room = len(encoded) + 16
        ids = (self._llama.llama_token * room)()
        count = self._llama.llama_tokenize(self._vocab, encoded, len(encoded), ids, room, special, parse_special)
        if count < 0:
            raise RuntimeError(f"llama_tokenize: {count}")
        return list(ids[:count])

    def logits(self, tokens: Sequence[int]) -> Floats:
        """Logits [tokens, vocabulary] after each of `tokens`, which begin a text."""
        llama, count = self._llama, len(tokens)
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        batch = llama.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = int(token), i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if code := llama.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode: {code} {''.join(_said[-5:])}")
            found = llama.llama_get_logits(self._context)
            return np.ctypeslib.as_array(found, shape=(count, self.vocabulary)).copy()
        finally:
            llama.llama_batch_free(batch)

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The `count` likeliest next tokens, one after the other."""
        ids = list(tokens)
        for _ in range(count):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(tokens) :]


@contextmanager
def loaded(path: Path, context: int = 512, threads: int = 1) -> Iterator[Loaded]:
    """The model of a file, freed afterwards."""
    with Loaded(path, context, threads) as model:
        yield model


def opened(path: Path, **options: Any) -> Any:
    """The `llama_cpp.Llama` of a file, on one thread of the CPU; `options` are its own."""
    llama = _library()
    defaults = llama.llama_model_default_params

    def plain() -> Any:  # as in Loaded
        params = defaults()
        params.use_extra_bufts = False
        return params

    with patch.object(llama.llama_cpp, "llama_model_default_params", plain):
        return llama.Llama(str(path), n_gpu_layers=0, n_threads=1, verbose=False, **options)


def computed(path: Path, ids: Tensor) -> Tensor:
    """The logits [tokens, vocabulary] that a file gives after each of `ids`; keys and values in 32 bits."""
    llama = opened(path, n_ctx=64, logits_all=True, type_k=0, type_v=0)
    llama.eval(ids.tolist())
    return torch.from_numpy(np.array(llama.scores[: len(ids)]))


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def perplexity_and_kl(
    model: Loaded, windows: Sequence[Sequence[int]], original: Sequence[Floats] | None = None
) -> tuple[float, float]:
    """exp of the mean loss of each window's tokens after its first, and the mean KL divergence from `original`.

    `original`: its logits for the same windows. Means are over all positions that predict a token of the window, as in
    fewbit's own measurement.
    """
    losses, divergences = [], []
    for i, window in enumerate(windows):
        found = log_softmax(model.logits(window)[:-1])
        losses.append(-found[np.arange(len(window) - 1), np.asarray(window)[1:]])
        if original is not None:
            wanted = log_softmax(original[i][:-1])
            divergences.append((np.exp(wanted) * (wanted - found)).sum(-1))
    kl = float(np.concatenate(divergences).mean()) if divergences else float("nan")
    return float(np.exp(np.concatenate(losses).mean())), kl
