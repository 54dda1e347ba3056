"""What fewbit knows of one kind of vision tower in a file of llama.cpp (mmproj). `rows/towers.py` has a row for each.

A tower is all that makes vectors of an image that the language model reads: an encoder and a projector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fewbit.models.gguf.metadata import Keys

Settings = Callable[[Keys], Mapping[str, Any]]  # entries that follow from the keys and tensors of a file

SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "image_size": "image_size",
    "patch_size": "patch_size",
}
# Names of blocks that most towers share
BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def side(keys: Keys) -> int:
    """Patches in a row of an image of the usual size."""
    return keys.ratio("vision.image_size", "vision.patch_size")


def merged(keys: Keys, usual: int | None = None) -> int:
    """Vectors of an image of the usual size, of which one is made of several patches."""
    across, scale = side(keys), keys.count("vision.projector.scale_factor", usual)
    if across % scale:
        raise keys.wrong(f"clip.vision.projector.scale_factor is {scale}, which does not divide {across} patches")
    return (across // scale) ** 2


def nothing(_: Keys) -> Mapping[str, Any]:
    """No further entries."""
    return {}


def neither(_: Keys, __: Keys) -> Mapping[str, Any]:
    """No further entries."""
    return {}


def nowhere(_: Any) -> Sequence[str]:
    """No projectors of their own."""
    return ()


@dataclass(frozen=True)
class Tower:
    """A kind of tower, as part of one type of transformers: all that fewbit knows of it.

    Several types may have the same tower; the language model tells them apart.

    Names of tensors are without `.weight` and `.bias`. A tuple of names: the file has the tensor of the model in
    pieces, whose rows follow each other.
    """

    projector: str  # clip.projector_type of the file
    model_type: str  # transformers' type of the whole model
    cls: str  # transformers' class of this type
    vision_type: str  # transformers' type of the encoder
    texts: Mapping[str, str]  # type that the file of the language model is read as -> type inside of the whole model
    model: Mapping[str, str]  # module names outside blocks -> names in the file
    block: Mapping[str, str | tuple[str, ...]]  # the same for modules in a block
    layers: str  # of the model, with the blocks
    output: tuple[str, int]  # tensor of the file, and which of its dimensions is the width of the language model
    # Full names of parameters that are neither a weight nor a bias -> full names in the file
    parameters: Mapping[str, str] = field(default_factory=dict)
    block_parameters: Mapping[str, str] = field(default_factory=dict)  # the same in a block
    # Names in a block of the file -> the modules of the model whose rows it has, one below the other: q, k and v
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Full names of convolutions over pairs of images -> full names of the convolutions over the first and the second
    pairs: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    # Modules of a list beside the blocks -> names in the file after v.deepstack.N, where N is a block
    beside: Mapping[str, str] = field(default_factory=dict)
    # Modules and parameters of each of several projectors -> names in the file after v.proj_blk.N
    projectors: Mapping[str, str] = field(default_factory=dict)
    projector_parameters: Mapping[str, str] = field(default_factory=dict)
    places: Callable[[Any], Sequence[str]] = nowhere  # of a config: the projectors, in the file's order
    exchanged: frozenset[str] = frozenset()  # of `parameters`: those whose first two dimensions are exchanged
    # Names in the file of what has a column for each number of a patch, with the channels last in the model and first
    # in the file -> entry of the encoder with the side of a patch, and what it is in the file: kernel, matrix or vector
    pixels_last: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    # Modules that the model has and does not use for images. No file has them
    unused: frozenset[str] = field(default_factory=frozenset)
    extra: frozenset[str] = field(default_factory=frozenset)  # tensors of the file that the model has elsewhere
    language: str = "model.language_model"  # the language model without its head
    head: str = "lm_head"  # its head
    sound: bool = False  # files may have a tower for sound, too, and the model runs without it
    when: str = ""  # a file is of this row if it has this tensor; "": if it is of no other row of its projector
    # Values of the tensors
    swapped: bool = False  # older files have the up projection of MLPs under the name of the down projection
    permuted: bool = False  # rows of q and k are in llama.cpp's order
    # The rows of `joined` q and k, too, for RoPE in two directions: those of one come before those of the other
    by_direction: bool = False
    shifted: frozenset[str] = field(default_factory=frozenset)  # names in the file of norms that 1 is added to
    # Config. Entries of the encoder and of the language model are named with it: "vision_config.depth"
    sizes: Mapping[str, str] = field(default_factory=lambda: SIZES)  # entries of the encoder -> keys after clip.vision
    epsilon: str = "layer_norm_eps"  # entry of the encoder; "" if config.json does not have it
    activation: str = "hidden_act"  # entry of the encoder; "" if config.json does not have it
    # Key of the activation of MLPs ("" without one) -> its name in config.json
    activations: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)  # further entries
    further: Settings = nothing
    both: Callable[[Keys, Keys], Mapping[str, Any]] = neither  # those of the keys of the tower and the language model
    sections: bool = False  # the language model's RoPE has sections for images
    tokens: Mapping[str, str] = field(default_factory=dict)  # entries of config.json that are ids -> the tokens
    beyond: str = ""  # a token that the vocabulary may lack: its id is then the first one after it
    # Processor
    processor: str = ""  # transformers' class
    images: str = ""  # transformers' class for the images, without Pil
    likewise: frozenset[str] = frozenset()  # further classes whose settings are read as those of `images`
    named: Mapping[str, str] = field(default_factory=dict)  # attributes of the tokenizer -> the tokens
    marks: tuple[str, str] = ("", "")  # texts around an image that neither config.json nor the processor names
    pixels: Settings = nothing  # settings of the class for the images, besides mean and deviation
    processing: Settings = nothing  # settings of the processor

    def inside(self, name: str) -> str:
        """The name in the whole model of a module or tensor of the language model."""
        own, _, rest = name.partition(".")
        place = self.language if own == "model" else self.head
        return f"{place}.{rest}" if rest else place
