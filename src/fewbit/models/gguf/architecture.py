"""What fewbit knows of one architecture of llama.cpp. `rows/` has a row for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Piece:
    """A tensor of the file that has some rows of a matrix of the model (pieces.py).

    name: in a block of the file, without `.weight`. parts: for each part of a head, the entries of config.json whose
    product is the number of its rows in all heads. by_head: the piece has the heads as a dimension of its own.
    convolution: it is [rows, 1, K], as the weight of a convolution.
    """

    name: str
    parts: tuple[tuple[str, ...], ...]
    by_head: bool = False
    transposed: bool = False
    convolution: bool = False


@dataclass(frozen=True)
class Cut:
    """The pieces of a matrix. heads: entry of config.json with their number; "" for one head.

    matrices: how many matrices of the model the parts of a head are, such as gate and up of an expert; 0 if the heads
    are those of one matrix.
    """

    heads: str
    pieces: tuple[Piece, ...]
    matrices: int = 0


@dataclass(frozen=True)
class Factor:
    """An entry of config.json that is 1 in the file's model: its number is multiplied into weights (factors.py).

    tensors: names in a block or in the file, without `.weight`. All are multiplied by one number, or, if the entry is a
    list (`each`), each by its own. rows: for each number of the list, the entries of config.json whose product is the
    number of rows of the one tensor that it multiplies.
    """

    tensors: tuple[str, ...]
    each: bool = False
    rows: tuple[tuple[str, ...], ...] = ()

    @property
    def neutral(self) -> float | list[float]:
        """The entry of a model that multiplies nothing."""
        return [1.0] * max(len(self.rows), len(self.tensors)) if self.each or self.rows else 1.0


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp, as one type of transformers: all that fewbit knows of it.

    The defaults are the common case. Several types may share a name; `when` tells their files apart.
    """

    name: str
    model_type: str  # transformers' type
    cls: str  # transformers' class of this type
    # Names of the tensors, without `.weight` and `.bias`. Those of experts: "mlp.experts.*.up_proj" -> "ffn_up_exps"
    model: Mapping[str, str]  # module names outside blocks -> names in the file
    block: Mapping[str, str]  # the same for modules in a block
    # Parameters and buffers of a block that are neither a weight nor a bias -> full names in a block of the file
    parameters: Mapping[str, str] = field(default_factory=dict)
    # The same of numbers that a file has as keys -> the whole key, with a list of those of all layers, and their shape
    lists: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    # Parameters outside blocks that are neither a weight nor a bias -> full names in the file
    outside: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[str, ...] = ("model.layers",)  # the lists of the model's blocks, in the file's order
    # Entries with the length of each list, and with n and m: the lists run n (m + 1) times, one block in each run, and
    # a file and config.json count a layer for each run of a block (cycles.py). (): each block is a layer, and runs once
    cycles: tuple[str, ...] = ()
    cut: Mapping[str, Cut] = field(default_factory=dict)  # names in `block` of matrices that a file has in pieces
    # Names in `block` of matrices of a file that are several of the model, one below the other -> for each of these,
    # the entries of config.json whose product is the number of its rows
    stacked: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    extra: frozenset[str] = field(default_factory=frozenset)  # tensors of the file that are not weights
    # Weights, by their names in the file or in a block of it, to which llama.cpp adds no LoRA
    without_lora: frozenset[str] = field(default_factory=frozenset)
    # A file is of this type if it has one of these keys, and it is not 0, or tensors; (): if it is of no other type
    when: tuple[str, ...] = ()
    # Entries of config.json that models of this row have, where a type has several rows. A frozenset: of each layer
    chosen: Mapping[str, Any] = field(default_factory=dict)
    # Values of the tensors
    permuted: bool = False  # rows of q and k are in llama.cpp's order
    # Of the rows of a head of q and k that RoPE turns, the file has the even ones, then the odd ones. config.json has
    # mrope_section, the sections of RoPE for images
    unwoven: bool = False
    mixed: bool = False  # rows of qkv are in the model's order: q, k, v of the first head, then of the second
    transposed: bool = False  # the model's linears are Conv1D
    shift: float = 0.0  # added to the weights of norms
    unshifted: frozenset[str] = field(default_factory=frozenset)  # norms that nothing is added to
    negative_exp: frozenset[str] = field(default_factory=frozenset)  # tensors that are stored as -exp(x)
    centered: frozenset[str] = field(default_factory=frozenset)  # tensors that are stored less their mean
    squeezed: frozenset[str] = field(
        default_factory=frozenset
    )  # weights of convolutions [C, 1, width], stored [C, width]
    # Vectors of the model that a file has as matrices -> the entry of config.json with the number of their rows
    matrices: Mapping[str, str] = field(default_factory=dict)
    led: frozenset[str] = field(default_factory=frozenset)  # parameters [1, 1, N, 1], stored [N, 1]
    factors: Mapping[str, Factor] = field(default_factory=dict)  # entries of config.json that are part of weights
    tiled: bool = False  # value heads of linear attention: the first of every key head, then the second
    # Config. An entry of another config in config.json is named with it, such as "attn_config.clip_qkv"
    activation: str = "silu"  # of the MLP; "": config.json does not name it
    # Names in config.json that differ from Llama's; "" for entries that it lacks, because they follow from others
    keys: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)  # further entries of config.json
    required: Mapping[str, Any] = field(default_factory=dict)  # entries of config.json that llama.cpp takes for granted
    equal: Mapping[str, str] = field(default_factory=dict)  # entry -> another that llama.cpp takes to be the same
    twice: str = ""  # entry of config.json that llama.cpp takes to be twice the width of the model
    # Entries of config.json that are numbers -> the file's key, and the value without one; None if it must have the key
    numbers: Mapping[str, tuple[str, float | None]] = field(default_factory=dict)
    optional: Mapping[str, str] = field(default_factory=dict)  # entries that are numbers or null -> the file's key
    optional_counts: Mapping[str, str] = field(default_factory=dict)  # the same of integers above 0
    counts: Mapping[str, str] = field(default_factory=dict)  # entries that are integers above 0 -> the file's key
    # Keys of the file -> the entries of config.json whose product they are
    products: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Entries of config.json -> two keys of the file, of which the first is so many times the second
    quotients: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    # Entries that are integers from 0 -> the file's key, and the value without one
    integers: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    experts: str = ""  # entry of config.json with the number of experts of a layer; "" without experts
    # Entry with the numbers of the layers with experts: every n-th, where the entry interleave_moe_layer_step says n
    experts_in: str = ""
    # Number of experts of models whose heads have no norms (use_qk_norm); all others have; 0: use_qk_norm says nothing
    no_head_norms: int = 0
    # Entry with the type of the MLP of each layer: "dense" for the first ones, then "sparse"
    mlp_types: str = ""
    flags: Mapping[str, str] = field(default_factory=dict)  # entries that are true or false -> the file's key
    # Entries that are one of some names -> the file's key, and its value for each name
    named: Mapping[str, tuple[str, Mapping[str, int]]] = field(default_factory=dict)
    # Entries with one of two names for each layer -> the file's key, the name that is true there, and the other
    listed: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)  # further keys of the file: no file has other values
    epsilon: str = "attention.layer_norm_rms_epsilon"  # the file's key
    # entry of config.json -> tensor of the file; the entry is true if the file has the tensor
    biases: Mapping[str, str] = field(default_factory=dict)
    tied: bool = False  # the output head is always the embedding
    untied: bool = False  # the output head is never the embedding
    square: bool = False  # heads are as wide as the model, though config.json has their width
    grouped: bool = True  # several query heads may share a key-value head
    # Entry of config.json with the query heads of each layer; "": all layers have as many
    query_heads: str = ""
    value_width: str = ""  # entry with the width of a value, which may differ from that of a key
    kv_in_windows: int = 1  # layers with a sliding window have so many times the key-value heads of others
    # Entry that says whether attention has a gate for each head or for each column of it: a file's attn_gate shows it
    gates: str = ""
    gated_queries: bool = False  # q has a gate of each head below the head's rows
    linear_attention: bool = False  # some layers have linear attention (gated delta net)
    latent: bool = False  # keys and values are expanded from a latent (latent.py)
    expanded: bool = False  # llama.cpp expands them, too
    lite: bool = False  # llama.cpp knows by the number of layers whether queries have a latent (latent.py)
    # Embeddings that a file gives a row for every token -> the entry of config.json with the rows that a model has
    padded: Mapping[str, str] = field(default_factory=dict)
    # Number of the first layers whose MLPs keep a twentieth of their gate; 0: the MLPs of all layers keep all of it
    sparse: int = 0
    unshared: int = 0  # number of the layers with keys and values of their own, if llama.cpp has one
    two_kinds: bool = False  # full attention has heads of its own (kinds.py)
    # Entry of `layer_types` of layers without attention, which a file gives 0 key-value heads; "" without such layers
    without_attention: str = ""
    mlp_alone: str = ""  # entry of `layer_types` of layers that are an MLP. Other layers have none
    # Entries with the number n of layers of which one has attention, or experts, and with the first of them, in place
    # of `layer_types`
    attention_every: tuple[str, ...] = ()
    experts_every: tuple[str, ...] = ()
    # Positions
    no_positions: bool = False  # layers with attention have none
    any_length: bool = False  # a file says that texts have any length, whatever the config says
    alibi: bool = False  # positions are biases of attention (ALiBi)
    # Entries of rope_parameters that are numbers -> the file's key, and those that llama.cpp takes for granted
    rope_numbers: Mapping[str, str] = field(default_factory=dict)
    rope_required: Mapping[str, Any] = field(default_factory=dict)
    other_ramp: bool = False  # llama.cpp reads beta_fast and beta_slow of YaRN; else they are 32 and 1
    sections: bool = False  # RoPE has sections for images
    partial_rotary: bool = False  # RoPE may rotate only the first columns of a head
    turned_part: float = 1.0  # the part that it rotates if config.json does not say it
    # The file's key for the columns that it rotates in layers with a sliding window; "": as many as in others
    turned_in_windows: str = ""
    # RoPE base of layers with a sliding window, if they have their own; 0: that of the others
    local_theta: float | None = None
    exact_ramp: bool = False  # YaRN does not round the limits of its ramp (truncate); llama.cpp does
    alpha: bool = False  # RoPE of type "dynamic" has an alpha, which does nothing but enlarge the base
    original_context: bool = False  # config.json has the length before RoPE was scaled
    unturned: bool = False  # no layer has RoPE, and texts have any length: position_embedding_type is not "rope"
    unrotated: int = 0  # every n-th layer has no RoPE; 0 without such layers
    # Sliding windows
    window: bool = False  # all layers may have one
    no_window: bool = False  # a file needs a key to say that there is no window
    pattern: bool = False  # a file must say which layers have a window
    some_window: bool = False  # at least one layer has a window
    # Entry of config.json with the RoPE base of each layer, 0 for none -> the file's key, which says who has RoPE
    turned: Mapping[str, str] = field(default_factory=dict)
    period: int = 0  # every n-th layer has full attention and the others have a window; 0 without such layers
    first_full: bool = False  # it is the first of so many, not the last
    regular: bool = False  # it is always the n-th layer, and the others always have a window
    one_theta: bool = False  # RoPE has the same base in both kinds of layers
    default_window: bool = False  # a file without a key for the window has one
    windowed: int = 0  # windows are used exactly in models with so many layers; 0: by the file's key
    differs: str = ""  # what llama.cpp computes otherwise in any case, a sentence
    # Number of layers of the model whose queries are scaled by hidden / heads instead of the width of a head. None: the
    # scale of queries and the softcaps of logits are no entries of config.json
    scaled_by_hidden: int | None = None

    def blocks(self, config: Any) -> list[str]:
        """The names of the blocks of a model of transformers' `config`, in the file's order."""
        length = getattr(config, self.cycles[0] if self.cycles else "num_hidden_layers")
        return [f"{each}.{place}" for each in self.layers for place in range(length)]

    @property
    def rotary(self) -> bool:
        """Whether positions are rotations of queries and keys (RoPE)."""
        return self.grouped_heads and not self.no_positions

    @property
    def grouped_heads(self) -> bool:
        """Whether a file says how many key-value heads there are, and how wide a head is."""
        return self.attention and not self.alibi and not self.learned

    @property
    def learned(self) -> bool:
        """Whether the model has a table of positions."""
        return "position_embd" in self.model.values()

    @property
    def attention(self) -> bool:
        """Whether any layer has attention."""
        return not self.has_no("num_attention_heads")

    @property
    def joined(self) -> bool:
        """Whether q, k and v are one linear."""
        return "attn_qkv" in self.block.values() and "attn_q" not in self.block.values()

    def has_no(self, key: str) -> bool:
        """Whether config.json has no entry that Llama's has under this name."""
        return self.keys.get(key) == ""
