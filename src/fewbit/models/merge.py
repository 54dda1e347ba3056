"""Merge an adapter into the weights of a model."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig

from fewbit.errors import NumericsError
from fewbit.formats.containers.safetensors import ShardWriter, copy_side_files, writing
from fewbit.models import decoded, scales
from fewbit.models.adapters.attach import attach
from fewbit.models.adapters.refit import presumed
from fewbit.models.conversions import owned, placed
from fewbit.models.experts import join
from fewbit.models.load import load_model
from fewbit.models.loading import Loading
from fewbit.models.quiet import no_progress_bars
from fewbit.models.scales import Scales
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import Source
from fewbit.nn.fused import packed_linears
from fewbit.schemes.base import PartSpec


def write_merged(
    source: Source,
    adapter: str | Path,
    folder: Path,
    *,
    trained: Scales | None = None,
    trust_remote_code: bool = False,
) -> dict[str, PartSpec]:
    """Unpack the weights of `source`, add the adapter to them, and write the model into `folder`.

    trained: the scales of the model that the adapter was trained on, if the adapter's folder does not record them.
    The whole model is in memory, in its own dtype. Returns checkpoint name -> spec of the tensors that are copied
    unchanged because the model has no parameter for them. NumericsError if a sum is not finite.
    """
    plain = load_model(source, Loading("cpu", trust_remote_code=trust_remote_code))
    packed = packed_linears(plain)
    if getattr(plain, "hf_quantizer", None) is not None:  # other models are floats already
        plain.dequantize()
    carried = dict[str, PartSpec]()
    if source.gguf is None:
        checkpoint, _ = decoded.opened(source)
        _, without = placed(plain, checkpoint.specs, plain.state_dict())
        prefix = plain.base_model_prefix
        carried = {k: checkpoint.specs[k] for k, name in without.items() if not owned(name, prefix, packed)}
    try:
        with no_progress_bars(), presumed(trained):
            merged = attach(plain, adapter).merge_and_unload(safe_merge=True)
        if source.gguf is None:
            merged.generation_config = GenerationConfig()  # transformers refuses to save one that breaks its own rules
        join(merged)
        with no_progress_bars(), writing():
            merged.save_pretrained(folder)
    except ValueError as error:
        raise NumericsError(f"{adapter} cannot be merged into {source.name}: {error}") from None
    scales.write(folder, scales.of_model(plain) or Scales())
    if source.gguf is not None:  # no side files: the tokenizer comes from the file's metadata
        load_tokenizer(source).save_pretrained(folder)
        return {}
    (folder / "generation_config.json").unlink(missing_ok=True)  # the source's own is copied
    copy_side_files(source.beside, folder)
    if carried:
        writer = ShardWriter(folder, carried)
        writer.adopt()
        for key in carried:
            writer.add(key, checkpoint.get(key))
        writer.close()
    return carried
