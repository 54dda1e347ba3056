"""The command line. Heavy imports happen inside the commands, so that help stays fast."""

from __future__ import annotations

import io
import os
import sys
import warnings
from dataclasses import asdict
from typing import Annotated, Any

import typer

from fewbit.cli import adapters, advise
from fewbit.cli.compare import compare
from fewbit.cli.options import (
    Adapter,
    Calibrated,
    Device,
    Json,
    Kernel,
    Length,
    Model,
    Overwrite,
    SafetensorsOnly,
    Samples,
    Seed,
    Text,
    Trust,
    Windows,
    WithMethodOptions,
    early,
    method_flags,
    printed,
    prompt_of,
    text_of,
)
from fewbit.errors import FewbitError, PeerError, PlanError, in_flags

app = typer.Typer(
    name="fewbit",
    help="Make large language models small: quantize, load, generate, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # drawing boxes takes longer than the rest of the help
    context_settings={"help_option_names": ["-h", "--help"]},
)

_SHARED = ("quantize", "imatrix", "evaluate")  # commands that can share work among torchrun processes


@app.command(cls=WithMethodOptions)
@early
def quantize(
    ctx: typer.Context,
    model: Model,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Folder or .gguf file to make. Required unless --dry-run.")
    ] = None,
    plan: Annotated[str, typer.Option(help="A plan by name (fewbit list), or a .json file.")] = "gptq-4bit",
    method: Annotated[
        str | None, typer.Option(help="Method that chooses the codes (fewbit list), or awq+gptq. Default: the plan's.")
    ] = None,
    scheme: Annotated[str | None, typer.Option(help="Scheme, such as int4-g64-sym. Default: the plan's.")] = None,
    format: Annotated[str | None, typer.Option(help="File format (fewbit list). Default: the plan's.")] = None,
    calibration: Calibrated = None,
    samples: Samples = 128,
    length: Length = 512,
    seed: Seed = 0,
    imatrix: Annotated[
        str | None, typer.Option(help="Importance matrix (.gguf, .dat) to use in place of calibration. Default: none.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what each tensor would become. Write nothing.")
    ] = False,
    overwrite: Overwrite = False,
    device: Device = None,
    safetensors_only: SafetensorsOnly = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL into a new folder or .gguf file."""
    from fewbit.plans.plan import find
    from fewbit.texts.calibration import Calibration

    chosen = find(plan)
    options: dict[str, str] = ctx.obj or {}
    if method or scheme or format or options:
        chosen = chosen.changed(scheme=scheme, method=method, format=format, options=options)
    if output is None and not dry_run:
        raise PlanError("no output folder", "Say where to: -o OUT. Or use --dry-run.")
    calibrated = Calibration(text_of(calibration), samples, length, seed)
    from fewbit.api import quantize as api
    from fewbit.report import text as report

    if dry_run:
        shown = api.preview(
            model,
            plan=chosen,
            imatrix=imatrix,
            safetensors_only=safetensors_only,
            trust_remote_code=trust_remote_code,
        )
        printed(asdict(shown)) if as_json else report.preview(shown)
        return
    assert output is not None
    with report.progress() as progress:
        done = api.quantize(
            model,
            output,
            plan=chosen,
            calibration=calibrated,
            imatrix=imatrix,
            overwrite=overwrite,
            device=device,
            safetensors_only=safetensors_only,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    printed(asdict(done)) if as_json else report.quantized(done)


@app.command()
@early
def imatrix(
    model: Model,
    output: Annotated[str, typer.Option("-o", "--output", help="The .gguf or .dat file to make.")],
    calibration: Calibrated = None,
    samples: Samples = 128,
    length: Length = 512,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    device: Device = None,
    safetensors_only: SafetensorsOnly = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure which columns of MODEL's weights matter, in a file for --imatrix and for llama.cpp."""
    from fewbit.texts.calibration import Calibration

    calibrated = Calibration(text_of(calibration), samples, length, seed)
    from fewbit.api import quantize as api
    from fewbit.report import text as report

    with report.progress() as progress:
        done = api.imatrix(
            model,
            output,
            calibration=calibrated,
            overwrite=overwrite,
            device=device,
            safetensors_only=safetensors_only,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    printed(asdict(done)) if as_json else report.measured(done)


@app.command()
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


@app.command()
@early
def evaluate(
    model: Model,
    reference: Annotated[str | None, typer.Option(help="Original to compare with. Default: none.")] = None,
    adapter: Adapter = None,
    reference_adapter: Annotated[
        str | None, typer.Option(help="LoRA adapter for the reference. Default: none.")
    ] = None,
    text: Text = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens in a window. Default: the model's context, at most 2048.")
    ] = None,
    samples: Windows = 16,
    device: Device = None,
    kernel: Kernel = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure MODEL: perplexity, KL divergence from the reference, same top token, bytes."""
    measured = text_of(text)
    from fewbit.api import evaluate as api
    from fewbit.report import text as report

    with report.windows_progress() as progress:
        done = api.evaluate(
            model,
            reference=reference,
            adapter=adapter,
            reference_adapter=reference_adapter,
            text=measured,
            length=length,
            samples=samples,
            device=device,
            kernel=kernel,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    printed(report.evaluation_json(done)) if as_json else report.evaluation(done)


app.command()(compare)


app.command()(adapters.finetune)
app.command()(adapters.merge)
app.command()(advise.estimate)
app.command()(advise.recommend)


@app.command()
@early
def inspect(model: Model, as_json: Json = False) -> None:
    """Tell what is in MODEL: schemes, share of parameters, bits per weight, how it was made."""
    from fewbit.api import inspect as api
    from fewbit.report import text as report

    found = api.inspect(model)
    printed({**asdict(found), "share": found.share}) if as_json else report.inspection(found)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List schemes, methods, formats, kernels and plans, and what is unavailable here."""
    from fewbit.plans.catalogue import catalogue
    from fewbit.report import text as report

    families = catalogue()
    printed(
        {
            f: [dict(zip(("name", "what", "unavailable"), row, strict=True)) for row in rows]
            for f, rows in families.items()
        }
    ) if as_json else report.listing(families)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Tell what this machine has, which kernels serve it, and what would make it faster."""
    from fewbit.advise import doctor as hardware
    from fewbit.report import text as report

    found = hardware.look()
    printed(asdict(found)) if as_json else report.doctor(found)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
) -> None:
    if version:
        from fewbit import __version__

        typer.echo(__version__)
        raise typer.Exit


for _command in app.registered_commands:  # typer would truncate the short help that it derives from docstrings
    _command.short_help = " ".join((_command.callback.__doc__ or "").split("\n\n")[0].split())


def _note(message: Warning | str, *where: Any, **more: Any) -> None:
    """Print a warning as one line, without file and line number."""
    sys.stderr.write(f"note: {message}\n")


def _among_others(arguments: list[str]) -> None:
    """Under torchrun, only rank 0 shows warnings. PlanError for a command that runs in one process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return
    if os.environ["RANK"] != "0":
        warnings.showwarning = lambda *args, **more: None
    if arguments and not arguments[0].startswith("-") and arguments[0] not in _SHARED:
        message = f"{arguments[0]} runs in one process"
        if os.environ["RANK"] != "0":
            raise PeerError(message, reported=True)
        raise PlanError(message, f"torchrun is for {', '.join(_SHARED)}.")


def main() -> None:
    """The console script. A FewbitError prints as one or two lines and sets the exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Set before torch is imported. OpenMP threads wait by spinning. On a busy machine that slows the thread they wait
    # for: quantizing tiny beside two busy processes took 72 s, and 40 s with this. On an idle
    # machine it makes no difference.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    warnings.showwarning = _note
    for stream in (sys.stdout, sys.stderr):  # escape characters that the locale's encoding lacks; do not crash
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        options: dict[str, str] = {}
        _among_others(arguments)
        if arguments[:1] == ["quantize"]:
            command = typer.main.get_command(app).commands["quantize"]  # type: ignore[attr-defined]
            arguments[1:], options = method_flags(command, arguments[1:])
        code = app(arguments, obj=options, standalone_mode=False)
        if code == 130:  # typer returns this for an interrupted command
            resumes = (
                "; the same command goes on where it stopped" if arguments[:1] in (["quantize"], ["compare"]) else ""
            )
            sys.stderr.write(f"interrupted{resumes}\n")
        sys.exit(code if isinstance(code, int) else 0)
    except FewbitError as error:
        if debug:
            raise
        if not (isinstance(error, PeerError) and error.reported):
            message, hint = in_flags(error.message), in_flags(error.hint)
            sys.stderr.write(f"error: {message}\n" + (f"  {hint}\n" if hint else ""))
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
        # A usage error. Its class in typer has no public name.
        if debug or not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stdout.write(f"{error.format_message()}\n")
        else:
            sys.stderr.write(f"error: {error.format_message()}\n  fewbit --help tells what there is.\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
