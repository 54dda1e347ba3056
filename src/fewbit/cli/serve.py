"""Serve a model over HTTP."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import Annotated

from fewbit.cli.flags import Fields, checked
from fewbit.cli.options import Model
from fewbit.models.loading import Loading
from fewbit.serving.settings import Serving
from fewbit.serving.sockets import bound


@checked
def serve(
    model: Model,
    serving: Serving = Serving(),
    loading: Annotated[Loading, Fields("adapter", "device", "dtype", "kernel", "trust_remote_code")] = Loading(),
) -> None:
    """Serve MODEL with OpenAI's interface, and a chat page. Needs the extra: pip install 'fewbit[serve]'.

    With --engine, start vLLM or llama.cpp on MODEL instead; it must be installed.
    """
    if serving.engine == "fewbit":
        bound(serving.host, serving.port).close()  # if the port is taken, say so before the imports
    from fewbit.api import serve as api

    if serving.api_key is None and (key := os.environ.get("FEWBIT_API_KEY")):
        serving = replace(serving, api_key=key)
    if serving.api_key is None and serving.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"note: everyone who reaches {serving.host} can use this server; --api-key limits that", file=sys.stderr)
    if serving.engine != "fewbit":
        api.hand_over(model, loading, serving, lambda line: print(line, file=sys.stderr, flush=True))
        return
    api.serve(model, loading, serving, lambda line: print(line, file=sys.stderr, flush=True))
