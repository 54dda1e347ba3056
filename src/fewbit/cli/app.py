"""The command line. Heavy imports happen inside the commands, so that help stays fast."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from fewbit.cli import (
    adapters,
    advise,
    cache,
    chat,
    compare,
    convert,
    evaluate,
    generate,
    inspect,
    push,
    quantize,
    run,
    serve,
    tune,
)
from fewbit.cli.options import WithMethodOptions, method_flags, printed
from fewbit.errors import FewbitError, PeerError, PlanError, in_flags
from fewbit.system import ranks

app = typer.Typer(
    name="fewbit",
    help="Make large language models small: quantize, load, generate, measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # drawing boxes takes longer than the rest of the help
    context_settings={"help_option_names": ["-h", "--help"]},
)

_TOGETHER = (*ranks.SHARED, "generate")  # commands that torchrun processes do together
_SIGNALS = ("SIGTERM", "SIGHUP")  # Windows lacks the second
_INTERRUPTED = (129, 130, 143)  # exit codes after SIGHUP, Ctrl-C (typer returns it) and SIGTERM
_SHARED = (*_TOGETHER, "run")  # commands that can share work among torchrun processes
_PATIENCE = 10.0  # seconds that rank 0 may need to print, after another process has failed

app.command(cls=WithMethodOptions)(quantize.quantize)
app.command()(convert.convert)
app.command()(quantize.imatrix)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(evaluate.evaluate)
app.command()(compare.compare)
app.command()(tune.tune)
app.command()(adapters.finetune)
app.command()(adapters.merge)
app.command()(push.push)
app.command()(advise.estimate)
app.command()(advise.recommend)
app.command()(inspect.inspect)
app.command("list")(inspect.list_)
app.command()(inspect.doctor)
app.command()(cache.cache)
app.command(context_settings={"allow_interspersed_args": False})(run.run)


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
    """Under torchrun, only rank 0 shows warnings. PlanError for what several processes cannot do."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return
    if os.environ["RANK"] != "0":
        warnings.showwarning = lambda *args, **more: None
    # Experts without tokens have no gradient, so training looks for such weights, and torch warns if there are none.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if arguments and not arguments[0].startswith("-") and arguments[0] not in _SHARED:
        _refuse(f"{arguments[0]} runs in one process", f"torchrun is for {', '.join(_SHARED)}.")
    if arguments[:1] != ["run"] and any(each == "-" or each.endswith("=-") for each in arguments):
        _refuse("- stands for stdin, which several processes cannot share", "Give a file.")


def _refuse(message: str, hint: str) -> NoReturn:
    """Raise an error that rank 0 prints for all."""
    if os.environ["RANK"] != "0":
        raise PeerError(message, reported=True)
    raise PlanError(message, hint)


def _given(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without --debug, and whether it was there. The --debug of a command of `run` is not fewbit's."""
    own = next((i for i, each in enumerate(arguments) if each != "--debug"), 0)
    end = own if arguments[own : own + 1] == ["run"] else len(arguments)
    return [each for each in arguments[:end] if each != "--debug"] + arguments[end:], "--debug" in arguments[:end]


def _quiet() -> None:
    """Settings of the process that must be made before torch and transformers are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Idle OpenMP threads spin, and on a busy machine they take the cores from the thread that they wait for: quantizing
    # tiny beside two busy processes took 72 s without this limit and 40 s with it. On an idle machine it makes no
    # difference.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # The imports make 650,000 objects that stay. Searching them for garbage took 0.7 s of the 5.4 s of `generate`.
    gc.set_threshold(50_000)


def _usage(arguments: list[str], message: str) -> str:
    """What to do after a usage error."""
    command = arguments[0] if arguments else ""
    if command not in {each.name or getattr(each.callback, "__name__", "") for each in app.registered_commands}:
        return "fewbit --help lists all commands."
    prompt = {
        "Missing argument 'prompt'": "Give the text in quotes, or - for stdin. ",
        "extra argument": "Put the prompt in quotes. ",
    }
    hint = next((hint for words, hint in prompt.items() if words in message), "") if command == "generate" else ""
    return f"{hint}fewbit {command} --help shows how it is used."


def _ended(number: int, frame: FrameType | None) -> NoReturn:
    """End as after Ctrl-C: what is unfinished is removed. A second signal ends the process at once."""
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(128 + number)


def _end_cleanly(arguments: list[str]) -> None:
    """Let SIGTERM and SIGHUP end the command by `_ended`, unless it handles signals itself or they are ignored."""
    if arguments[:1] in (["run"], ["serve"]) or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    for name in _SIGNALS:
        if (number := getattr(signal, name, None)) and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _ended)


def _fail(arguments: list[str], message: str, hint: str, code: int, *, reported: bool = False) -> NoReturn:
    """End with an error: one or two lines on stderr and, with --json, the same as one JSON object on stdout.

    reported: another process of a torchrun launch prints the lines. Only rank 0 prints the object. torchrun ends all
    processes soon after the first one ends, so the others wait for that.
    """
    if not reported:
        sys.stderr.write(f"error: {message}\n" + (f"  {hint}\n" if hint else ""))
    if "--json" in arguments and arguments[0] != "run":
        with suppress(BrokenPipeError):
            printed({"error": {"message": message, "hint": hint, "exit_code": code}})
            sys.stdout.flush()
    if ranks.silent() and ranks.watched():
        with suppress(KeyboardInterrupt):
            time.sleep(_PATIENCE)
    sys.exit(code)


def main() -> None:
    """The console script. A FewbitError prints as one or two lines and sets the exit code."""
    arguments, debug = _given(sys.argv[1:])
    if arguments[:1] != ["run"]:
        _quiet()
    _end_cleanly(arguments)
    warnings.showwarning = _note
    for stream in (sys.stdout, sys.stderr):  # escape characters that the locale's encoding lacks; do not crash
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        options: dict[str, str] = {}
        _among_others(arguments)
        with ranks.telling() if arguments[:1] and arguments[0] in _TOGETHER else nullcontext():
            if arguments[:1] == ["quantize"]:
                command = typer.main.get_command(app).commands["quantize"]  # type: ignore[attr-defined]
                arguments[1:], options = method_flags(command, arguments[1:])
            try:
                code = app(arguments, obj=options, standalone_mode=False)
            except SystemExit as ended:  # by a signal
                code = ended.code
        if code in _INTERRUPTED:
            resumes = (
                "; the same command resumes at the last saved step"
                if arguments[:1] in (["quantize"], ["compare"], ["tune"])
                else ""
            )
            sys.stderr.write(f"interrupted{resumes}\n")
        sys.exit(code if isinstance(code, int) else 0)
    except FewbitError as error:
        if debug:
            raise
        told = isinstance(error, PeerError) and error.reported
        _fail(arguments, in_flags(error.message), in_flags(error.hint), error.exit_code, reported=told)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as error:
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(arguments, f"{where}{error.strerror or error}", "", 1)
    except Exception as error:
        # A usage error. Its class in typer has no public name.
        if debug or not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stdout.write(f"{error.format_message()}\n")
            sys.exit(2)
        _fail(arguments, error.format_message(), _usage(arguments, error.format_message()), 2)


if __name__ == "__main__":
    main()
