"""A language model on the meta device. Weights are loaded for one block at a time, and freed after it.

transformers' own loader, with its conversion mapping, loads the tensors of each block. So renamed tensors, missing
prefixes and merged tensors work as in `from_pretrained`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from fewbit.errors import FormatError, PlanError
from fewbit.models import classes, conversions, decoded, experts, on_text
from fewbit.models.blocks import embedding_of, find_blocks
from fewbit.models.building import building, empty_parameters
from fewbit.models.calls import NO_CALIBRATION, SHELLS, first_line, shared, why_not_one_by_one
from fewbit.models.calls import BlockCall as BlockCall
from fewbit.models.calls import states_of as states_of
from fewbit.models.gguf import factors
from fewbit.models.linears import is_linear, is_transposed, shape_of, weight_of
from fewbit.models.packing import Packing
from fewbit.models.quiet import no_progress_bars
from fewbit.models.source import Source
from fewbit.names import lacking
from fewbit.schemes.base import PartSpec
from fewbit.system.files import read_json
from fewbit.units import counted

INCOMPLETE = "The weights belong to another config.json, or the download is incomplete."

Shape = tuple[int, int]


class _Stop(Exception):
    pass


class _OtherShell(Exception):
    """The model expects another form of a block's return value."""


class Skeleton:
    """`model` on the meta device, the names of its `blocks`, and the checkpoint that fills them.

    packing: how the weights of a quantized source are stored, None for others. `checkpoint` decodes them.
    for_gguf: numbers that a GGUF file cannot have are multiplied into the weights (models/gguf/factors.py). multiplied:
    the tensors that differ by this from the files, with their specs there. untied: the weight of the output head if the
    original has it tied, and this model (models/heads.py) has not; else "".
    """

    packing: Packing | None = None
    untied: str = ""

    def __init__(
        self,
        source: Source,
        dtype: torch.dtype,
        device: torch.device,
        *,
        trust_remote_code: bool = False,
        for_gguf: bool = False,
    ) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        try:
            self.config = AutoConfig.from_pretrained(
                source.folder, trust_remote_code=trust_remote_code, **source.options
            )
            self._factors = factors.taken(self.config) if for_gguf else {}
            with building(), empty_parameters():
                self.model: PreTrainedModel = classes.build(
                    self.config, dtype=dtype, trust_remote_code=trust_remote_code
                )
        except PlanError as error:
            raise PlanError(f"{source.name}: {error.message}", error.hint) from None
        except Exception as error:  # a model's code can raise anything on a wrong config
            raise FormatError(
                f"{source.folder / 'config.json'} describes no causal LM and no multimodal LM: {first_line(error)}"
            ) from None
        self.model.eval().requires_grad_(False)
        experts.separate(self.model)
        for module in self.model.modules():  # buffers are computed on the CPU
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self.blocks = find_blocks(self.model)
        self._mapping = conversions.mapping_of(self.model)
        self._expected = self.model.state_dict()
        self._open()

    def _open(self) -> None:
        """Find the checkpoint's tensors, and check that they match the model's parameters."""
        self.checkpoint, self.packing = decoded.opened(self.source, self.config)
        self.name_of = self._names()
        self._transpose()
        self.multiplied = factors.multiply(self.checkpoint, self.name_of, self._factors)
        self.merged = {name for name, count in Counter(self.name_of.values()).items() if count > 1}
        self.merged |= {name for key, name in self.name_of.items() if conversions.converter_of(self._mapping, key)}
        self.tied = self._ties()
        self._check()

    def linears(self, block: str) -> dict[str, Shape]:
        """Name -> shape [N, K] of the linears of a block, in module order."""
        found = {}
        for name, module in self.model.get_submodule(block).named_modules(prefix=block):
            if is_linear(module):
                found[name] = shape_of(module)
        return found

    def all_linears(self) -> list[str]:
        """Names of all linears, including those outside the blocks."""
        return [name for name, module in self.model.named_modules() if is_linear(module)]

    def why_not(self) -> str | None:
        """None if the model has a forward pass and its blocks' weights can be quantized as matrices, else why not."""
        if reason := classes.why_no_forward(self.model):
            return reason
        if self.changed is not None:
            return (
                f"{type(self.model).__name__} changes {self.changed} in its forward pass, and packed weights cannot be "
                "changed"
            )
        inside = tuple(f"{block}." for block in self.blocks)
        shared = next((pair[0] for pair in self.tied.items() if any(name.startswith(inside) for name in pair)), None)
        if shared is not None:
            return f"{shared} is tied to {self.tied[shared]}: blocks that share weights cannot be quantized yet"
        found = {
            name: parameter
            for block in self.blocks
            for name, parameter in self.model.get_submodule(block).named_parameters(prefix=block)
            if parameter.dim() > 2 and "expert" in name
        }
        if found:
            name, first = next(iter(found.items()))
            share = sum(parameter.numel() for parameter in found.values()) / self.parameters_in_blocks()
            return (
                f"{name} has shape {list(first.shape)}: fused experts (mixture of experts) of this layout cannot be "
                f"quantized yet, even if they stay unquantized ({share:.1%} of the blocks' parameters)"
            )
        return None

    @cached_property
    def changed(self) -> str | None:
        """A parameter of a block that the model writes to before its first block runs, such as RWKV's; else None.

        No parameter has values yet, so the token embedding gives zeros.
        """
        inside = [p for block in self.blocks for p in self.model.get_submodule(block).named_parameters(prefix=block)]
        before = [parameter._version for _, parameter in inside]
        if (embedding := embedding_of(self.model)) is None:
            return None
        first: Any = self.model.get_submodule(self.blocks[0])

        def embedded(ids: Tensor) -> Tensor:
            return torch.zeros(*ids.shape, embedding.weight.shape[1], dtype=self.dtype, device=self.device)

        def reached(*args: Any, **kwargs: Any) -> Any:
            raise _Stop

        embedding.forward, first.forward = embedded, reached
        try:
            with torch.no_grad(), warnings.catch_warnings(), suppress(Exception):  # a model's code can raise anything
                warnings.simplefilter("ignore")
                self.model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=self.device), use_cache=False)
        finally:
            del embedding.forward, first.forward
        changed = (name for (name, p), version in zip(inside, before, strict=True) if p._version != version)
        return next(changed, None)

    def parameters_in_blocks(self) -> int:
        return sum(p.numel() for block in self.blocks for p in self.model.get_submodule(block).parameters())

    def passed_through(self, whole: Container[str] = ()) -> Iterator[tuple[str, str, PartSpec]]:
        """(checkpoint name, model name, spec) of every tensor of an output. Tied tensors appear once.

        If transformers merges several checkpoint tensors into one, splits one, or changes their values otherwise, they
        keep their checkpoint names, unless `whole` contains the model name of one.
        """
        seen, split = set(), {key for name, key in self.splits.items() if name in whole}
        for key, name in self.name_of.items():
            apart = name in self.merged and name not in whole
            if (source := self.splits.get(key, "")) and source not in split:
                if source not in seen:
                    yield source, source, self.checkpoint.specs[source]
                seen.add(source)
            elif name not in self.tied and (apart or name not in seen):
                yield key, key if apart else name, self.checkpoint.specs[key]
            seen.add(name)

    def carried(self, quantized: Container[str]) -> dict[str, PartSpec]:
        """Checkpoint name -> spec of tensors that this model has no parameter for, and that an output copies unchanged.

        Other software may read them, such as vLLM a head for multi-token prediction. Tensors of a `quantized` linear
        are left out: next to its packed tensors, they would have another meaning.
        """
        prefix, specs = self.model.base_model_prefix, self.checkpoint.specs
        return {k: specs[k] for k, name in self.without_place.items() if not conversions.owned(name, prefix, quantized)}

    def key_of(self, name: str) -> str:
        """The checkpoint's name of the tensor with the model name `name`."""
        return next(key for key, own in self.name_of.items() if own == name)

    @cached_property
    def head_name(self) -> str:
        """The name of the output head; "" for a model without one, and if it is no linear."""
        head = self.model.get_output_embeddings()
        return next((name for name, module in self.model.named_modules() if module is head and is_linear(module)), "")

    def outside(self) -> dict[str, Shape]:
        """Name -> shape [N, K] of the token embeddings, and of the output head if it is not tied to one.

        Gemma 4 has a second embedding, for the inputs of single layers.
        """
        embeddings, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        modules = {id(module): name for name, module in self.model.named_modules()}
        scaled = [module for module in self.model.modules() if hasattr(module, "scalar_embed_scale")]
        found = {}
        for module in (embeddings, *scaled, head):
            name = modules.get(id(module))
            if name is not None and f"{name}.weight" in self.name_of.values() and f"{name}.weight" not in self.tied:
                rows, columns = self._expected[f"{name}.weight"].shape
                found[name] = (rows, columns)
        return found

    @property
    def dtype_of_source(self) -> torch.dtype:
        """The dtype of the checkpoint's weights; of a quantized source, the one that they are decoded to."""
        return self.packing.dtype if self.packing is not None else self.source.dtype

    def stored_dtype(self, name: str) -> torch.dtype:
        """The checkpoint's dtype of the tensor with the model name `name`."""
        return self.checkpoint.specs[self.key_of(name)].dtype

    def weight(self, module: str) -> Tensor:
        """The weight [N, K] of a materialized linear."""
        return weight_of(self.model.get_submodule(module))

    def replace_weight(self, module: str, weight: Tensor) -> None:
        """Overwrite the weight of a materialized linear with `weight` [N, K]."""
        self.weight(module).copy_(weight)

    @contextmanager
    def materialized(self, prefix: str | None, *, as_stored: bool = False) -> Iterator[nn.Module]:
        """Inside this context, the block `prefix` has its weights. None: everything outside blocks, except the head.

        as_stored: weights have the checkpoint's dtypes. On the CPU they are mapped, and may only be read. Else those of
        a block may be overwritten: the next context has the checkpoint's again.
        """
        inside = [key for key, name in self.name_of.items() if self._belongs(name, prefix)]
        self._load(inside, as_stored=as_stored)
        if prefix and not as_stored:
            self._own(prefix, inside)
        for second, first in self.tied.items():  # the head is not loaded; others are, such as an encoder's embedding
            if self._belongs(first, prefix) and self._belongs(second, prefix):
                self._set(second, self.model.get_parameter(first).data)
        module = self.model.get_submodule(prefix) if prefix else self.model
        try:
            yield module
        finally:
            for name, _ in list(self.model.named_parameters(remove_duplicate=False)):
                if self._belongs(name, prefix):
                    self._set(name, self._expected[name])
            self.checkpoint.drop_pages()

    def check_text(self, *, calibrates: bool) -> None:
        """PlanError if the forward pass fails on any input or, if the plan `calibrates`, if no part runs on text."""
        part, why = self.on_text
        if calibrates and (reason := why_not_one_by_one(self.model.config) or (why if part is None else "")):
            raise PlanError(f"{type(self.model).__name__} {reason}", NO_CALIBRATION)

    @cached_property
    def on_text(self) -> on_text.OnText:
        """The part of the model that runs on token ids alone."""
        return on_text.found(self)

    def capture(self, batches: list[Tensor]) -> tuple[list[Tensor], dict[str, list[BlockCall]]]:
        """For each batch of token ids: the hidden states that enter the first block, and the calls of each block.

        PlanError if the model's blocks cannot run one by one.
        """
        if why := why_not_one_by_one(self.model.config):
            raise PlanError(f"{type(self.model).__name__} {why}", NO_CALIBRATION)
        part = self.on_text.part or ""
        with self.materialized(None), torch.no_grad():
            first: Exception | None = None
            for shell in SHELLS:
                try:
                    return self._captured(self.model.get_submodule(part), batches, shell)
                except (PlanError, torch.OutOfMemoryError):
                    raise
                except Exception as error:  # the model's code may fail on the wrong form of return value
                    first = first or error
        assert first is not None
        kind = type(self.model).__name__
        raise PlanError(f"the blocks of {kind} cannot be run one by one: {first_line(first)}", NO_CALIBRATION)

    @contextmanager
    def head(self) -> Iterator[None]:
        """Inside this context, within that of `materialized(None)`, the output head has its weights too."""
        own = [name for name in self._expected if self._is_head(name)]
        self._load([key for key, name in self.name_of.items() if name in own])
        for name in own:
            if name in self.tied:
                self._set(name, self.model.get_parameter(self.tied[name]).data)
        try:
            yield
        finally:
            for name in own:
                self._set(name, self._expected[name])

    def _captured(
        self, part: nn.Module, batches: list[Tensor], shell: Callable[[Tensor], Any]
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
                calls[block].append(shared(BlockCall(args[1:], kwargs), calls[block]))
                if block == self.blocks[-1]:
                    raise _Stop
                return shell(states)

            return record

        for block, module in modules.items():
            module.forward = recorder(block)
        try:
            for tokens in batches:
                try:
                    part(**on_text.inputs(part, tokens.to(self.device)), use_cache=False)
                except _Stop:
                    continue
        finally:
            for module in modules.values():
                del module.forward
        for block, own in calls.items():
            if len(own) != len(batches):
                kind = type(self.model).__name__
                passes = counted(len(batches), "forward pass", "forward passes")
                raise PlanError(f"{kind} runs {block} {len(own)} times in {passes}", NO_CALIBRATION)
        return hidden, calls

    def _belongs(self, name: str, prefix: str | None) -> bool:
        if prefix is not None:
            return name.startswith(prefix + ".")
        return not self._is_head(name) and not any(name.startswith(block + ".") for block in self.blocks)

    def _is_head(self, name: str) -> bool:
        head = self.model.get_output_embeddings()
        return head is not None and self.model.get_submodule(name.rpartition(".")[0]) is head

    def _names(self) -> dict[str, str]:
        """Checkpoint name -> model name, of the tensors that belong to the model."""
        found, self.without_place = conversions.placed(self.model, self.checkpoint.specs, self._expected)
        for key, fused in list(self.without_place.items()):  # experts that are fused in the checkpoint
            self._check_experts(key, fused)
            for name, expert, piece in experts.split(self.model, fused):
                own = partial(piece.of, expert=expert)
                view = conversions.after_conversion(self.model, self._mapping, key, fused, own)
                self.checkpoint.add_view(name, key, view)
                found[name] = name
                if self.packing is not None:
                    self.packing.add_part(name, key, expert, piece.rows)
                self.without_place.pop(key, None)
        self.splits = dict[str, str]()  # name of a part -> the checkpoint's tensor that transformers splits
        for key, first in list(found.items()):
            spec = self.checkpoint.specs[key]
            for name, view in conversions.parts_of(self.model, self._mapping, key, first, spec):
                self.checkpoint.add_view(name, key, view)
                found[name], self.splits[name] = name, key
                found.pop(key, None)
        # A tied tensor may be stored under either name.
        for second, first in self.model.all_tied_weights_keys.items():
            if first not in found.values() and second in found.values():
                found = {key: first if name == second else name for key, name in found.items()}
        return found

    def _transpose(self) -> None:
        """Give the decoded weights of a folder the layout of the model: files hold all packed weights as [N, K]."""
        if self.packing is None or self.source.gguf is not None:
            return
        for key, name in self.name_of.items():
            module = self.model.get_submodule(name.removesuffix(".weight")) if key in self.packing.weights else None
            if module is not None and is_transposed(module):
                spec, handle = self.checkpoint.specs[key], self.checkpoint.slice(key)
                self.checkpoint.add(key, replace(spec, shape=spec.shape[::-1]), decoded.Transposed(handle))

    def _check_experts(self, key: str, fused: str) -> None:
        """FormatError unless the fused tensor `key` of the checkpoint holds as many experts as the model has."""
        found, wanted = self.checkpoint.specs[key].shape, experts.fused_count(self.model, fused)
        if wanted is not None and found[:1] != (wanted,):
            raise FormatError(
                f"{self.source.folder}: {key} has shape {list(found)}, "
                f"but its first dimension must be {wanted}, the number of experts in config.json"
            )

    def _ties(self) -> dict[str, str]:
        """Model name -> name of the tensor that it is tied to. Stored tensors with different values are not tied."""
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
        made = {key: name for key, name in self.name_of.items() if name in self.merged}
        misfits = conversions.misfits(self.model, self._mapping, made, self.checkpoint.specs)
        if missing and (many := conversions.several_of_several(self.model)):
            raise PlanError(
                f"transformers makes several tensors of {many} of a {self.config.model_type} model while loading, "
                "which fewbit does not support yet"
            )
        missing += [name for each in misfits for name in each.lacking]
        if missing:
            fused = experts.fused_name(self.model, missing[0])
            raise FormatError(
                f"{self.source.folder}: {lacking(missing)}"
                f"{'' if fused is None else f' ({fused}, which could hold it, is missing too)'}",
                INCOMPLETE
                if (named := classes.other_class(self.config, self.model)) is None
                else f"config.json says that the weights are of {named}. fewbit quantizes models that generate text, "
                f"and builds {type(self.model).__name__} for this config.",
            )
        if misfits:
            raise FormatError(f"{self.source.folder}: {misfits[0].why}")
        for key, name in self.name_of.items():
            found, wanted = self.checkpoint.specs[key].shape, tuple(self._expected[name].shape)
            if self._expected[name].is_floating_point() and not self.checkpoint.specs[key].dtype.is_floating_point:
                raise FormatError(
                    f"{self.source.folder}: {key} has dtype {self.checkpoint.specs[key].dtype}, not a float"
                )
            if found != wanted and conversions.converter_of(self._mapping, key) is None:
                raise FormatError(
                    f"{self.source.folder}: {self.checkpoint.called(key)} has shape {list(found)}, "
                    f"config.json requires {list(wanted)}"
                )

    def _load(self, keys: list[str], *, as_stored: bool = False) -> None:
        config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan={"*": None} if as_stored else {},
            device_map={"": self.device},
            weight_mapping=conversions.mapping_of(self.model),
        )
        # A tied tensor may be stored under its other name; load it under the name that owns it.
        tied = self.model.all_tied_weights_keys.values()
        named = {key: self.name_of[key] if self.name_of[key] in tied else key for key in keys}
        read = self.checkpoint.get if as_stored else self.checkpoint.slice
        lazily = {named[key]: read(key) for key in keys}
        with no_progress_bars():
            info, _ = convert_and_load_state_dict_in_model(self.model, lazily, config)
        # The loader stores the conversions that it used, for saving. Those of one block are wrong for the whole model.
        del self.model._weight_conversions
        if why := conversions.failure(info):
            raise FormatError(f"{self.source.folder}: {why}")
        self.model.requires_grad_(False)

    def _own(self, prefix: str, keys: list[str]) -> None:
        """Copy loaded parameters that may be mapped: what is written into a mapping would be read again later."""
        if self.device.type == "cpu":
            mapped = {self.name_of[key] for key in keys if self.checkpoint.specs[key].dtype == self.dtype}
            for name, parameter in self.model.get_submodule(prefix).named_parameters(prefix=prefix):
                parameter.data = parameter.data.clone() if name in mapped else parameter.data

    def _set(self, name: str, tensor: Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        self.model.get_submodule(module).register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the model. FormatError if it is missing or cannot be read."""
    made = tokenizer_at(source.folder, trust_remote_code=trust_remote_code, **source.options)
    if getattr(made, "chat_template", None) is None and (older := source.folder / "chat_template.json").is_file():
        found = read_json(older)  # of older processors
        made.chat_template = found.get("chat_template") if isinstance(found, dict) else None
    return made


def tokenizer_at(place: str | Path, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """The tokenizer in a folder or of a Hub name. FormatError if it is missing or cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **options)
    except FormatError:
        raise
    except Exception as error:  # tokenizers raises bare Exception on a malformed file
        why = "" if first_line(error).rstrip().endswith(":") else f": {first_line(error)}"  # a list follows a colon
        hint = "" if options else "Copy tokenizer.json and tokenizer_config.json of the original model into the folder."
        raise FormatError(f"{place} has no usable tokenizer{why}", hint) from None
