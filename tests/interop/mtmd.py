"""llama.cpp's library for images, mtmd, as a peer: the vectors that a tower of a GGUF file makes of an image."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_IMAGE = 1  # the kind of a chunk


def vectors(llama: Any, mmproj: Path, image: Tensor) -> list[Tensor]:
    """The vectors [tokens, width] of each part of an image, float32, in the order in which the prompt has them.

    llama: a `llama_cpp.Llama` with the language model. image: uint8 [height, width, 3].
    """
    from llama_cpp import llama_cpp, mtmd_cpp

    settings = mtmd_cpp.mtmd_context_params_default()
    settings.use_gpu, settings.print_timings, settings.warmup, settings.n_threads = False, False, False, 1
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds keys and values to 16 bits
    context = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), llama.model, settings)
    if context is None:
        raise RuntimeError(f"mtmd does not read {mmproj}")
    height, width, _ = image.shape
    pixels = (ctypes.c_uint8 * image.numel()).from_buffer_copy(image.contiguous().numpy().tobytes())
    bitmap, chunks = mtmd_cpp.mtmd_bitmap_init(width, height, pixels), mtmd_cpp.mtmd_input_chunks_init()
    marker = mtmd_cpp.mtmd_default_marker()
    prompt = mtmd_cpp.mtmd_input_text(text=marker, text_len=len(marker), add_special=True, parse_special=True)
    try:
        images = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if mtmd_cpp.mtmd_tokenize(context, chunks, ctypes.byref(prompt), images, 1):
            raise RuntimeError("mtmd_tokenize failed")
        found = []
        for place in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
            chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, place)
            if mtmd_cpp.mtmd_input_chunk_get_type(chunk) != _IMAGE:
                continue
            if mtmd_cpp.mtmd_encode_chunk(context, chunk):
                raise RuntimeError("mtmd_encode_chunk failed")
            count = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk), llama_cpp.llama_model_n_embd_inp(llama.model)
            values = mtmd_cpp.mtmd_get_output_embd(context)[: count[0] * count[1]]
            found.append(torch.tensor(values, dtype=torch.float32, device="cpu").view(count))
        return found
    finally:
        mtmd_cpp.mtmd_input_chunks_free(chunks)
        mtmd_cpp.mtmd_bitmap_free(bitmap)
        mtmd_cpp.mtmd_free(context)
