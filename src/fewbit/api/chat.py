"""Open a conversation with a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fewbit.models.decoding.chat import Conversation
from fewbit.models.load import fuses_by_itself, load_model
from fewbit.models.loading import Loading
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import locate
from fewbit.system import ambient, machine

_FIRST = 4096  # tokens of a fused conversation's first cache


@ambient.defaults()
def conversation(model: str | Path, loading: Loading) -> Conversation:
    """A conversation with `model`, which is loaded as `loading` says. With a number as `fuse`, its length is limited to
    that; with True, its cache grows. With None, a packed model is fused on a GPU, unless there is an adapter.

    PlanError if the model has no chat template; the errors of `fewbit.load`.
    """
    loading = replace(loading, device=machine.placed(loading.device))
    source = locate(model)
    tokenizer = load_tokenizer(source, trust_remote_code=loading.trust_remote_code)
    length = None if isinstance(loading.fuse, bool) else loading.fuse
    limits = [each for each in (source.stated_context, length) if each is not None]
    opened = Conversation(None, tokenizer, min(limits, default=None))
    first = min(_FIRST, source.stated_context or _FIRST)
    if loading.fuse is True or (loading.fuse is None and fuses_by_itself(source, loading, first)):
        loading = replace(loading, fuse=first)
    opened.model = load_model(source, loading, for_text=True)
    return opened
