"""What fewbit does with each option of transformers' config objects, and the request that one makes of a model.

The table is the decision: a value that an option does not allow is refused with the sentence that stands there, and
docs/reference.md shows the same rows (`tools/options_table.py`). *honoured*: it has its effect. *refused*: only the
value that asks for nothing is taken. *moot*: what it asks for holds anyway, whatever it says. *dropped*: transformers
itself drops it, so that nobody after it can know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fewbit.errors import PlanError
from fewbit.plans.plan import Plan, Rule

Verdict = Literal["honoured", "refused", "moot", "dropped"]

FUSING = ("do_fuse", "fuse_max_seq_len", "modules_to_fuse")  # which transformers drops
_DEFAULT_GROUP = 128  # the configs' own: who has not thought of groups has asked for this


@dataclass(frozen=True)
class Option:
    """One option of a config: what becomes of it (`verdict`, `says`), which values it may have, and why no others."""

    config: str
    name: str
    verdict: Verdict
    says: str
    allows: Callable[[Any], bool] = lambda value: True
    refusal: str = ""


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: getattr(value, "value", value) in values


def _is_dataset(value: Any) -> bool:
    return value is None or isinstance(value, str) or (bool(value) and all(isinstance(text, str) for text in value))


_AUTO = _one_of(None, "auto", "auto_trainable")
_KERNELS = "it names a kernel of gptqmodel's; fewbit takes the best of its own, so leave it"
_NOT_AWQ = "it belongs to GPTQ, AWQ has no such thing"

# What AwqConfig has from GPTQConfig and means the same.
_SHARED = (
    ("tokenizer", "honoured", "an object, or where one is; else the model's own"),
    (
        "model_seqlen",
        "honoured",
        "tokens of a calibration window (512, or all of a shorter text); beyond the context it is refused",
    ),
    ("block_name_to_quantize", "honoured", "where the blocks are, as in `model.layers`; another name is refused"),
    ("module_name_preceding_first_block", "moot", "what comes before the blocks is found by running the model"),
    ("batch_size", "honoured", "windows at once, where that is more than 2048 tokens"),
    ("pad_token_id", "moot", "windows are equally long, nothing is padded"),
    ("max_input_length", "moot", "the size of a buffer that no kernel here has"),
    ("meta", "honoured", "kept in the config of what is saved"),
)

OPTIONS: tuple[Option, ...] = (
    Option("GPTQConfig", "bits", "honoured", "2, 3, 4 or 8"),
    Option(
        "GPTQConfig",
        "dataset",
        "honoured",
        "`c4`, `c4-new` and `wikitext2`: 128 windows of it; a list of texts: all of them; "
        "none: what `fewbit quantize` takes",
        _is_dataset,
        "give its name or a list of texts; token ids are not taken",
    ),
    Option(
        "GPTQConfig",
        "group_size",
        "honoured",
        "-1: the whole row; 128, the default, becomes the largest that divides all columns, and a warning says so; "
        "another that does not divide them is refused",
    ),
    Option("GPTQConfig", "damp_percent", "honoured", "share of the mean diagonal of the Hessian"),
    Option(
        "GPTQConfig",
        "desc_act",
        "honoured",
        "columns are taken in falling order of their inputs; each keeps the group it lies in, so the file needs no "
        "order and says false",
    ),
    Option(
        "GPTQConfig", "act_group_aware", "honoured", "the same; where both are false, columns are taken as they lie"
    ),
    Option("GPTQConfig", "sym", "honoured", "false: with zero points, saved as `gptq_v2`"),
    Option(
        "GPTQConfig",
        "true_sequential",
        "honoured",
        "linears that read the same tensor are quantized together, those that come later see the result",
    ),
    Option(
        "GPTQConfig",
        "format",
        "honoured",
        "`gptq` or `gptq_v2`, also as `checkpoint_format`",
        _one_of("gptq", "gptq_v2"),
        "only gptq and gptq_v2 are written",
    ),
    Option("GPTQConfig", "backend", "refused", "but `auto` and `auto_trainable`", _AUTO, _KERNELS),
    Option(
        "GPTQConfig",
        "cache_block_outputs",
        "refused",
        "but true: hidden states are kept, in the memory that calibration takes",
        _one_of(True),
        "hidden states between blocks are always kept; fewer or shorter texts need less memory",
    ),
    Option(
        "GPTQConfig",
        "modules_in_block_to_quantize",
        "honoured",
        "those only, list after list; optimum is not needed; a name that no block has, and less than half of the "
        "blocks' parameters, are refused",
    ),
    *(
        Option("GPTQConfig", name, "dropped", "an option of older versions")
        for name in ("use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16", "static_groups", "dynamic")
    ),
    *(Option("GPTQConfig", name, verdict, says) for name, verdict, says in _SHARED),  # type: ignore[arg-type]
    Option("AwqConfig", "bits", "honoured", "4; others are refused", _one_of(4), "AWQ's files hold 4 bits"),
    Option("AwqConfig", "group_size", "honoured", "as of GPTQConfig"),
    Option("AwqConfig", "zero_point", "honoured", "false: symmetric weights, saved with zero points of 8"),
    Option(
        "AwqConfig",
        "format",
        "honoured",
        "`gemm` or `gemv`, also as `version`",
        _one_of("gemm", "gemv"),
        "only gemm and gemv are written",
    ),
    Option("AwqConfig", "backend", "refused", "but `auto` and `auto_trainable`", _AUTO, _KERNELS),
    Option(
        "AwqConfig",
        "modules_to_not_convert",
        "honoured",
        "parts of the names of linears that stay as they are; a name that no linear has is refused",
    ),
    Option("AwqConfig", "do_fuse", "honoured", "transformers drops it, `import fewbit` keeps it"),
    Option("AwqConfig", "fuse_max_seq_len", "honoured", "the same; beyond the context it is refused"),
    Option("AwqConfig", "modules_to_fuse", "honoured", "the same: it turns fusing on; what can be fused is found"),
    Option(
        "AwqConfig",
        "dataset",
        "honoured",
        "as of GPTQConfig: AWQ on a model that is not quantized, which transformers refuses",
        _is_dataset,
        "give its name or a list of texts; token ids are not taken",
    ),
    Option("AwqConfig", "sym", "moot", "`zero_point` says it"),
    *(Option("AwqConfig", name, verdict, says) for name, verdict, says in _SHARED),  # type: ignore[arg-type]
    Option("AwqConfig", "damp_percent", "refused", "but the default", _one_of(0.1), _NOT_AWQ),
    Option("AwqConfig", "desc_act", "refused", "but the default", _one_of(False), _NOT_AWQ),
    Option("AwqConfig", "act_group_aware", "refused", "but the default", _one_of(True), _NOT_AWQ),
    Option("AwqConfig", "true_sequential", "refused", "but the default", _one_of(True), _NOT_AWQ),
    Option("AwqConfig", "cache_block_outputs", "refused", "but the default", _one_of(True), _NOT_AWQ),
    Option(
        "AwqConfig",
        "modules_in_block_to_quantize",
        "refused",
        "but none",
        _one_of(None),
        "AWQ says it the other way round, with modules_to_not_convert",
    ),
    Option("AwqConfig", "exllama_config", "dropped", "an option of older versions"),
    Option("BitsAndBytesConfig", "load_in_8bit", "honoured", "LLM.int8()"),
    Option("BitsAndBytesConfig", "load_in_4bit", "honoured", "NF4 or FP4 in blocks of 64"),
    Option(
        "BitsAndBytesConfig",
        "llm_int8_threshold",
        "honoured",
        "what the kernel `llm_int8` leaves exact; the default rounds no activations at all",
    ),
    Option("BitsAndBytesConfig", "llm_int8_skip_modules", "honoured", "none given: the output head"),
    Option(
        "BitsAndBytesConfig",
        "llm_int8_enable_fp32_cpu_offload",
        "honoured",
        "what a device map sends to the CPU or the disk, beside a GPU, is not quantized; where false it is, and runs "
        "on the CPU",
    ),
    Option(
        "BitsAndBytesConfig",
        "llm_int8_has_fp16_weight",
        "refused",
        "but false",
        _one_of(False, None),
        "it keeps weights in 16 bits, which is no quantization",
    ),
    Option(
        "BitsAndBytesConfig",
        "bnb_4bit_compute_dtype",
        "honoured",
        "activations are cast to it and back; float32, the default, means their own type",
    ),
    Option(
        "BitsAndBytesConfig",
        "bnb_4bit_quant_type",
        "honoured",
        "`nf4` or `fp4`",
        _one_of("nf4", "fp4"),
        "known are nf4 and fp4",
    ),
    Option("BitsAndBytesConfig", "bnb_4bit_use_double_quant", "honoured", "scales in 8 bits"),
    Option("BitsAndBytesConfig", "bnb_4bit_quant_storage", "honoured", "the type that the codes have in files"),
    Option("GgufConfig", "gguf_file", "honoured", "as `from_pretrained` names it"),
    Option("GgufConfig", "dequantize", "honoured", "ordinary weights"),
)


def check(config: Any, *only: str) -> None:
    """PlanError with a sentence for every option of `config`, or for those named, that cannot be honoured."""
    kind = type(config).__name__
    wrong = [
        f"{kind}({option.name}={getattr(value, 'value', value)!r}): {option.refusal}"
        for option in OPTIONS
        if option.config == kind
        and option.name in (only or (option.name,))
        and not option.allows(value := getattr(config, option.name, None))
    ]
    if wrong:
        raise PlanError("\n".join(wrong), "docs/reference.md lists what each option does.")


@dataclass(frozen=True)
class Request:
    """A quantization that a config asks for while a model is loaded.

    dataset, tokenizer: as given. length: tokens of a window, batch: windows at once; None and 1: ours. stages: linears
    of a block that are quantized one list after another; empty: found; None: all at once. blocks: the name under which
    the model's blocks should lie. left: parts of names that must be some linear's.
    """

    plan: Plan
    dataset: str | Sequence[str] | None
    tokenizer: Any
    length: int | None
    batch: int
    stages: tuple[tuple[str, ...], ...] | None
    blocks: str | None
    preceding: tuple[str, ...]
    left: tuple[str, ...]


def request(config: Any) -> Request | None:
    """What `config` asks for of a model that is not quantized; None where it needs no calibration. PlanError for what
    cannot be honoured."""
    check(config)
    kind = type(config).__name__
    if kind not in ("GPTQConfig", "AwqConfig"):
        return None
    group = "row" if config.group_size == -1 else f"g{config.group_size}"
    symmetric = config.sym if kind == "GPTQConfig" else not config.zero_point
    scheme = f"int{config.bits}-{group}{'-sym' if symmetric else ''}"
    left: tuple[str, ...] = ()
    stages: tuple[tuple[str, ...], ...] | None = None
    if kind == "GPTQConfig":
        order = bool(config.desc_act or config.act_group_aware)
        options = {"damp": str(config.damp_percent), "act_order": str(order).lower()}
        asked = config.modules_in_block_to_quantize
        if asked is not None:
            stages = tuple((one,) if isinstance(one, str) else tuple(one) for one in asked)
            rules = [Rule(f"*.{name}", scheme, "gptq", options) for stage in stages for name in stage]
            stages = stages if config.true_sequential else None
        else:
            rules = [Rule("*", scheme, "gptq", options)]
            stages = () if config.true_sequential else None
    else:
        left = tuple(config.modules_to_not_convert or ())
        rules = [*(Rule(f"*{name}*", None) for name in left), Rule("*", scheme, "awq")]
    return Request(
        plan=Plan(kind, str(config.quant_method.value), tuple(rules), adapt=config.group_size == _DEFAULT_GROUP),
        dataset=config.dataset,
        tokenizer=config.tokenizer,
        length=config.model_seqlen,
        batch=config.batch_size,
        stages=stages,
        blocks=config.block_name_to_quantize,
        preceding=tuple(config.module_name_preceding_first_block or ()),
        left=left,
    )
