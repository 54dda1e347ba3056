"""Generate text."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated

import typer

from fewbit.cli.flags import Fields, checked
from fewbit.cli.options import Fuse, Json, MaxLength, Model, fused, printed
from fewbit.cli.stdin import prompt_of
from fewbit.models.decoding.sampling import Sampling
from fewbit.models.loading import Loading
from fewbit.system import ranks


@checked
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue; with --chat the user's message. -: from stdin.")],
    image: Annotated[
        list[str] | None,
        typer.Option(help="Image file for a vision model. Repeat it for more."),
    ] = None,
    mmproj: Annotated[
        str | None,
        typer.Option(
            help="Vision tower (mmproj) of a .gguf MODEL. Default: the one in the folder MODEL, with --image."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens.")] = 64,
    sampling: Sampling = Sampling(),
    chat: Annotated[bool, typer.Option("--chat", help="Apply the model's chat template to the prompt.")] = False,
    fuse: Fuse = None,
    max_length: MaxLength = None,
    loading: Annotated[Loading, Fields("compile", "adapter", "device", "kernel", "trust_remote_code")] = Loading(),
    as_json: Json = False,
) -> None:
    """Continue PROMPT with MODEL. Started by torchrun, each process loads its part of the model."""
    loading = replace(loading, fuse=fused(fuse, max_length))
    prompt = prompt_of(prompt)
    from fewbit.api import generate as api
    from fewbit.report import text as report

    done = api.generate(
        model,
        prompt,
        images=image,
        mmproj=mmproj,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        chat=chat,
        adapter=loading.adapter,
        device=loading.device,
        kernel=loading.kernel,
        fuse=loading.fuse,
        compile=loading.compile,
        trust_remote_code=loading.trust_remote_code,
        stream=not as_json,
        tensor_parallel=ranks.launched() > 1,
    )
    if as_json:
        printed({"model": model, "prompt": prompt, **asdict(done)})
    else:
        report.generated(done)
