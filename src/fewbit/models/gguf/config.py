"""A model's config as the metadata of a GGUF file, and back.

    transformers (Llama)                              file (`a` is the name of the architecture)
    num_hidden_layers, hidden_size, vocab_size        a.block_count, a.embedding_length, a.vocab_size
    num_attention_heads, num_key_value_heads          a.attention.head_count, a.attention.head_count_kv
    head_dim                                          a.attention.key_length, a.attention.value_length
    intermediate_size, max_position_embeddings        a.feed_forward_length, a.context_length
    rms_norm_eps                                      a.attention.layer_norm_rms_epsilon
    rope_parameters                                   a.rope.* and some tensors (positions.py)
    sliding_window, layer_types                       a.attention.sliding_window, ..._pattern
    tie_word_embeddings                               whether there is no tensor output.weight

Writing raises an error for a config that a file cannot express, because llama.cpp would compute something else. Reading
compares the keys with the shapes of the tensors before a model is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from fewbit.errors import PlanError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.models.gguf import cycles, hybrid, kinds, latent, positions
from fewbit.models.gguf.architecture import Architecture
from fewbit.models.gguf.metadata import Metadata
from fewbit.models.gguf.names import architecture

_ANY = 1 << 20  # the length of texts of a model that has no limit


def to_metadata(config: Any, name: str) -> dict[str, Any]:
    """Keys and values for a model of transformers' `config`, named `name`. PlanError if no file can express it."""
    arch, whole = architecture(config), config
    config = kinds.common(config, arch)
    _refuse(config, arch)
    heads, rope = _of(config, arch, "num_attention_heads", 0), positions.of_config(config)
    width = _of(config, arch, "head_dim") or config.hidden_size // max(heads, 1)
    if arch.alpha and rope.get("rope_type") == "dynamic" and rope.get("alpha"):
        rope = {"rope_theta": rope["rope_theta"] * rope["alpha"] ** (width / (width - 2))}
    inner = _same(_of(config, arch, "intermediate_size"), "intermediate_size")
    found: dict[str, Any] = {
        "general.architecture": arch.name,
        "general.type": "model",
        "general.name": name,
        "block_count": config.num_hidden_layers,
        "context_length": _ANY
        if arch.unturned or arch.any_length
        else _of(config, arch, "max_position_embeddings", _ANY),
        "embedding_length": config.hidden_size,
        "feed_forward_length": hybrid.adjusted(config, inner or 4 * config.hidden_size),
        "attention.head_count": heads,
        "vocab_size": config.vocab_size,
    }
    if arch.grouped_heads:
        found |= {
            "attention.head_count_kv": _of(config, arch, "num_key_value_heads", heads),
            "attention.key_length": width,
            "attention.value_length": width,
        }
    if not arch.attention:
        found["feed_forward_length"] = 0
    elif arch.has_no("intermediate_size"):
        del found["feed_forward_length"]
    if not arch.has_no("rms_norm_eps"):
        found[arch.epsilon] = float(_of(config, arch, "rms_norm_eps"))
    if arch.rotary:
        found |= {
            "rope.dimension_count": positions.columns(rope, width, arch),
            "rope.freq_base": float(rope["rope_theta"]),
            **positions.to_keys(config, arch, rope),
        }
    if arch.sections:
        found["rope.dimension_sections"] = positions.sections(rope.get("mrope_section", positions.SECTIONS), width)
    if arch.unwoven:
        turned = positions.columns(rope, width, arch)
        found["rope.dimension_sections"] = positions.sections(config.mrope_section, turned // 2)
    for theirs, ours in (("attn_logit_softcapping",) * 2, ("final_logit_softcapping",) * 2):
        if (cap := getattr(config, theirs, None)) is not None:
            found[ours] = float(cap)
    found |= {ours: float(_entry(config, theirs)) for theirs, (ours, _) in arch.numbers.items()}
    given = {ours: _entry(config, theirs) for theirs, ours in arch.optional.items()}
    found |= {ours: float(value) for ours, value in given.items() if value is not None}
    given = {ours: getattr(config, theirs) for theirs, ours in arch.optional_counts.items()}
    found |= {ours: int(value) for ours, value in given.items() if value is not None}
    found |= {ours: _one(config, theirs) for theirs, ours in arch.counts.items()}
    found |= {key: prod(int(getattr(config, each)) for each in theirs) for key, theirs in arch.products.items()}
    found |= {ours: int(getattr(config, theirs)) for theirs, (ours, _) in arch.integers.items()}
    found |= hybrid.to_keys(config) if arch.linear_attention else {}
    found |= hybrid.layers_to_keys(config, arch, inner) if arch.without_attention else {}
    found |= hybrid.dense_to_keys(getattr(config, arch.mlp_types)) if arch.mlp_types else {}
    found |= latent.to_keys(config, arch, rope) if arch.latent else {}
    found |= kinds.to_keys(whole, config) if arch.two_kinds else {}
    found |= kinds.fixed_to_keys(config, arch) if arch.unshared else {}
    found |= kinds.heads_to_keys(config, arch)
    found |= {ours: bool(getattr(config, theirs)) for theirs, ours in arch.flags.items()}
    found |= {ours: _number(config, theirs, values) for theirs, (ours, values) in arch.named.items()}
    found |= {ours: _flags(config, theirs, (one, two)) for theirs, (ours, one, two) in arch.listed.items()}
    for theirs, ours in arch.turned.items():
        found |= positions.turned_to_keys(getattr(config, theirs), ours)
    found |= {**_window(config, arch), **arch.constants}
    return {key if key.startswith("general.") else f"{arch.name}.{key}": value for key, value in found.items()}


def _number(config: Any, key: str, values: Mapping[str, int]) -> int:
    """The number of an entry that is a name."""
    if (found := getattr(config, key)) not in values:
        raise PlanError(f"llama.cpp has {key} = {' or '.join(values)}; this model has {found}")
    return values[found]


def _flags(config: Any, key: str, names: tuple[str, str]) -> np.ndarray[Any, Any]:
    """Whether the entry of each layer is the first of two names."""
    if others := set(getattr(config, key)) - set(names):
        raise PlanError(f"llama.cpp has {' and '.join(names)} in {key}; this model has {sorted(others)}")
    return np.array([each == names[0] for each in getattr(config, key)])


def _of(config: Any, arch: Architecture, key: str, default: Any = None) -> Any:
    """An entry of a config by Llama's name for it; `default` if the config lacks it."""
    name = arch.keys.get(key, key)
    return getattr(config, name, default) if name else default


def _entry(config: Any, key: str, default: Any = None) -> Any:
    """An entry of a config by its own name, or of one that it contains."""
    inner, _, last = key.rpartition(".")
    return getattr(getattr(config, inner) if inner else config, last, default)


def _nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json of entries with these names."""
    found: dict[str, Any] = {}
    for name, value in named.items():
        inner, _, last = name.rpartition(".")
        (found.setdefault(inner, {}) if inner else found)[last] = value
    return found


def _one(config: Any, key: str) -> int:
    """A number of the config, which may have it once for each layer."""
    return int(_same(getattr(config, key), key))


def _same(found: Any, key: str) -> Any:
    """The entry `key`, or the one value of all layers that it has."""
    each = set(found) if isinstance(found, list | tuple) else {found}
    if len(each) != 1:
        raise PlanError(f"a GGUF file has one value for {key}; the layers of this model have {sorted(each)}")
    return each.pop()


def to_config(file: GgufFile) -> dict[str, Any]:
    """The content of config.json for the model in `file`. FormatError if its keys and tensors contradict each other."""
    keys = Metadata(file)
    arch = keys.architecture
    layers = keys.count("block_count") - keys.whole("nextn_predict_layers")
    hidden = keys.count("embedding_length")
    vocab, columns = keys.shape("token_embd.weight")
    blocks = cycles.blocks(keys, layers)
    if columns != hidden or keys.layers != blocks:
        raise keys.wrong(f"it has {keys.layers} blocks of width {columns}, but its keys say {blocks} and {hidden}")
    each = kinds.query_heads(keys, layers) if arch.attention else [0]
    heads = each[0]
    if arch.unturned and keys.get("rope.scaling.finetuned", True):
        raise keys.wrong(f"its layers have RoPE, and {arch.cls} is read without")
    for key, value in arch.constants.items():
        other = keys.real(key, value) if isinstance(value, float) else keys.get(key, value)
        if other != value:
            raise keys.wrong(f"{arch.name}.{key} is {str(other)[:80]}; {arch.cls} is read with {value} only")
    config: dict[str, Any] = {
        "architectures": [arch.cls],
        "model_type": arch.model_type,
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "max_position_embeddings": keys.count("context_length"),
        "tie_word_embeddings": "output.weight" not in file.entries,
        "dtype": _dtype(file),
        **_special(keys),
    }
    config |= {**arch.fixed, **arch.required, **{key: each.neutral for key, each in arch.factors.items()}}
    config |= _heads(keys, config) if arch.grouped_heads else _unturned(keys, config) if arch.attention else {}
    if not arch.has_no("rms_norm_eps"):
        config["rms_norm_eps"] = keys.real(arch.epsilon)
    config |= dict.fromkeys(arch.padded.values(), vocab)
    config |= {key: tensor in file.entries for key, tensor in arch.biases.items()}
    config |= {key: keys.real(ours, default) for key, (ours, default) in arch.numbers.items()}
    config |= {key: None if keys.get(ours) is None else keys.real(ours) for key, ours in arch.optional.items()}
    config |= {key: keys.get(ours) and keys.count(ours) for key, ours in arch.optional_counts.items()}
    counts = {key: keys.count(ours) for key, ours in arch.counts.items()}
    config |= {key: count for key, count in counts.items() if key not in arch.keys}
    config |= {"use_qk_norm": counts[arch.experts] != arch.no_head_norms} if arch.no_head_norms else {}
    config |= {key: keys.ratio(*ours) for key, ours in arch.quotients.items()}
    config |= {key: keys.whole(ours, default) for key, (ours, default) in arch.integers.items()}
    config |= {key: keys.flag(ours) for key, ours in arch.flags.items()}
    for key, (ours, values) in arch.named.items():
        names = {value: name for name, value in values.items()}
        if (number := keys.count(ours)) not in names:
            raise keys.wrong(f"{arch.name}.{ours} is {number}; {arch.cls} has {', '.join(map(str, names))}")
        config[key] = names[number]
    for key, (ours, one, two) in arch.listed.items():
        each = keys.get(ours, np.ones(layers, bool))
        if not isinstance(each, np.ndarray) or len(each) != layers:
            raise keys.wrong(f"{arch.name}.{ours} is no list of {layers} values")
        config[key] = [one if value else two for value in each.tolist()]
    config |= hybrid.of_keys(keys, layers) if arch.linear_attention else {}
    config |= hybrid.layers_of_keys(keys, layers) if arch.without_attention else {}
    config |= {arch.mlp_types: hybrid.dense_of_keys(keys, layers)} if arch.mlp_types else {}
    config |= _windows(keys, config)
    config |= {"mrope_section": keys.wholes("rope.dimension_sections", 3)[:3]} if arch.unwoven else {}
    for theirs, ours in arch.turned.items():
        config[theirs] = positions.turned_of_keys(keys, ours, config["rope_parameters"]["rope_theta"])
    config |= {arch.query_heads: each} if arch.query_heads else {}
    if arch.gates:
        config[arch.gates] = kinds.gates(keys, heads)
    if arch.unshared:
        config["activation_sparsity_pattern"] = kinds.sparsity(arch, layers)
        config["num_kv_shared_layers"] = max(layers - arch.unshared, 0)
    named = {name: value for key, value in config.items() if (name := arch.keys.get(key, key))}
    named |= {key: count for key, count in counts.items() if key in arch.keys}  # Llama's name for another entry
    return _nested(named | {key: named[other] for key, other in arch.equal.items()})


def _heads(keys: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """Heads, MLP and positions of a model whose file says how many key-value heads there are."""
    arch, hidden, heads = keys.architecture, config["hidden_size"], config["num_attention_heads"]
    if arch.latent:
        found = latent.of_keys(keys, heads)
        if arch.no_positions:
            return found
        return {**found, "rope_parameters": latent.scaled(keys, positions.of_keys(keys, found["qk_rope_head_dim"]))}
    if arch.two_kinds:
        rope = positions.of_keys(keys, keys.count("attention.key_length"))
        return {**kinds.of_keys(keys, config["num_hidden_layers"]), "rope_parameters": rope}
    layers = config["num_hidden_layers"]
    if arch.kv_in_windows > 1:
        kv = kinds.fewest_kv_heads(keys, _sliding(keys, layers))
    else:
        kv = hybrid.kv_heads(keys) if arch.without_attention else keys.count("attention.head_count_kv", heads)
    width = keys.count("attention.key_length", hidden // heads if heads <= hidden else 1)
    value = keys.count("attention.value_length", width)
    if (value != width and not arch.value_width) or any(count % kv for count in kinds.query_heads(keys, layers)):
        raise keys.wrong(f"{arch.name} cannot have {heads} heads with {kv} key-value heads of width {width}")
    if (arch.has_no("head_dim") and width * heads != hidden) or (arch.has_no("num_key_value_heads") and kv != heads):
        raise keys.wrong(f"{arch.name} cannot have {heads} heads of width {width} and {kv} key-value heads")
    rows = keys.shape(keys.first("attn_qkv.weight" if arch.joined else "attn_q.weight"))[0]
    wanted = width * (heads + 2 * kv) if arch.joined else width * heads * (2 if arch.gated_queries else 1)
    if rows != wanted:
        raise keys.wrong(f"the queries have {rows} rows, but its keys require {wanted}")
    found = {
        "num_key_value_heads": kv,
        "head_dim": width,
        **({arch.value_width: value} if arch.value_width else {}),
        **(
            {}
            if arch.has_no("intermediate_size") or hybrid.all_sparse(keys)
            else {"intermediate_size": hybrid.inner(keys)}
        ),
        **({} if arch.no_positions else {"rope_parameters": positions.of_keys(keys, width)}),
    }
    if arch.original_context:
        found["original_max_position_embeddings"] = keys.count(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        )
    return found


def _unturned(keys: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """MLP and positions of a model with a table of positions, or with biases of attention."""
    arch, hidden, heads = keys.architecture, config["hidden_size"], config["num_attention_heads"]
    length = config["max_position_embeddings"]
    length, columns = keys.shape("position_embd.weight") if arch.learned else (length, hidden)
    if columns != hidden or hidden % heads:
        raise keys.wrong(f"{heads} heads and {columns} columns of positions do not fit a width of {hidden}")
    if keys.count("attention.head_count_kv", heads) not in (heads, arch.constants.get("attention.head_count_kv")):
        raise keys.wrong(f"{arch.name} cannot have {keys.get('attention.head_count_kv')} key-value heads for {heads}")
    inner = keys.count("feed_forward_length")
    return {
        "max_position_embeddings": length,
        "intermediate_size": None if inner == 4 * hidden else inner,
    }


def _refuse(config: Any, arch: Architecture) -> None:
    act = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    act = getattr(config, "activation_function", act)
    if (act or "") != arch.activation:
        raise PlanError(f"llama.cpp runs {arch.name} with {arch.activation} in its MLP; this model has {act}")
    usual = getattr(config, "scale_attn_weights", True)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) or not usual:
        raise PlanError(f"llama.cpp runs {arch.name} with the usual scale of attention; this model has another scale")
    if (scalar := getattr(config, "query_pre_attn_scalar", None)) is not None:
        by_hidden = config.num_hidden_layers == arch.scaled_by_hidden
        wanted = config.hidden_size // config.num_attention_heads if by_hidden else config.head_dim
        if scalar != wanted:
            raise PlanError(f"llama.cpp scales the queries of {arch.name} by {wanted}; this model needs {scalar}")
    if arch.tied and not config.tie_word_embeddings:
        raise PlanError(f"llama.cpp runs {arch.name} with an output head tied to the embedding; this model has its own")
    if arch.untied and config.tie_word_embeddings:
        raise PlanError(f"llama.cpp runs {arch.name} with an output head of its own; that of this model is tied")
    cycles.check(config, arch)
    factors = {key: each.neutral for key, each in arch.factors.items()}
    for key, wanted in {**arch.required, **factors}.items():
        found = _entry(config, key, wanted)
        if (tuple(found) if isinstance(found, list) and isinstance(wanted, tuple) else found) != wanted:
            raise PlanError(
                f"llama.cpp runs {arch.name} with {key} = {wanted}; this model has {found}",
                "Quantize the original model to GGUF: that multiplies its factors into the weights."
                if key in factors
                else "",
            )
    for key, other in arch.equal.items():
        if (one := getattr(config, key)) != (two := getattr(config, other)):
            raise PlanError(f"llama.cpp runs {arch.name} with {key} = {other}; this model has {one} and {two}")
    if arch.twice and (inner := getattr(config, arch.twice)) != 2 * config.hidden_size:
        raise PlanError(f"llama.cpp runs {arch.name} with {arch.twice} = 2 x hidden_size; this model has {inner}")
    if arch.unturned and getattr(config, "position_embedding_type", None) == "rope":
        raise PlanError(f"llama.cpp runs {arch.name} without positions; this model has position_embedding_type = rope")
    if not arch.grouped and config.num_key_value_heads != config.num_attention_heads:
        raise PlanError(
            f"llama.cpp runs {arch.name} with a key-value head for each query head; this model has "
            f"{config.num_key_value_heads} for {config.num_attention_heads}"
        )
    width = getattr(config, "head_dim", None)
    if (arch.square or arch.has_no("head_dim")) and width and width * config.num_attention_heads != config.hidden_size:
        raise PlanError(
            f"llama.cpp runs {arch.name} with heads as wide as the model; this model's have {width} columns"
        )
    if (last := getattr(config, "moe_layer_end_index", -1)) not in (-1, config.num_hidden_layers - 1):
        raise PlanError(f"llama.cpp runs {arch.name} with experts in its last layers; this model's end at layer {last}")
    if arch.unrotated and list(config.no_rope_layers) != [int(i % arch.unrotated > 0) for i in _layers(config)]:
        raise PlanError(f"llama.cpp runs {arch.name} only if one layer in {arch.unrotated} has no RoPE")
    if arch.experts_in:
        step = config.interleave_moe_layer_step
        if list(getattr(config, arch.experts_in)) != [*range(step - 1, config.num_hidden_layers, step)]:
            raise PlanError(f"llama.cpp runs {arch.name} with experts in one layer of {step}")
    experts = getattr(config, arch.experts, 0)
    if arch.no_head_norms and config.use_qk_norm != (experts != arch.no_head_norms):
        raise PlanError(
            f"llama.cpp runs {arch.name} with use_qk_norm = False if it has {arch.no_head_norms} experts, else True; "
            f"this model has {experts} experts and {config.use_qk_norm}"
        )
    if arch.windowed and (config.sliding_window is None) == (config.num_hidden_layers == arch.windowed):
        raise PlanError(
            f"llama.cpp runs {arch.name} with sliding windows if it has {arch.windowed} layers, and else without; this "
            f"model has {config.num_hidden_layers} layers and a window of {config.sliding_window}"
        )
    if arch.regular and [kind == "sliding_attention" for kind in config.layer_types] != _usual(
        arch, arch.period, config.num_hidden_layers
    ):
        raise PlanError(f"llama.cpp runs {arch.name} with a sliding window in all layers but one in {arch.period}")
    if arch.one_theta and len(bases := {each["rope_theta"] for each in config.rope_parameters.values()}) > 1:
        raise PlanError(f"llama.cpp runs {arch.name} with one base of RoPE; this model has {sorted(bases)}")
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if arch.some_window and not windowed:
        raise PlanError(f"llama.cpp runs {arch.name} with a sliding window in some layers; this model has none")
    if windowed and not arch.period and "full_attention" in config.layer_types:
        raise PlanError(
            f"llama.cpp runs {arch.name} with full attention in all layers; here some have a sliding window"
        )


def _layers(config: Any) -> range:
    """The numbers of the layers, from 1."""
    return range(1, config.num_hidden_layers + 1)


def _window(config: Any, arch: Architecture) -> dict[str, Any]:
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if window is None or (types is not None and "sliding_attention" not in types):
        # Without the key, llama.cpp may assume a window.
        return {"attention.sliding_window": 0} if arch.no_window else {}
    found: dict[str, Any] = {"attention.sliding_window": window}
    if arch.period:
        sliding = [kind == "sliding_attention" for kind in types or ()]
        if arch.pattern or sliding != _usual(arch, arch.period, len(sliding)):
            found["attention.sliding_window_pattern"] = np.array(sliding)
    if arch.local_theta is not None:
        local = config.rope_parameters.get("sliding_attention") or {}
        theta = local.get("rope_theta")
        if arch.turned_in_windows and local:
            found[arch.turned_in_windows] = positions.columns(local, config.head_dim, arch)
        if theta is not None and theta != (arch.local_theta or positions.of_config(config)["rope_theta"]):
            found["rope.freq_base_swa"] = float(theta)
    return found


def _usual(arch: Architecture, period: int, layers: int) -> list[bool]:
    """Which layers have a sliding window if every `period`-th has none."""
    return [layer % period != (0 if arch.first_full else period - 1) for layer in range(layers)]


def _sliding(keys: Metadata, layers: int) -> list[bool]:
    """Which layers have a sliding window."""
    arch, pattern = keys.architecture, keys.get("attention.sliding_window_pattern")
    if not keys.get("attention.sliding_window") and not arch.default_window:
        return [False] * layers
    if isinstance(pattern, np.ndarray):
        if len(pattern) not in (layers, layers + keys.whole("nextn_predict_layers")):
            raise keys.wrong(f"the pattern of sliding windows has {len(pattern)} layers, not {layers}")
        return [bool(each) for each in pattern[:layers]]
    period = arch.period if pattern is None else keys.count("attention.sliding_window_pattern")
    return _usual(arch, period, layers)


def _windows(keys: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """Sliding windows. Where some layers have full attention, also logit softcaps and the scale of queries."""
    arch, layers, window = keys.architecture, config["num_hidden_layers"], keys.get("attention.sliding_window")
    if not arch.period:
        if not (arch.window and window):
            return {}
        return {"sliding_window": keys.count("attention.sliding_window")}
    if arch.windowed and layers != arch.windowed:
        return {"sliding_window": None, "layer_types": ["full_attention"] * layers}
    found: dict[str, Any] = {
        "sliding_window": keys.count("attention.sliding_window", 4096),
        "layer_types": ["sliding_attention" if each else "full_attention" for each in _sliding(keys, layers)],
    }
    if arch.scaled_by_hidden is None:
        return found
    by_hidden = layers == arch.scaled_by_hidden
    found["query_pre_attn_scalar"] = (
        config["hidden_size"] // config["num_attention_heads"] if by_hidden else config["head_dim"]
    )
    found |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (value := keys.get(cap)) is not None and value != 0:
            found[cap] = keys.real(cap)
    return found


def _special(keys: Metadata) -> dict[str, Any]:
    """Ids of special tokens. eos_token_id is a list if several tokens end a text."""
    tokens = keys.shape("token_embd.weight")[0]

    def found(name: str) -> int | None:
        value = keys.file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and 0 <= value < tokens else None

    ends = list(dict.fromkeys(i for i in map(found, ("eos", "eot", "eom")) if i is not None))
    return {
        "bos_token_id": found("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": found("padding"),
    }


def _dtype(file: GgufFile) -> str:
    """The dtype of the unquantized weights: that of most bytes of matrices if it has 16 bits, else float32."""
    sizes: dict[str, int] = {}
    for entry in file.entries.values():
        if len(entry.shape) == 2:
            sizes[entry.type] = sizes.get(entry.type, 0) + entry.spec.nbytes
    largest = max(sizes, key=lambda kind: sizes[kind], default="f32")
    return {"f16": "float16", "bf16": "bfloat16"}.get(largest, "float32")
