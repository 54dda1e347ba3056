"""Train a LoRA with transformers' `Trainer`. The base model, packed or not, stays unchanged.

Several ranks train in data parallel, by torch's DistributedDataParallel. Each has the whole model and its own batches.
The gradients of the adapter are averaged over all learned tokens.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import patch_environment
from peft import LoraConfig, get_peft_model
from peft.tuners import tuners_utils
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fewbit import registry
from fewbit.errors import NumericsError, PlanError
from fewbit.models import blocks
from fewbit.models.adapters.attach import quiet
from fewbit.models.adapters.tuning import Tuning
from fewbit.models.linears import LINEARS, is_linear, shape_of
from fewbit.nn.layers import QLinear
from fewbit.system import ranks
from fewbit.texts.examples import Example

Progress = Callable[[int, int, float], None]  # steps done, steps in total, loss of the last step
_IGNORED = -100  # the label that the loss ignores


@dataclass(frozen=True)
class Trained:
    """A model with its trained adapter. Losses are in nats per learned token.

    loss: mean over all training steps. before, after: on the held-out examples, before and after training; None without
    such examples. stopped: why training ended early, else None; the adapter is then that of the last finite step.
    """

    model: Any
    steps: int
    loss: float
    before: float | None
    after: float | None
    stopped: str | None


def train(
    model: Any,
    name: str,
    pad: int,
    training: Sequence[Example],
    held_out: Sequence[Example],
    tuning: Tuning,
    progress: Progress,
) -> Trained:
    """Train a LoRA on the examples of `training`.

    name: the base model's name in the adapter's config. pad: the token id that pads short examples. NumericsError if
    the held-out loss is not finite before training; PlanError for targets that PEFT refuses, see also `check_fits`.
    """
    torch.manual_seed(tuning.seed)  # of the adapter's initial values
    adapted = _adapted(model, name, tuning)
    before = held_out_loss(adapted, held_out, tuning.batch, pad)
    if before is not None and not math.isfinite(before):
        raise NumericsError(f"the loss of {name} is {before} before any training", "Its weights may be damaged.")
    steps, watcher, stopped = tuning.steps_for(len(training), ranks.size()), _Watcher(progress), None
    if ranks.size() > 1:  # all ranks read the same base model: only the adapter needs to be sent
        base = [name for name, each in adapted.named_parameters() if not each.requires_grad]
        base += [name for name, _ in adapted.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(adapted, base)
    # In several processes, accelerate gives each its GPU; in one, the first that is visible.
    alone = model.device.type == "cuda" and ranks.size() == 1
    device = patch_environment(accelerate_torch_device=str(model.device)) if alone else nullcontext()
    # The Trainer selects a GPU; the caller's own is selected again at the end.
    selected = torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext()
    with selected, device, tempfile.TemporaryDirectory() as scratch:  # the Trainer requires a folder, left empty
        trainer = _Trainer(
            adapted,
            _arguments(scratch, tuning, steps, model),
            train_dataset=[{"ids": e.ids, "learned": e.learned} for e in training],
            data_collator=lambda rows: batch_of([Example(**row) for row in rows], pad),
            callbacks=[watcher],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            with ranks.peer_errors(computes=True):
                trainer.train()
        except _NotFinite as problem:
            stopped = f"{problem} in step {watcher.done + 1} of {steps}"
            watcher.go_back(adapted)
    for parameter in adapted.parameters():
        parameter.grad = None
    adapted.eval()
    after = held_out_loss(adapted, held_out, tuning.batch, pad) if watcher.done and not stopped else None
    return Trained(adapted, watcher.done, watcher.mean, before, after, stopped)


def held_out_loss(model: Any, examples: Sequence[Example], batch: int, pad: int) -> float | None:
    """Nats per learned token over all examples, which are split among ranks; None if there are none."""
    if not examples:
        return None
    model.eval()
    total, count = 0.0, 0
    own = [examples[i] for i in ranks.part(len(examples))]
    with torch.inference_mode():
        for start in range(0, len(own), batch):
            tensors = {k: v.to(model.device) for k, v in batch_of(own[start : start + batch], pad).items()}
            labels = tensors.pop("labels")[:, 1:]
            logits = model(**tensors, use_cache=False).logits[:, :-1]
            counted = labels != _IGNORED
            total += float(nn.functional.cross_entropy(logits[counted].float(), labels[counted], reduction="sum"))
            count += int(counted.sum())
    both = ranks.all_reduce(torch.tensor([total, count], dtype=torch.float64, device="cpu"))
    return float(both[0] / both[1])


def batch_of(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels [examples, tokens of the longest], padded on the right."""
    shape = len(examples), max(len(e.ids) for e in examples)
    filled = (pad, 0, _IGNORED)
    ids, mask, labels = (torch.full(shape, value, dtype=torch.int64, device="cpu") for value in filled)
    for row, example in enumerate(examples):
        here = torch.tensor(example.ids, dtype=torch.int64, device="cpu")
        learned = torch.tensor(example.learned, dtype=torch.bool, device="cpu")
        ids[row, : len(here)], mask[row, : len(here)] = here, 1
        labels[row, : len(here)] = here.where(learned, _IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _adapted(model: Any, name: str, tuning: Tuning) -> Any:
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.scale,  # type: ignore[arg-type]  # PEFT declares int, and accepts any number
        lora_dropout=tuning.dropout,
        target_modules=list(tuning.targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    unsuited = _outside(model) if tuning.targets else _outside(model) + _unsuited(model, config)
    if unsuited:
        config.exclude_modules = unsuited
    try:
        with quiet():
            adapted = get_peft_model(model, config)
    except ValueError as error:  # target modules that do not exist or are not linears
        raise PlanError(f"`targets={','.join(tuning.targets)}`: {str(error).splitlines()[0][:300]}") from None
    adapted.peft_config["default"].base_model_name_or_path = name
    model.config.use_cache = False
    if tuning.checkpointing:
        # transformers renamed the second method to the first.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return adapted


def check_fits(model: nn.Module, tuning: Tuning) -> None:
    """PlanError for a target that no module's name ends in, and for a rank above that of every linear to adapt.

    PEFT refuses targets only if none fits, and takes any rank.
    """
    every = [name for name, _ in model.named_modules()]
    linears = {name: module for name, module in model.named_modules() if isinstance(module, LINEARS)}
    for target in tuning.targets:
        if not any(_ends_in(name, target) for name in every):
            known = dict.fromkeys(name.rpartition(".")[2] for name in linears)
            raise PlanError(f"`targets`: the model has no linear {target!r}", registry.near(target, known))
    adapted = [name for name in linears if not tuning.targets or any(_ends_in(name, each) for each in tuning.targets)]
    largest = max(adapted, key=lambda name: min(shape_of(linears[name])), default=None)
    if largest is not None and tuning.rank > (most := min(shape := shape_of(linears[largest]))):
        raise PlanError(
            f"`rank={tuning.rank}`: {largest} is [{shape[0]}, {shape[1]}], and no linear to adapt has a larger rank",
            f"Give a `rank` of at most {most}; 8 to 64 is usual.",
        )


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _outside(model: Any) -> list[str]:
    """Names of the linears outside the language model's blocks, if the model has towers: text does not train them."""
    if not blocks.towers(model):
        return []
    inside = tuple(f"{block}." for block in blocks.find_blocks(model))
    return [name for name, m in model.named_modules() if isinstance(m, LINEARS) and not name.startswith(inside)]


def _unsuited(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of linears that take no LoRA: routers that return more than a product, and what PEFT refuses.

    PEFT refuses some linears of Mamba models, whose code reads their weights without calling them.
    """
    check = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)

    def refused(name: str) -> bool:
        try:
            return check is not None and check(config, model, name.rpartition(".")[2]) is not None
        except ValueError:
            return True

    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, LINEARS) and (not (isinstance(module, QLinear) or is_linear(module)) or refused(name))
    ]


def _arguments(scratch: str, tuning: Tuning, steps: int, model: Any) -> TrainingArguments:
    on_gpu = model.device.type == "cuda"
    paged = on_gpu and importlib.util.find_spec("bitsandbytes") is not None
    return _Arguments(
        on=str(model.device),
        output_dir=scratch,
        per_device_train_batch_size=tuning.batch,
        gradient_accumulation_steps=tuning.accumulate,
        max_steps=steps,
        learning_rate=tuning.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=steps // 20,
        optim="paged_adamw_8bit" if paged else "adamw_torch",
        bf16=on_gpu and model.dtype == torch.bfloat16,
        use_cpu=not on_gpu,
        seed=tuning.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        label_names=["labels"],
    )


@dataclass
class _Arguments(TrainingArguments):
    """Arguments of a training on the model's device alone.

    In a single process, transformers would move the model to the first visible GPU, and split larger batches over all
    of them (torch's DataParallel).
    """

    on: str = "cpu"

    @property
    def device(self) -> torch.device:
        first: torch.device = super().device  # this also sets up accelerate, and selects the first GPU
        own = torch.device(self.on)
        if first.type == own.type == "cuda":
            torch.cuda.set_device(own)
        return own

    @property
    def n_gpu(self) -> int:
        return min(1, int(super().n_gpu))


class _NotFinite(Exception):
    pass


class _Trainer(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if ranks.all_reduce((~torch.isfinite(loss)).float().reshape(1)):  # all ranks must stop at the same step
            raise _NotFinite(f"the loss is {float(loss)}" if not torch.isfinite(loss) else "a loss is not finite")
        return loss


class _Watcher(TrainerCallback):
    """Counts finished steps, and keeps a copy of the adapter (it is small) from before the last optimizer step."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.done, self.losses = progress, 0, list[float]()
        self.good, self.good_after = dict[str, Tensor](), 0

    @property
    def mean(self) -> float:
        return sum(self.losses) / max(len(self.losses), 1)

    def go_back(self, model: Any) -> None:
        """Restore the values of the adapter that last gave a finite loss."""
        self.done = self.good_after
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.good:
                    parameter.copy_(self.good[name])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.good_after = self.done
        self.good = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        if not all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None):
            raise _NotFinite("a gradient is not finite")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])
            self.progress(state.global_step, state.max_steps, logs["loss"])
