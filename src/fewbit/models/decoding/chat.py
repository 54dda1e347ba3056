"""A conversation with a model. The keys and values of what it has read and written stay for the next turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile
from typing import Any

from torch import Tensor
from transformers import DynamicCache, TextStreamer
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fewbit.errors import PlanError
from fewbit.models.decoding.caches import CACHE, InPlaceLayer
from fewbit.models.decoding.decode import Decoder, Resume
from fewbit.models.decoding.generate import Continuation, continue_ids, in_template
from fewbit.models.decoding.loop import Stop
from fewbit.models.decoding.sampling import Sampling
from fewbit.system.files import unwritable
from fewbit.units import counted


class Conversation:
    """Turns of a user and a model, in the model's chat template.

    messages: `role` and `content` of each turn so far, with the system message first if there is one. read: the tokens
    whose keys and values the cache holds. Of the next prompt, only the tokens after the longest common beginning are
    fed to the model. prompt: the number of tokens of the last prompt, and how many of them were fed.
    """

    def __init__(self, model: Any, tokenizer: Any, limit: int | None) -> None:
        """limit: of prompt and answer together, in tokens (None: none). PlanError without a chat template."""
        if not tokenizer.chat_template:
            raise PlanError("this model has no chat template", "Use fewbit generate, which continues a text.")
        self.model, self.tokenizer, self.limit = model, tokenizer, limit
        self.messages: list[dict[str, str]] = []
        self.read: list[int] = []
        self.prompt = (0, 0)
        self._cache: DynamicCache | None = None
        self._turns = 0
        self._reader = Resume(limit or 2**31)  # of a fused model's cache

    @property
    def system(self) -> str | None:
        """The system message."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    def reset(self, system: str | None = None) -> None:
        """Forget all turns, and begin with this system message."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(
        self,
        message: str,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        tell: Callable[[str], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> Continuation:
        """The model's answer to the user's message; both become turns. tell: gets the text while it is generated.

        stopped: asked after each token; the answer ends there if it is true. Turn n samples with the seed n-1 larger.
        PlanError if the message is empty or not valid Unicode, the template refuses it, or there is no room for an
        answer. After an error or an interrupt, the conversation is as before the message.
        """
        if reason := unwritable(message):
            raise PlanError(f"the message: {reason}", "Give it in UTF-8.")
        if not message.strip():
            raise PlanError("the message is empty")
        asked = [*self.messages, {"role": "user", "content": message}]
        prompt = in_template(self.tokenizer, asked)
        ids: Tensor = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].long()
        room = None if self.limit is None else self.limit - ids.shape[1]
        if room is not None and room < 1:
            if not self._turns:
                raise PlanError(
                    f"the prompt has {counted(ids.shape[1], 'token')}. "
                    f"With an answer it exceeds the context of {self.limit:,}",
                    "Give a shorter prompt.",
                )
            raise PlanError(
                f"the conversation has {ids.shape[1]:,} tokens, and there is room for {self.limit:,}",
                "Begin a new one.",
            )
        new = max_new_tokens if room is None else min(max_new_tokens, room)
        cache, kept = self._resumed(ids[0].tolist())
        decoder = self._decoder()
        if decoder is not None:
            own: dict[str, Any] = {"resume": self._reader}
        else:
            own = {} if cache is None else {CACHE: cache}
        self._cache, self.read = None, []  # in case of an error: it may be half written
        out, told = continue_ids(
            self.model,
            self.tokenizer,
            ids,
            new,
            sampling=replace(sampling, seed=(sampling.seed + self._turns) % 2**32),
            shown=_Teller(self.tokenizer, tell),
            more={"stopping_criteria": [Stop(stopped)], **own},
        )
        kept = kept if decoder is None else self._reader.kept
        self._cache, self._turns, self.prompt = cache, self._turns + 1, (ids.shape[1], ids.shape[1] - kept)
        self.read = out[0, :-1].tolist() if own else []  # the last token was not fed
        self.messages = [*asked, {"role": "assistant", "content": told.text}]
        return told

    def _resumed(self, ids: list[int]) -> tuple[DynamicCache | None, int]:
        """A cache that holds the longest beginning of `ids` that it can, and its length. None if the model uses
        another kind, or its own as a fused model."""
        if self._decoder() is not None:
            return None, 0
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.read, ids[:-1], strict=False)))
        if self._cache is not None and _cropped(self._cache, len(self.read) - same):
            return self._cache, same
        if not self._owner._supports_default_dynamic_cache():
            return None, 0
        return DynamicCache(config=self._owner.config), 0

    @property
    def _owner(self) -> Any:
        """The model itself, which an adapter may wrap."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _decoder(self) -> Decoder | None:
        """What keeps the cache of a fused model."""
        decoder = getattr(self._owner.generate, "__self__", None)
        return decoder if isinstance(decoder, Decoder) else None


def _cropped(cache: DynamicCache, count: int) -> bool:
    """Remove the last `count` tokens. False, with nothing removed, if a layer cannot."""
    if count == 0:
        return True
    for layer in cache.layers:
        whole = type(layer) in (DynamicLayer, InPlaceLayer)
        inside = isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length() < layer.sliding_window
        if not (whole or inside):  # a state that has no single tokens, or a window that has dropped some
            return False
    cache.crop(-count)
    return True


class _Teller(TextStreamer):
    """Passes on the text of an answer, in whole words."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.tell(text)
