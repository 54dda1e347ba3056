"""Writes a Hugging Face folder from the finished tensors of a run or conversion: shards, config, side files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewbit.formats.containers.gguf import GgufFile
from fewbit.formats.containers.safetensors import Checkpoint, ShardWriter, copy_side_files
from fewbit.models import scales, stored
from fewbit.models.scales import Scales
from fewbit.models.skeleton import Skeleton, load_tokenizer
from fewbit.pipeline.settled import Settled
from fewbit.system.files import write_json

SHARD_BYTES = 512 << 20
PAGES = 64 << 20  # bytes of files that are read before their pages are dropped


def write(folder: Path, settled: Settled, blocks: Checkpoint) -> int:
    """Write the model's files into `folder`: shards, config, scales, side files. Returns the bytes of all tensors.

    blocks: the tensors that differ from the source's, by their names in the model. Each is read once.
    """
    skeleton, resolved = settled.skeleton, settled.resolved
    suffixes = {a.module: list(resolved.format.specs(a.shape, a.scheme)) for a in resolved.assignments.values()}
    tensors: list[tuple[str, Checkpoint, str]] = []  # name in the model, checkpoint that has it, key there
    originals: dict[str, str | None] = {}  # name in the model -> name in the source
    for key, name, _ in skeleton.passed_through({f"{module}.weight" for module in suffixes} | blocks.specs.keys()):
        module = name.removesuffix(".weight")
        if module in suffixes:
            own = {settled.part(module, suffix): suffix for suffix in suffixes[module]}
            tensors += [(part, blocks, part) for part in own if part not in originals]  # fused ones appear once
            fused = module in settled.fused
            originals |= {p: None if fused else stored.original(skeleton, key, name, end) for p, end in own.items()}
            continue
        originals[name] = stored.original(skeleton, key, name)
        rewritten = name in blocks.specs  # a norm or bias
        tensors.append((name, blocks, name) if rewritten else (name, skeleton.checkpoint, key))
    names = stored.names(skeleton, originals, suffixes)
    carried = skeleton.carried(resolved.assignments)
    writer = ShardWriter(folder, {names[n]: place.specs[key] for n, place, key in tensors} | carried, SHARD_BYTES)
    read = 0
    for name, place, key in [
        *((names[n], place, key) for n, place, key in tensors),
        *((key, skeleton.checkpoint, key) for key in carried),
    ]:
        writer.add(name, place.get(key))
        if (read := read + place.specs[key].nbytes) > PAGES:
            blocks.drop_pages()
            skeleton.checkpoint.drop_pages()
            read = 0
    writer.close()
    config = skeleton.source.config
    if skeleton.source.gguf is None:
        copy_side_files(skeleton.source.beside, folder)
    else:  # the tokenizer comes from the file's metadata, which names no dtype
        load_tokenizer(skeleton.source).save_pretrained(folder)
        config["dtype"] = str(skeleton.dtype_of_source).removeprefix("torch.")
    config.pop("transformers_weights", None)  # the name of the source's weight file
    if skeleton.model.all_tied_weights_keys and not skeleton.tied:
        config |= _untied(config)  # the two tensors differ, so readers must not tie them
    if settled.config:
        config["quantization_config"] = settled.config
    else:
        config.pop("quantization_config", None)
        config["dtype"] = str(skeleton.dtype_of_source).removeprefix("torch.")
    write_json(folder / "config.json", config, indent=2)
    scales.write(folder, folded(skeleton, blocks))
    return writer.nbytes


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of config.json by which readers give the output head a tensor of its own, also those of a language model
    in it."""
    inner = {key: {**config[key], "tie_word_embeddings": False} for key in ("text_config",) if key in config}
    return {"tie_word_embeddings": False, **inner}


def folded(skeleton: Skeleton, blocks: Checkpoint) -> Scales:
    """The scales that `blocks` holds, composed with those that were already folded into the source."""
    source = skeleton.source
    before = scales.of_metadata(GgufFile(source.files[0]).metadata) if source.gguf else scales.read(source.beside)
    own = Scales({name: blocks.get(name) for name in scales.of_blocks(blocks.specs)}, skeleton.source.address)
    return own.after(before) if own else before
