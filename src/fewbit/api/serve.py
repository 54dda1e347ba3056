"""Serve a model over HTTP."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fewbit.advise import engines
from fewbit.errors import KernelError, PlanError
from fewbit.formats.base import by_quant_method
from fewbit.models import decoded
from fewbit.models.decoding import fuse as fusing
from fewbit.models.load import load_model
from fewbit.models.loading import Loading
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import Source, locate
from fewbit.serving.settings import Serving
from fewbit.system import ambient, machine
from fewbit.units import counted

if TYPE_CHECKING:
    from fewbit.serving.service import Service


@ambient.defaults()
def serve(model: str | Path, loading: Loading, serving: Serving, tell: Callable[[str], None]) -> None:
    """Serve `model` with OpenAI's interface until a signal ends the process.

    tell: gets lines for the user. PlanError without the packages of the extra, if the port is taken, or if the model
    cannot be served; the errors of `fewbit.load`. KernelError if the model cannot be computed any more.
    """
    try:
        from fewbit.serving import run, sockets
        from fewbit.serving.app import application
    except ModuleNotFoundError as error:
        raise PlanError(f"fewbit serve needs the package {error.name}", "pip install 'fewbit[serve]'") from error

    with sockets.bound(serving.host, serving.port) as socket:
        opened = service(model, loading, serving)
        if opened.engine.lowered is not None:
            tell(f"The memory has room for {opened.engine.lowered} tokens, fewer than the model's context.")
        host, port = socket.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        said = f"Serving {opened.name}: chat at {address}, OpenAI's interface at {address}/v1. Ctrl-C ends."

        def ending(left: int) -> None:
            if left and opened.engine.failed is None:
                tell(f"Waiting for {counted(left, 'request')} to finish. Ctrl-C ends the server at once.")

        try:
            app = application(opened, serving)
            run.run(app, socket, serving, lambda: tell(said), lambda: opened.engine.failed is not None, ending)
        finally:  # after an error, the engine's thread would keep the process alive
            opened.engine.stop(finish=False)
        if opened.engine.failed is not None:
            raise KernelError(
                f"the engine failed and cannot compute any more: {opened.engine.failed}",
                "Start the server again. If the memory ran out: with a smaller `max_num_seqs` or `max_model_len`.",
            )


def hand_over(model: str | Path, loading: Loading, serving: Serving, tell: Callable[[str], None]) -> None:
    """Replace this process by the engine `serving.engine`, which serves `model`.

    PlanError, with the command, if the engine cannot serve the model here, is not installed, or has no such option.
    """
    engine, source = serving.engine, locate(model)
    method = str((source.quantization or {}).get("quant_method") or "")
    found = by_quant_method(method) if method else None
    format = None if not method else found.name if found else method
    plain = Loading(trust_remote_code=loading.trust_remote_code)
    own = [each.name for each in fields(loading) if getattr(loading, each.name) != getattr(plain, each.name)]
    own += [name for name in ("max_queue", "max_body") if getattr(serving, name) != getattr(Serving(), name)]
    if loading.trust_remote_code and engine == "llama.cpp":
        own.append("trust_remote_code")
    if own:
        raise PlanError(f"`{', '.join(own)}`: not an option of {engine}", "Omit it, or choose `engine=fewbit`.")
    place = source.files[0] if source.gguf is not None else source.beside
    started = engines.started(
        engine,
        str(place),
        {
            "host": serving.host,
            "port": serving.port,
            "name": _name(source, serving),
            "context": serving.max_model_len,
            "requests": None if serving.max_num_seqs == Serving().max_num_seqs else serving.max_num_seqs,
            "remote_code": loading.trust_remote_code,
            "api_key": serving.api_key,
        },
    )
    if why := engines.why_not(engine, format, machine.gpu_capability()):
        raise PlanError(f"{source.name}: {why}", f"On a machine where it can: {started}")
    program = started.arguments[0]
    if shutil.which(program) is None:
        raise PlanError(
            f"{engine} is not installed: there is no program {program} on PATH",
            f"Install it ({engines.install(engine)}), then: {started}",
        )
    tell(str(started))
    sys.stdout.flush()
    # The engine takes the place of this process, so it gets the signals, and its exit code is the command's.
    os.execvpe(program, started.arguments, {**os.environ, **started.environment})


def _name(source: Source, serving: Serving) -> str:
    """The model's name for clients. Without this option, engines of others take the whole path."""
    # The path of `.` and `..` has a name only when it is normalized. Links keep their names.
    place = source.name if source.hosted else os.path.normpath(source.origin)
    return serving.served_model_name or Path(place).name


def service(model: str | Path, loading: Loading, serving: Serving) -> Service:
    """`model`, loaded, and an engine that waits for requests. Someone must stop it."""
    from fewbit.models.decoding.choosing import settings_of
    from fewbit.models.decoding.continuous import Engine
    from fewbit.models.decoding.decode import checked_length
    from fewbit.serving.service import Service

    loading = replace(loading, device=machine.placed(loading.device))
    source, length = locate(model), serving.max_model_len
    if length is not None:
        checked_length(length, source.stated_context, f"`max_model_len={length}`")
    tokenizer = load_tokenizer(source, trust_remote_code=loading.trust_remote_code)
    loaded = load_model(source, loading, for_text=True)
    if loaded.device.type == "cuda" and loading.adapter is None and decoded.is_packed(source):
        fusing.fuse(loaded)  # a GPU waits for Python's launches, and there are fewer
    free = machine.free_memory(loaded.device)
    engine = Engine(loaded, length, serving.max_num_seqs, free)
    return Service(
        engine,
        tokenizer,
        _name(source, serving),
        settings_of(loaded),
        source.rows,
        serving.max_num_seqs + serving.max_queue,
    )
