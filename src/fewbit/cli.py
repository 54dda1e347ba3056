"""The command line: thin, and quick to answer; what does the work is imported when there is work."""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import asdict
from typing import Annotated, Any

import typer

from fewbit import cli_advice
from fewbit.cli_compare import compare
from fewbit.errors import ArgumentError, FewbitError, PeerError, PlanError

app = typer.Typer(
    name="fewbit",
    help="Make large language models small: quantize, load, generate, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # drawing the help in boxes takes longer than all else that it does
    context_settings={"help_option_names": ["-h", "--help"]},
)

_SHARED = ("quantize", "imatrix", "evaluate")  # what the processes of torchrun can part among themselves

Model = Annotated[str, typer.Argument(help="A folder, a Hub name (org/model), or tiny, the embedded model.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; by default a GPU where there is one.")]
Text = Annotated[
    str | None, typer.Option(help="A .txt or .jsonl file, pydoc, tiny, wikitext2 or c4; by default what suits MODEL.")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")]
Kernel = Annotated[str | None, typer.Option(help="Multiply by this kernel (fewbit list) instead of the best one.")]
Seed = Annotated[int, typer.Option(help="Makes every random choice the same again.")]
Length = Annotated[int | None, typer.Option(help="Tokens in a window.")]
Adapter = Annotated[str | None, typer.Option(help="The folder of an adapter (LoRA) to put on the model.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]


@app.command()
def quantize(
    context: typer.Context,
    model: Model,
    output: Annotated[str | None, typer.Option("-o", "--output", help="The folder to make, or .gguf file.")] = None,
    plan: Annotated[str, typer.Option(help="A plan by name (fewbit list) or a .json file.")] = "gptq-4bit",
    method: Annotated[str | None, typer.Option(help="Choose codes by this method instead of the plan's.")] = None,
    scheme: Annotated[str | None, typer.Option(help="Use this scheme instead, such as int4-g64-sym.")] = None,
    format: Annotated[str | None, typer.Option(help="Write this file format instead.")] = None,
    calibration: Text = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    seed: Seed = 0,
    imatrix: Annotated[
        str | None, typer.Option(help="Take importances from this file of llama.cpp's instead of calibrating.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what each tensor would become, do nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")] = False,
    device: Device = None,
    safetensors_only: Annotated[bool, typer.Option("--safetensors-only", help="Refuse pickled weights.")] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL into a new folder or .gguf file. Options of the method (fewbit list) are flags: --damp 0.05."""
    from fewbit import api, report
    from fewbit.plan import find

    chosen = find(plan)
    options: dict[str, str] = context.obj or {}
    if method or scheme or format or options:
        chosen = chosen.changed(scheme=scheme, method=method, format=format, options=options)
    if dry_run:
        shown = api.preview(
            model,
            plan=chosen,
            imatrix=imatrix,
            safetensors_only=safetensors_only,
            trust_remote_code=trust_remote_code,
        )
        _print(asdict(shown)) if as_json else report.preview(shown)
        return
    if output is None:
        raise PlanError("no output folder", "Say where to: -o OUT. Or use --dry-run.")
    with report.progress() as progress:
        done = api.quantize(
            model,
            output,
            plan=chosen,
            calibration=api.Calibration(calibration, samples, length, seed),
            imatrix=imatrix,
            overwrite=overwrite,
            device=device,
            safetensors_only=safetensors_only,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    _print(asdict(done)) if as_json else report.quantized(done)


@app.command()
def imatrix(
    model: Model,
    output: Annotated[str, typer.Option("-o", "--output", help="The .gguf or .dat file to make.")],
    calibration: Text = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    device: Device = None,
    safetensors_only: Annotated[bool, typer.Option("--safetensors-only", help="Refuse pickled weights.")] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure which columns of MODEL's weights matter, in a file for --imatrix and for llama.cpp."""
    from fewbit import api, report

    with report.progress() as progress:
        done = api.imatrix(
            model,
            output,
            calibration=api.Calibration(calibration, samples, length, seed),
            overwrite=overwrite,
            device=device,
            safetensors_only=safetensors_only,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    _print(asdict(done)) if as_json else report.measured(done)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue; the user's message with --chat.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="0: always the most likely token. Above 0: random, the higher the more varied.")
    ] = 0.0,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Choose among so many of the most likely tokens, 0: all. By default as the model says, or 50."
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Choose among the most likely tokens whose probabilities add up to this. "
            "By default as the model says, or 1: all."
        ),
    ] = None,
    seed: Seed = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt in the model's chat template.")] = False,
    fuse: Annotated[bool, typer.Option("--fuse", help="Fuse q, k, v and gate, up; needs --max-length.")] = False,
    max_length: Annotated[int | None, typer.Option(help="With --fuse: tokens of prompt and answer at most.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="With --fuse, on a GPU: compile a token's step.")] = False,
    adapter: Adapter = None,
    device: Device = None,
    kernel: Kernel = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Continue PROMPT with MODEL."""
    from fewbit import api, report

    if fuse != (max_length is not None):
        raise PlanError(
            "--fuse without --max-length" if fuse else "--max-length without --fuse",
            "Fusing keeps a cache of fixed size: give both, such as --fuse --max-length 512.",
        )
    done = api.generate(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=api.Sampling(temperature, top_k, top_p, seed),
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
        _print({"model": model, "prompt": prompt, **asdict(done)})
    else:
        report.generated(done)


@app.command()
def evaluate(
    model: Model,
    reference: Annotated[str | None, typer.Option(help="The original, to measure the loss against.")] = None,
    adapter: Adapter = None,
    reference_adapter: Annotated[str | None, typer.Option(help="One to put on the reference.")] = None,
    text: Text = None,
    length: Length = None,
    samples: Annotated[int | None, typer.Option(help="So many windows; all by default.")] = None,
    device: Device = None,
    kernel: Kernel = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure MODEL: perplexity, KL divergence from the reference, same top token, bytes."""
    from fewbit import api, report

    with report.windows_progress() as progress:
        done = api.evaluate(
            model,
            reference=reference,
            adapter=adapter,
            reference_adapter=reference_adapter,
            text=text,
            length=length,
            samples=samples,
            device=device,
            kernel=kernel,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    _print(report.evaluation_json(done)) if as_json else report.evaluation(done)


app.command()(compare)


@app.command()
def finetune(
    model: Model,
    data: Annotated[str, typer.Option(help="A .txt or .jsonl file: text, messages, or prompt and completion.")],
    output: Annotated[str, typer.Option("-o", "--output", help="The adapter folder to make.")],
    rank: Annotated[int, typer.Option(help="Rank of what is added to each weight.")] = 8,
    alpha: Annotated[
        float | None, typer.Option(help="It is scaled by alpha / rank; twice the rank by default.")
    ] = None,
    dropout: Annotated[float, typer.Option(help="Share of inputs dropped in training.")] = 0.0,
    targets: Annotated[
        str, typer.Option(help="Linears by the ends of their names, q_proj,v_proj; all by default.")
    ] = "",
    learning_rate: Annotated[float, typer.Option(help="At its highest: it warms up, then falls to 0.")] = 2e-4,
    epochs: Annotated[float, typer.Option(help="Times that the data is gone through.")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="So many optimizer steps instead of epochs.")] = None,
    batch: Annotated[int, typer.Option(help="Examples computed at once.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Batches to a step.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of an example at most.")] = 512,
    held_out: Annotated[float, typer.Option(help="Share of the examples kept to measure on.")] = 0.05,
    checkpointing: Annotated[bool, typer.Option(help="Compute blocks twice rather than remember them.")] = True,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Train an adapter (LoRA) on MODEL, quantized or not, which itself stays as it is."""
    from fewbit import adapters, report
    from fewbit.tuning import Tuning

    tuning = Tuning(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=tuple(name.strip() for name in targets.split(",") if name.strip()),
        learning_rate=learning_rate,
        epochs=epochs,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        length=length,
        held_out=held_out,
        seed=seed,
        checkpointing=checkpointing,
    )
    with report.steps_progress() as progress:
        done = adapters.finetune(
            model,
            output,
            data=data,
            tuning=tuning,
            overwrite=overwrite,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    _print(asdict(done)) if as_json else report.finetuned(done)


@app.command()
def merge(
    model: Model,
    adapter: Annotated[str, typer.Argument(help="The folder of the adapter.")],
    output: Annotated[str, typer.Option("-o", "--output", help="The folder to make.")],
    base: Annotated[str | None, typer.Option(help="What MODEL was quantized from, if it does not say so.")] = None,
    plan: Annotated[str | None, typer.Option(help="Quantize the result by this plan.")] = None,
    calibration: Text = None,
    text: Text = None,
    length: Length = None,
    samples: Annotated[int, typer.Option(help="So many windows to compare on.")] = 8,
    overwrite: Overwrite = False,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Add ADAPTER to the weights of MODEL in 16 bits, quantize them again if asked, and compare."""
    from fewbit import adapters, api, report

    with report.progress() as progress:
        done = adapters.merge(
            model,
            adapter,
            output,
            base=base,
            plan=plan,
            calibration=api.Calibration(calibration),
            text=text,
            length=length,
            samples=samples,
            overwrite=overwrite,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if not as_json:
        report.merged(done)
        return
    _print({**asdict(done), "evaluation": report.evaluation_json(done.evaluation)})


app.command()(cli_advice.estimate)
app.command()(cli_advice.recommend)


@app.command()
def inspect(model: Model, as_json: Json = False) -> None:
    """Tell what is in MODEL: schemes, share of parameters, bits per weight, how it was made."""
    from fewbit import api, report

    found = api.inspect(model)
    _print({**asdict(found), "share": found.share}) if as_json else report.inspection(found)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List schemes, methods, formats, kernels and plans, and what is unavailable here."""
    from fewbit import api, report

    families = api.catalogue()
    _print(
        {
            f: [dict(zip(("name", "what", "unavailable"), row, strict=True)) for row in rows]
            for f, rows in families.items()
        }
    ) if as_json else report.listing(families)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Tell what this machine has, which kernels serve it, and what would make it faster."""
    from fewbit import report
    from fewbit.advise import hardware

    found = hardware.look()
    _print(asdict(found)) if as_json else report.doctor(found)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
) -> None:
    if version:
        from fewbit import __version__

        typer.echo(__version__)
        raise typer.Exit


for _command in app.registered_commands:  # typer would cut what it takes from docstrings itself
    _command.short_help = " ".join((_command.callback.__doc__ or "").split("\n\n")[0].split())


def _method_flags(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments of `quantize` without the flags that are options of a method, and those options as text.

    Methods are imported only if a flag is met that the command itself does not have, so that help stays quick.
    """
    command = typer.main.get_command(app).commands["quantize"]  # type: ignore[attr-defined]
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    if all(not a.startswith("--") or a.partition("=")[0] in own for a in arguments):
        return arguments, {}
    from fewbit import registry
    from fewbit.methods.base import option_types

    types = option_types()
    rest, options, waiting = [], {}, list(arguments)
    while waiting:
        argument = waiting.pop(0)
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or flag in own:
            rest.append(argument)
        elif types.get(name.removeprefix("no_")) is bool and not equals:
            said = waiting.pop(0) if waiting and waiting[0].lower() in ("true", "false") else "true"
            options[name.removeprefix("no_")] = "false" if name.startswith("no_") else said
        elif name in types:
            if not equals and not waiting:
                raise PlanError(f"{flag} needs a value")
            options[name] = value if equals else waiting.pop(0)
        else:
            known = [*own, *(f"--{option.replace('_', '-')}" for option in types)]
            raise registry.unknown("option of quantize", flag, known)
    return rest, options


def _print(data: Any) -> None:
    from fewbit.report import out

    if not out.quiet:
        print(json.dumps(data, indent=1, allow_nan=False))


def _note(message: Warning | str, *where: Any, **more: Any) -> None:
    """A warning as a user of the command line wants to read it."""
    sys.stderr.write(f"note: {message}\n")


def _among_others(arguments: list[str]) -> None:
    """Where torchrun started several processes, one speaks for all; PlanError for what one process does alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return
    if os.environ["RANK"] != "0":
        warnings.showwarning = lambda *args, **more: None
    if arguments and not arguments[0].startswith("-") and arguments[0] not in _SHARED:
        message = f"{arguments[0]} runs in one process"
        if os.environ["RANK"] != "0":
            raise PeerError(message, told=True)
        raise PlanError(message, f"torchrun is for {', '.join(_SHARED)}.")


def main() -> None:
    """The console script: errors of ours in one or two lines, with their exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Before torch is imported. Its threads wait by spinning, which on a busy machine takes the time from the one waited
    # for: quantizing tiny beside two busy processes took 72 s, and 40 s so; on an idle machine it is the same.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    warnings.showwarning = _note
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        options: dict[str, str] = {}
        _among_others(arguments)
        if arguments[:1] == ["quantize"]:
            arguments[1:], options = _method_flags(arguments[1:])
        code = app(arguments, obj=options, standalone_mode=False)
        if code == 130:  # how typer ends an interrupted command
            resumes = (
                "; the same command goes on where it stopped" if arguments[:1] in (["quantize"], ["compare"]) else ""
            )
            sys.stderr.write(f"interrupted{resumes}\n")
        sys.exit(code if isinstance(code, int) else 0)
    except FewbitError as error:
        if debug:
            raise
        if not (isinstance(error, PeerError) and error.told):
            message = error.as_flag if isinstance(error, ArgumentError) else error.message
            sys.stderr.write(f"error: {message}\n" + (f"  {error.hint}\n" if error.hint else ""))
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"error: {where}{error.strerror or error}\n")
        sys.exit(1)
    except Exception as error:
        # A command line that typer could not read; its class for that has no public name.
        if debug or not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stdout.write(f"{error.format_message()}\n")
        else:
            sys.stderr.write(f"error: {error.format_message()}\n  fewbit --help tells what there is.\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
