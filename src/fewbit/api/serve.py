"""Serve a model over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fewbit.errors import PlanError
from fewbit.models.load import load_model
from fewbit.models.loading import Loading
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import locate
from fewbit.serving.settings import Serving
from fewbit.system import ambient, machine

if TYPE_CHECKING:
    from fewbit.serving.service import Service


@ambient.defaults()
def serve(model: str | Path, loading: Loading, serving: Serving, tell: Callable[[str], None]) -> None:
    """Serve `model` with OpenAI's interface until a signal ends the process.

    tell: gets lines for the user. PlanError without the packages of the extra, if the port is taken, or if the model
    cannot be served; the errors of `fewbit.load`.
    """
    try:
        from fewbit.serving import run
        from fewbit.serving.app import application
    except ModuleNotFoundError as error:
        raise PlanError(f"fewbit serve needs the package {error.name}", "pip install 'fewbit[serve]'") from error

    with run.bound(serving.host, serving.port) as socket:
        opened = service(model, loading, serving)
        if opened.engine.lowered is not None:
            tell(f"The memory has room for {opened.engine.lowered} tokens, fewer than the model's context.")
        host, port = socket.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        run.run(
            application(opened, serving.api_key, int(serving.max_body)),
            socket,
            lambda: tell(f"Serving {opened.name}: chat at {address}, OpenAI's interface at {address}/v1. Ctrl-C ends."),
        )


def service(model: str | Path, loading: Loading, serving: Serving) -> Service:
    """`model`, loaded, and an engine that waits for requests. Someone must stop it."""
    from fewbit.models.decoding.continuous import Engine, settings_of
    from fewbit.serving.service import Service

    if loading.device not in (None, "auto"):
        machine.device(loading.device)
    source = locate(model)
    tokenizer = load_tokenizer(source, trust_remote_code=loading.trust_remote_code)
    loaded = load_model(source, loading, for_text=True)
    free = machine.free_memory(loaded.device)
    engine = Engine(loaded, serving.max_model_len, serving.max_num_seqs, free)
    return Service(
        engine,
        tokenizer,
        serving.served_model_name or Path(str(model)).name,
        settings_of(loaded),
        source.rows,
        serving.max_num_seqs + serving.max_queue,
    )
