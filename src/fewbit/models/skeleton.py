"""A causal LM built on the meta device, whose blocks are given weights one at a time and take them back.

The tensors of a checkpoint reach their modules through transformers' own loader and its conversion mapping, called for
one block at a time, so renamed, prefix-less and merged tensors work as they do in `from_pretrained`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D

from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.safetensors import Checkpoint
from fewbit.models.blocks import find_blocks
from fewbit.models.quiet import no_progress_bars
from fewbit.models.source import Source
from fewbit.schemes.base import PartSpec

Shape = tuple[int, int]
# Ends of names of tensors in older checkpoints, whose values models compute today.
_COMPUTED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias", "attention.bias", "attention.masked_bias")


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states."""
        return states_of(block(hidden, *self.args, **self.kwargs))


def states_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: a tensor, or a tuple or list that begins with it."""
    states = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(states, Tensor):
        raise PlanError(f"a block of this model returns {type(states).__name__}, not hidden states", NO_CALIBRATION)
    return states


NO_CALIBRATION = "Use a method that needs no calibration, such as rtn."
# What a block may return to its model. A stand-in that passes its input on has to return the same.
_SHELLS: tuple[Callable[[Tensor], Any], ...] = (lambda s: s, lambda s: (s,), lambda s: (s, None), lambda s: [s])


class _Stop(Exception):
    pass


class _OtherShell(Exception):
    """The model took something else out of what a block returned."""


class Skeleton:
    """`model` on the meta device, the names of its `blocks`, and the checkpoint that fills them."""

    def __init__(
        self, source: Source, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool = False
    ) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        try:
            self.config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
            with init_empty_weights():
                self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    self.config, dtype=dtype, trust_remote_code=trust_remote_code
                )
        except Exception as error:  # a config can be wrong in as many ways as models read it
            raise FormatError(f"{source.folder / 'config.json'} describes no causal LM: {_first_line(error)}") from None
        self.model.eval().requires_grad_(False)
        for module in self.model.modules():  # buffers were computed on the CPU
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self.blocks = find_blocks(self.model)
        self._mapping = conversions(self.model)
        self._expected = self.model.state_dict()
        self._open()

    def _open(self) -> None:
        """Find the checkpoint's tensors, and compare them with what the model has a place for."""
        self.checkpoint = Checkpoint(list(self.source.files))
        self.name_of = self._names()
        self.tied = self._ties()
        self._check()

    def linears(self, block: str) -> dict[str, Shape]:
        """Name -> shape [N, K] of the linears of a block, in module order."""
        found = {}
        for name, module in self.model.get_submodule(block).named_modules(prefix=block):
            if isinstance(module, nn.Linear):
                found[name] = (module.out_features, module.in_features)
            elif isinstance(module, Conv1D):
                found[name] = (module.nf, module.nx)
        return found

    def all_linears(self) -> list[str]:
        """Names of all linears, those outside the blocks included."""
        return [name for name, module in self.model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]

    def why_not(self) -> str | None:
        """None if the blocks' weights can be quantized as 2-D matrices, else a sentence."""
        found = {
            name: parameter
            for block in self.blocks
            for name, parameter in self.model.get_submodule(block).named_parameters(prefix=block)
            if parameter.dim() > 2
        }
        if found:
            name, first = next(iter(found.items()))
            experts = " of fused experts (mixture of experts)" if "expert" in name else ""
            share = sum(parameter.numel() for parameter in found.values()) / self.parameters_in_blocks()
            return (
                f"{name} has shape {list(first.shape)}: blocks with weights{experts} of {first.dim()} dimensions "
                f"cannot be quantized yet, even if these stay as they are ({share:.1%} of the blocks' parameters)"
            )
        return None

    def parameters_in_blocks(self) -> int:
        return sum(p.numel() for block in self.blocks for p in self.model.get_submodule(block).parameters())

    def passed_through(self) -> Iterator[tuple[str, str, PartSpec]]:
        """(checkpoint name, model name, spec) of every tensor that belongs in an output, ties stored once."""
        for key, name in self.name_of.items():
            if name not in self.tied:
                yield key, name, self.checkpoint.specs[key]

    def carried(self, quantized: Container[str]) -> dict[str, PartSpec]:
        """Checkpoint name -> spec of the tensors without a place that an output holds as they are.

        Other readers may use them, such as vLLM a head for multi-token prediction. Tensors of a `quantized` linear are
        not among them: beside its packed tensors they would mean something else.
        """
        prefix, specs = self.model.base_model_prefix, self.checkpoint.specs
        return {k: specs[k] for k, name in self.without_place.items() if not owned(name, prefix, quantized)}

    def stored_names(self, names: list[str]) -> dict[str, str]:
        """Model name -> the name that transformers' `save_pretrained` would write, which every reader knows."""
        marked = {name: torch.empty(0, dtype=torch.float32, device="cpu") for name in names}
        written = {id(tensor): name for name, tensor in revert_weight_conversion(self.model, marked).items()}
        return {name: written.get(id(tensor), name) for name, tensor in marked.items()}

    def key_of(self, name: str) -> str:
        """What the checkpoint calls the tensor of that model name."""
        return next(key for key, own in self.name_of.items() if own == name)

    def outside(self) -> dict[str, Shape]:
        """Name -> shape of the token embeddings, and of the output head where it is a weight of its own."""
        embeddings, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        modules = {id(module): name for name, module in self.model.named_modules()}
        found = {}
        for module in (embeddings, head):
            name = modules.get(id(module))
            if name is not None and f"{name}.weight" in self.name_of.values() and f"{name}.weight" not in self.tied:
                rows, columns = self._expected[f"{name}.weight"].shape
                found[name] = (rows, columns)
        return found

    def stored_dtype(self, name: str) -> torch.dtype:
        """The type in which the checkpoint holds the tensor of that model name."""
        return self.checkpoint.specs[self.key_of(name)].dtype

    def weight(self, module: str) -> Tensor:
        """The weight [N, K] of a materialized linear; GPT-2's Conv1D keeps it transposed."""
        linear = self.model.get_submodule(module)
        assert isinstance(linear.weight, Tensor)
        return linear.weight.T if isinstance(linear, Conv1D) else linear.weight

    def replace_weight(self, module: str, weight: Tensor) -> None:
        """Give a materialized linear the values [N, K]."""
        self.weight(module).copy_(weight)

    @contextmanager
    def materialized(self, prefix: str | None) -> Iterator[nn.Module]:
        """The block called `prefix` (None: all that is in no block, the output head excepted) with its weights."""
        inside = [key for key, name in self.name_of.items() if self._belongs(name, prefix)]
        self._load(inside)
        module = self.model.get_submodule(prefix) if prefix else self.model
        try:
            yield module
        finally:
            for name, _ in list(self.model.named_parameters()):
                if self._belongs(name, prefix):
                    self._set(name, self._expected[name])

    def capture(self, batches: list[Tensor]) -> tuple[list[Tensor], dict[str, list[BlockCall]]]:
        """Hidden states that enter the first block for each batch of token ids, and how each block is called."""
        with self.materialized(None), torch.no_grad():
            first: Exception | None = None
            for shell in _SHELLS:
                try:
                    return self._captured(batches, shell)
                except (PlanError, torch.OutOfMemoryError):
                    raise
                except Exception as error:  # of a model's own code, which was given what it does not return
                    first = first or error
        assert first is not None
        kind = type(self.model).__name__
        raise PlanError(f"the blocks of {kind} cannot be run one by one: {_first_line(first)}", NO_CALIBRATION)

    def _captured(
        self, batches: list[Tensor], shell: Callable[[Tensor], Any]
    ) -> tuple[list[Tensor], dict[str, list[BlockCall]]]:
        hidden: list[Tensor] = []
        calls: dict[str, list[BlockCall]] = {block: [] for block in self.blocks}
        modules = {block: self.model.get_submodule(block) for block in self.blocks}

        def recorder(block: str) -> Any:
            def record(*args: Any, **kwargs: Any) -> Any:
                if not args or not isinstance(args[0], Tensor):
                    kind = type(self.model).__name__
                    raise PlanError(f"{kind} gives its blocks no hidden states as first argument", NO_CALIBRATION)
                states = args[0]
                if block == self.blocks[0]:
                    hidden.append(states)
                elif states.shape != hidden[-1].shape:
                    raise _OtherShell(f"{block} is given {list(states.shape)} for {list(hidden[-1].shape)}")
                calls[block].append(_shared(BlockCall(args[1:], kwargs), calls[block]))
                if block == self.blocks[-1]:
                    raise _Stop
                return shell(states)

            return record

        for block, module in modules.items():
            module.forward = recorder(block)
        try:
            for tokens in batches:
                try:
                    self.model(input_ids=tokens.to(self.device), use_cache=False)
                except _Stop:
                    continue
        finally:
            for module in modules.values():
                del module.forward
        return hidden, calls

    def _belongs(self, name: str, prefix: str | None) -> bool:
        if prefix is not None:
            return name.startswith(prefix + ".")
        head = self.model.get_output_embeddings()
        is_head = head is not None and self.model.get_submodule(name.rpartition(".")[0]) is head
        return not is_head and not any(name.startswith(block + ".") for block in self.blocks)

    def _names(self) -> dict[str, str]:
        """Checkpoint name -> model name, of the tensors that the model has a place for."""
        found, self.without_place = placed(self.model, self.checkpoint.specs, self._expected)
        # A tie may be stored under either of its names.
        for second, first in self.model.all_tied_weights_keys.items():
            if first not in found.values() and second in found.values():
                found = {key: first if name == second else name for key, name in found.items()}
        return found

    def _ties(self) -> dict[str, str]:
        """Model name -> the name of the tensor it shares. Where a file has both and they differ, they are not tied."""
        key_of = {name: key for key, name in self.name_of.items()}
        return {
            second: first
            for second, first in self.model.all_tied_weights_keys.items()
            if second not in key_of
            or torch.equal(self.checkpoint.get(key_of[second]), self.checkpoint.get(key_of[first]))
        }

    def _check(self) -> None:
        """FormatError unless every parameter has a tensor of its shape in the checkpoint."""
        have = set(self.name_of.values())
        names = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        missing = [name for name in names if name not in have and self.tied.get(name) not in have]
        if missing:
            raise FormatError(
                f"{self.source.folder}: {len(missing)} tensors are missing, the first is {missing[0]}",
                "The weights do not belong to this config.json, or the download is not complete.",
            )
        merged = {m for m in self._mapping if not isinstance(m, WeightRenaming)}
        for key, name in self.name_of.items():
            found, wanted = self.checkpoint.specs[key].shape, tuple(self._expected[name].shape)
            if self._expected[name].is_floating_point() and not self.checkpoint.specs[key].dtype.is_floating_point:
                raise FormatError(f"{self.source.folder}: {key} has dtype {self.checkpoint.specs[key].dtype}, no float")
            if found != wanted and not merged:
                raise FormatError(
                    f"{self.source.folder}: {key} has shape {list(found)}, config.json asks for {list(wanted)}"
                )

    def _load(self, keys: list[str]) -> None:
        config = LoadStateDictConfig(
            dtype=self.dtype, device_map={"": self.device}, weight_mapping=conversions(self.model)
        )
        # What is stored under the other name of a tie must not follow that name.
        tied = self.model.all_tied_weights_keys.values()
        named = {key: self.name_of[key] if self.name_of[key] in tied else key for key in keys}
        lazily = {named[key]: self.checkpoint.slice(key) for key in keys}
        with no_progress_bars():
            info, _ = convert_and_load_state_dict_in_model(self.model, lazily, config)
        # The loader leaves there which conversions it used, for saving: those of one block are not those of the model.
        del self.model._weight_conversions
        if info.conversion_errors or info.mismatched_keys:
            raise FormatError(f"{self.source.folder}: {info.conversion_errors or info.mismatched_keys}")
        self.model.requires_grad_(False)

    def _set(self, name: str, tensor: Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        self.model.get_submodule(module).register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def placed(
    model: PreTrainedModel, keys: Iterable[str], expected: dict[str, Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """Checkpoint name -> model name, of the tensors with a place among the `expected` ones, and of those without one.

    What older checkpoints hold of what models compute today is in neither.
    """
    mapping, prefix = conversions(model), model.base_model_prefix
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    found, without, computed = dict[str, str](), dict[str, str](), {name for name, _ in model.named_buffers()}
    for key in keys:
        name, _ = rename_source_key(key, renamings, converters, prefix, expected)
        if name in expected:
            found[key] = name
        elif not {name, f"{prefix}.{name}"} & computed and not name.endswith(_COMPUTED):
            without[key] = name
    return found, without


def owned(name: str, prefix: str, modules: Container[str]) -> bool:
    """Whether the tensor called `name` belongs to one of the modules, whose names may have the base model's prefix."""
    module, inside, _ = name.partition(".weight.")  # what goes with a weight may be called `weight.something`
    module = module if inside else name.rpartition(".")[0]
    return module in modules or f"{prefix}.{module}" in modules


def conversions(model: PreTrainedModel) -> list[WeightRenaming | WeightConverter]:
    """How transformers renames and merges a checkpoint's tensors for this model."""
    return [m for m in get_model_conversion_mapping(model) if isinstance(m, (WeightRenaming, WeightConverter))]


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer; FormatError where the folder has none that can be read."""
    return tokenizer_at(source.folder, trust_remote_code=trust_remote_code, **source.options)


def tokenizer_at(place: str | Path, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """The tokenizer in a folder or of a Hub name; FormatError where there is none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **options)
    except FormatError:
        raise
    except Exception as error:  # tokenizers raises bare Exception on a malformed file
        raise FormatError(f"{place} has no usable tokenizer: {_first_line(error)}") from None


def _shared(call: BlockCall, before: list[BlockCall]) -> BlockCall:
    """The previous call where this one is its equal: masks and positions are the same for every batch."""
    if before and _same(call.args, before[-1].args) and _same(dict(call.kwargs), dict(before[-1].kwargs)):
        return before[-1]
    return call


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a is b or a == b)


def _first_line(error: BaseException) -> str:
    return re.split(r"\n", str(error).strip() or type(error).__name__)[0][:300]
