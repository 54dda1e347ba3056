"""Load a model, and generate text with it."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit.api import arguments
from fewbit.api.arguments import Device, DType, Images, checked
from fewbit.errors import PlanError
from fewbit.models import images as pixels
from fewbit.models.decoding.generate import Continuation, continue_text, prompt_ids
from fewbit.models.decoding.sampling import Sampling as Sampling
from fewbit.models.load import fuses_by_itself, load_model
from fewbit.models.loading import Loading
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import Source, locate, with_tower
from fewbit.system import ambient, machine, ranks
from fewbit.texts import windows as texts_windows
from fewbit.texts.calibration import Calibration as Calibration

if TYPE_CHECKING:
    from torch import Tensor


@checked
@ambient.defaults()
def load(
    model: str | Path,
    *,
    dtype: DType = "auto",
    device: Device = None,
    kernel: str | None = None,
    adapter: str | Path | None = None,
    fuse: int | None = None,
    compile: bool = False,
    trust_remote_code: bool = False,
    tensor_parallel: bool = False,
    mmproj: str | Path | None = None,
) -> Any:
    """Load a model with packed weights. `AutoModelForCausalLM.from_pretrained` does the same after `import fewbit`.

    device: as there, the CPU by default, also where there is a GPU. kernel: one kernel for all quantized weights
    (`fewbit list`); KernelError if it does not support one of them. adapter: a LoRA, folder or GGUF file, to attach as
    `peft.PeftModel.from_pretrained` does; PlanError if it belongs to another model. fuse: fuse linears that read the
    same tensor, and generate in a static cache of this many tokens, prompt included (on a GPU, one CUDA graph per
    token); PlanError beyond the model's context. compile: let PyTorch compile the decoding step at the first use of
    each batch size, which takes many seconds. A model whose blocks fewbit's own operations serve is faster without: it
    is not compiled, and a warning says so. PlanError without `fuse`, or without a GPU.
    tensor_parallel: in a program that torchrun started, load only this process's part of each linear; all processes
    must then use the model in the same way. mmproj: the GGUF file with the vision tower of a GGUF model; a folder that
    has both files needs none. FormatError if it belongs to another model.
    """
    loading = Loading(device, dtype, kernel, adapter, fuse, compile, trust_remote_code, tensor_parallel=tensor_parallel)
    if loading.device is not None:
        loading = replace(loading, device=machine.placed(loading.device))
    return load_model(with_tower(locate(model), mmproj), loading)


@checked
@ambient.defaults()
def generate(
    model: str | Path,
    prompt: str,
    *,
    images: Images | None = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    chat: bool = False,
    adapter: str | Path | None = None,
    device: Device = None,
    kernel: str | None = None,
    fuse: int | bool | None = None,
    compile: bool = False,
    trust_remote_code: bool = False,
    stream: bool = False,
    tensor_parallel: bool = False,
    mmproj: str | Path | None = None,
) -> Continuation:
    """Continue `prompt` with `model`, and measure the speed. Greedy decoding unless `sampling` is given.

    images: image files, or images of pillow, for a model with a vision tower. With `chat` they come before the prompt;
    else they are where the prompt has the model's image token, or before it. PlanError for a model that takes none.
    chat: the prompt is a user's message in the model's chat template. adapter: a LoRA, a folder or a GGUF file.
    device: by default a GPU if there is one. fuse, compile: as in `load`; `fuse=True` makes the cache as long as prompt
    and answer, and False turns fusing off. By default, a packed model is fused on a GPU, for up to 8192 tokens, without
    adapter, images and tensor_parallel; `compile` alone fuses too. stream: also print the text as it is generated.
    tensor_parallel: in a program that torchrun started, all processes generate one text together, each with its part of
    the model. mmproj: as in `load`.
    """
    together = ranks.joined(device) if tensor_parallel else nullcontext(device)
    with together as device, ranks.peer_errors(computes=True):
        loading = Loading(
            machine.placed(device),
            None,
            kernel,
            adapter,
            fuse,
            compile,
            trust_remote_code,
            tensor_parallel=tensor_parallel,
        )
        source = locate(model)
        source = with_tower(source, mmproj) if images or mmproj is not None else source
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        ids, beside = _asked(source, tokenizer, prompt, images, chat, trust_remote_code)
        written = ids[ids != pixels.image_token(source)] if beside else ids
        texts_windows.within(written, source.rows, tokenizer, "the prompt")
        texts_windows.continued(ids, max_new_tokens, source.stated_context)
        needed = ids.shape[1] + max_new_tokens
        if fuse and fuse is not True and needed > fuse:
            raise PlanError(
                f"`fuse={fuse}` is too short for {ids.shape[1]} prompt tokens and {max_new_tokens} new tokens",
                "Give a larger value, or a smaller `max_new_tokens`.",
            )
        by_itself = fuse is None and (compile or (not beside and fuses_by_itself(source, loading, needed)))
        if fuse is True or by_itself:
            loading = replace(loading, fuse=needed)
        loaded = load_model(source, loading, for_text=not beside)
        done = continue_text(
            loaded,
            tokenizer,
            ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling or Sampling(),
            stream=stream and not (tensor_parallel and ranks.silent()),
            beside=pixels.on(loaded, beside),
        )
        if tensor_parallel:
            del loaded
            gc.collect()  # NCCL waits at its end for CUDA graphs that have its calls
        return done


def _asked(
    source: Source, tokenizer: Any, prompt: str, images: Images | None, chat: bool, trust_remote_code: bool
) -> tuple[Tensor, dict[str, Any]]:
    """The token ids [1, n] of a prompt, and what the model takes besides."""
    if not (files := arguments.images("images", images or ())):
        return prompt_ids(tokenizer, prompt, chat=chat), {}
    processor = pixels.load_processor(source, trust_remote_code=trust_remote_code)
    beside = pixels.inputs(processor, prompt, pixels.read(files), source.config, chat=chat)
    return beside["input_ids"].long(), beside
