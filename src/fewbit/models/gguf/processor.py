"""The processor of a GGUF model with a vision tower: what makes token ids and pixels of text and images.

The sizes, the mean and the deviation are keys of the tower's file, the tokens are in the file of the language model. A
file does not say how large or how small an image may be, and whether large images are cut. These settings are those of
the published models (`rows/towers.py`). If preprocessor_config.json or processor_config.json of the original model is
beside the tower's file, its settings are used.
"""

from __future__ import annotations

from typing import Any

import transformers

from fewbit.errors import FormatError, PlanError
from fewbit.models.gguf.towers import Opened

SETTINGS = ("preprocessor_config.json", "processor_config.json")


def made(tower: Opened, tokenizer: Any) -> Any:
    """The processor for a tower. FormatError if settings beside its file cannot be read; PlanError without torchvision,
    where transformers needs it.

    tokenizer: that of the language model, which knows the row's named tokens.
    """
    name = tower.row.processor
    own: Any = getattr(transformers, name)
    settings = {"chat_template": tokenizer.chat_template, **tower.row.processing(tower.keys)}
    try:
        kinds = [part for part in own.get_attributes() if part != "video_processor"]
        cls: Any = type(name, (own,), {"get_attributes": classmethod(lambda _: kinds)})
        return cls(image_processor=images(tower), tokenizer=tokenizer, **settings)
    except ImportError:
        raise PlanError(f"{name} needs the package torchvision", "pip install torchvision") from None


def images(tower: Opened) -> Any:
    """The part of the processor that makes pixels."""
    folder, keys = tower.file.path.parent, tower.keys
    cls: Any = getattr(transformers, f"{tower.row.images}Pil")
    if any((folder / name).is_file() for name in SETTINGS):
        try:
            return cls.from_pretrained(folder)
        except Exception as error:  # transformers can raise anything on malformed files
            raise FormatError(f"{folder} has no usable {' or '.join(SETTINGS)}: {str(error)[:200]}") from None
    return cls(
        image_mean=keys.reals("vision.image_mean", 3),
        image_std=keys.reals("vision.image_std", 3),
        **tower.row.pixels(keys),
    )
