"""What fewbit does with each option of transformers' config objects, and what a config requests.

`OPTIONS` is the specification: a value that an option does not allow raises an error with the option's `refusal`.
`tools/options_table.py` writes the same rows into docs/reference.md. *works*: the option has its effect. *refused*: any
value raises an error, except those named in the row. *not needed*: no valid value changes the result.
*dropped*: transformers drops the option before fewbit can see it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fewbit.errors import PlanError
from fewbit.plans.plan import Plan, Rule

Verdict = Literal["works", "refused", "not needed", "dropped"]

FUSING = ("do_fuse", "fuse_max_seq_len", "modules_to_fuse")  # transformers drops these
_DEFAULT_GROUP = 128  # the configs' default; the user may not have chosen it, so the plan may adapt it to the model


@dataclass(frozen=True)
class Option:
    """One option of a config: `verdict` and `says` (the docs' row), the values that it `allows`, and the `refusal`."""

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
_KERNELS = "this names a kernel of gptqmodel; fewbit chooses its own, so remove this option"
_NOT_AWQ = "AWQ does not use this option of GPTQ"

# AwqConfig inherits these from GPTQConfig, with the same meaning.
_SHARED = (
    ("tokenizer", "works", "a tokenizer, or the path of one; default: the model's own"),
    (
        "model_seqlen",
        "works",
        "tokens in a calibration window; default: 512, or the whole text if shorter; an error beyond the context",
    ),
    (
        "block_name_to_quantize",
        "works",
        "name of the module list that holds the blocks, such as `model.layers`; another name is an error",
    ),
    (
        "module_name_preceding_first_block",
        "not needed",
        "fewbit runs the model to find the modules before the blocks; a name that the model lacks is an error",
    ),
    (
        "batch_size",
        "works",
        "minimum number of windows in a batch; default: as many as hold 2048 tokens, or up to 32768 on a GPU",
    ),
    ("pad_token_id", "not needed", "all windows have the same length, so there is no padding"),
    ("max_input_length", "not needed", "size of a buffer that fewbit's kernels do not have"),
    ("meta", "works", "kept in the config when the model is saved"),
)

OPTIONS: tuple[Option, ...] = (
    Option("GPTQConfig", "bits", "works", "2, 3, 4 or 8"),
    Option(
        "GPTQConfig",
        "dataset",
        "works",
        "`c4`, `c4-new` and `wikitext2`: 128 windows of that text; a list of texts: all of them; "
        "not given: the default text of `fewbit quantize`",
        _is_dataset,
        "give its name or a list of texts; token ids are not taken",
    ),
    Option(
        "GPTQConfig",
        "group_size",
        "works",
        "-1: the whole row; the default, 128, falls back to the largest size that divides all columns, with a warning; "
        "any other size that does not divide them is an error",
    ),
    Option("GPTQConfig", "damp_percent", "works", "damping, as a share of the mean diagonal of the Hessian"),
    Option(
        "GPTQConfig",
        "desc_act",
        "works",
        "quantizes the columns with the largest inputs first; columns stay in their groups, so the file stores no "
        "order, and its config says false",
    ),
    Option(
        "GPTQConfig",
        "act_group_aware",
        "works",
        "same as `desc_act`; if both are false, columns are quantized in stored order",
    ),
    Option("GPTQConfig", "sym", "works", "false: asymmetric, with zero points, saved as `gptq_v2`"),
    Option(
        "GPTQConfig",
        "true_sequential",
        "works",
        "linears that read the same tensor are quantized together; later linears get inputs from the quantized ones",
    ),
    Option(
        "GPTQConfig",
        "format",
        "works",
        "`gptq` or `gptq_v2`, also as `checkpoint_format`",
        _one_of("gptq", "gptq_v2"),
        "only gptq and gptq_v2 are written",
    ),
    Option("GPTQConfig", "backend", "refused", "except `auto` and `auto_trainable`", _AUTO, _KERNELS),
    Option(
        "GPTQConfig",
        "cache_block_outputs",
        "refused",
        "except true: hidden states always stay in memory",
        _one_of(True),
        "fewbit always keeps the hidden states between blocks; use fewer or shorter texts to save memory",
    ),
    Option(
        "GPTQConfig",
        "modules_in_block_to_quantize",
        "works",
        "quantizes only these, one list after another, without optimum; a name that no block has is an error, and so "
        "are lists that cover less than half of the blocks' parameters",
    ),
    *(
        Option("GPTQConfig", name, "dropped", "option of older transformers")
        for name in ("use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16", "static_groups", "dynamic")
    ),
    *(Option("GPTQConfig", name, verdict, says) for name, verdict, says in _SHARED),  # type: ignore[arg-type]
    Option("AwqConfig", "bits", "works", "4; other values are an error", _one_of(4), "AWQ's files hold 4 bits"),
    Option("AwqConfig", "group_size", "works", "as in `GPTQConfig`"),
    Option("AwqConfig", "zero_point", "works", "false: symmetric weights, saved with zero points of 8"),
    Option(
        "AwqConfig",
        "format",
        "works",
        "`gemm` or `gemv`, also as `version`",
        _one_of("gemm", "gemv"),
        "only gemm and gemv are written",
    ),
    Option("AwqConfig", "backend", "refused", "except `auto` and `auto_trainable`", _AUTO, _KERNELS),
    Option(
        "AwqConfig",
        "modules_to_not_convert",
        "works",
        "linears with one of these parts in their names stay unquantized; a part that matches no linear is an error",
    ),
    Option("AwqConfig", "do_fuse", "works", "transformers drops it; after `import fewbit` it works"),
    Option("AwqConfig", "fuse_max_seq_len", "works", "as `do_fuse`; an error beyond the context"),
    Option("AwqConfig", "modules_to_fuse", "works", "as `do_fuse`; turns fusing on, and fewbit finds what to fuse"),
    Option(
        "AwqConfig",
        "dataset",
        "works",
        "as in `GPTQConfig`; quantizes an unquantized model by AWQ, which transformers alone refuses",
        _is_dataset,
        "give its name or a list of texts; token ids are not taken",
    ),
    Option("AwqConfig", "sym", "not needed", "`zero_point` decides"),
    *(Option("AwqConfig", name, verdict, says) for name, verdict, says in _SHARED),  # type: ignore[arg-type]
    Option("AwqConfig", "damp_percent", "refused", "except the default", _one_of(0.1), _NOT_AWQ),
    Option("AwqConfig", "desc_act", "refused", "except the default", _one_of(False), _NOT_AWQ),
    Option("AwqConfig", "act_group_aware", "refused", "except the default", _one_of(True), _NOT_AWQ),
    Option("AwqConfig", "true_sequential", "refused", "except the default", _one_of(True), _NOT_AWQ),
    Option("AwqConfig", "cache_block_outputs", "refused", "except the default", _one_of(True), _NOT_AWQ),
    Option(
        "AwqConfig",
        "modules_in_block_to_quantize",
        "refused",
        "except none",
        _one_of(None),
        "for AWQ, name the modules to leave out, with modules_to_not_convert",
    ),
    Option("AwqConfig", "exllama_config", "dropped", "option of older transformers"),
    Option("BitsAndBytesConfig", "load_in_8bit", "works", "LLM.int8()"),
    Option("BitsAndBytesConfig", "load_in_4bit", "works", "NF4 or FP4 in blocks of 64"),
    Option(
        "BitsAndBytesConfig",
        "llm_int8_threshold",
        "works",
        "outlier threshold of the kernel `llm_int8`, which is opt-in; other kernels do not use it",
    ),
    Option(
        "BitsAndBytesConfig",
        "llm_int8_skip_modules",
        "works",
        "modules that stay unquantized; default: the output head",
    ),
    Option(
        "BitsAndBytesConfig",
        "llm_int8_enable_fp32_cpu_offload",
        "works",
        "true: modules that a device map with a GPU places on the CPU or the disk are not quantized; false: they are "
        "quantized, and run on the CPU",
    ),
    Option(
        "BitsAndBytesConfig",
        "llm_int8_has_fp16_weight",
        "refused",
        "except false",
        _one_of(False, None),
        "it keeps weights in 16 bits and quantizes nothing",
    ),
    Option(
        "BitsAndBytesConfig",
        "bnb_4bit_compute_dtype",
        "works",
        "activations are cast to this type and back; the default, float32, means no cast",
    ),
    Option(
        "BitsAndBytesConfig",
        "bnb_4bit_quant_type",
        "works",
        "`nf4` or `fp4`",
        _one_of("nf4", "fp4"),
        "expected nf4 or fp4",
    ),
    Option("BitsAndBytesConfig", "bnb_4bit_use_double_quant", "works", "stores the scales in 8 bits"),
    Option("BitsAndBytesConfig", "bnb_4bit_quant_storage", "works", "type of the codes in files"),
    Option("GgufConfig", "gguf_file", "works", "file name, set by the argument of `from_pretrained`"),
    Option("GgufConfig", "dequantize", "works", "unpacks the weights"),
)


def check(config: Any, *only: str) -> None:
    """PlanError with a line for each option of `config` (or of `only`) that has a value fewbit does not support."""
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
    """The quantization that a config requests for an unquantized model.

    dataset, tokenizer: as in the config. length: tokens in a window, None for fewbit's default. batch: windows in a
    batch, 1 for fewbit's default. stages: lists of linears of a block, quantized one list after another; empty: fewbit
    finds them; None: all at once. blocks: the name of the module list that holds the blocks. preceding: modules before
    the first block; each must exist. left: parts of names; each must occur in the name of a linear.
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
    """The calibrated quantization that `config` requests; None if it needs no calibration.

    PlanError if an option has an unsupported value.
    """
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
        names = config.modules_in_block_to_quantize
        if names is not None:
            stages = tuple((one,) if isinstance(one, str) else tuple(one) for one in names)
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
