"""Generate text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from fewbit.cli.options import (
    Adapter,
    Device,
    Json,
    Kernel,
    Model,
    Seed,
    Trust,
    early,
    printed,
    prompt_of,
)
from fewbit.errors import PlanError


@early
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue; with --chat the user's message. -: from stdin.")],
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="0: always take the most likely token. Above 0: sample; higher is more varied.")
    ] = 0.0,
    top_k: Annotated[
        int | None,
        typer.Option(help="Sample from the K most likely tokens; 0: all. Default: generation_config.json, or 50."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the most likely tokens whose probabilities sum to P; 1: all. "
            "Default: generation_config.json, or 1."
        ),
    ] = None,
    seed: Seed = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the model's chat template to the prompt.")] = False,
    fuse: Annotated[
        bool,
        typer.Option("--fuse", help="Fuse linears that share an input; needs --max-length."),
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(help="With --fuse: most tokens of prompt and answer. No default.")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="With --fuse, on a GPU: compile the decoding step.")
    ] = False,
    adapter: Adapter = None,
    device: Device = None,
    kernel: Kernel = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Continue PROMPT with MODEL."""
    from fewbit.models.decoding.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    if fuse != (max_length is not None):
        raise PlanError(
            "--fuse without --max-length" if fuse else "--max-length without --fuse",
            "Fusing keeps a cache of fixed size: give both, such as --fuse --max-length 512.",
        )
    prompt = prompt_of(prompt)
    from fewbit.api import generate as api
    from fewbit.report import text as report

    done = api.generate(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        chat=chat,
        adapter=adapter,
        device=device,
        kernel=kernel,
        fuse=max_length,
        compile=compile,
        trust_remote_code=trust_remote_code,
        stream=not as_json,
    )
    if as_json:
        printed({"model": model, "prompt": prompt, **asdict(done)})
    else:
        report.generated(done)
