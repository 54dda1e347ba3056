"""The processor of a GGUF model with a vision tower: what makes token ids and pixels of text and images.

The sizes, the mean and the deviation are keys of the tower's file, the tokens are in the file of the language model. A
file does not say how large or how small an image may be, and whether large images are cut. These settings are those of
the published models (`rows/towers.py`). If preprocessor_config.json or processor_config.json of the original model is
beside the tower's file, its settings are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from fewbit.errors import FormatError, PlanError
from fewbit.models.gguf.towers import Opened
from fewbit.system.files import read_json

SETTINGS = ("preprocessor_config.json", "processor_config.json")


def made(tower: Opened, tokenizer: Any) -> Any:
    """The processor for a tower. FormatError if settings beside its file cannot be read; PlanError without torchvision,
    where transformers needs it.

    tokenizer: that of the language model, which knows the row's named tokens.
    """
    name = tower.row.processor
    settings = {"chat_template": tokenizer.chat_template, **tower.row.processing(tower.keys)}
    try:
        found = without_others(
            getattr(transformers, name), image_processor=images(tower), tokenizer=tokenizer, **settings
        )
    except ImportError:
        raise PlanError(f"{name} needs the package torchvision", "pip install torchvision") from None
    found.marks = tower.row.marks
    return found


def without_others(own: Any, **given: Any) -> Any:
    """A processor of class `own` without its parts for videos and sound.

    given: its parts for images and text, and its settings.
    """

    def check(self: Any, name: str, part: Any) -> Any:
        return None if isinstance(part, _Without) else own.check_argument_for_proper_class(self, name, part)

    cls: Any = type(own.__name__, (own,), {"check_argument_for_proper_class": check})
    others = [name for name in own.get_attributes() if name not in given]
    found = cls(**dict.fromkeys(others, _Without()), **given)
    for name in others:
        setattr(found, name, None)
    return found


class _Without:
    """In place of a part while a processor is made, as some read settings of the part then: each is None."""

    def __getattr__(self, name: str) -> None:
        return None


def images(tower: Opened) -> Any:
    """The part of the processor that makes pixels. ImportError if transformers needs torchvision for it."""
    folder, keys = tower.file.path.parent, tower.keys
    cls: Any = getattr(transformers, f"{tower.row.images}Pil", None) or getattr(transformers, tower.row.images)
    if (kind := _kind_beside(folder, tower.row.images)) is not None:
        if kind.removesuffix("Fast").removesuffix("Pil") not in {tower.row.images, *tower.row.likewise}:
            raise FormatError(
                f"{folder} has settings of a {kind[:80]}, and the images of this tower need {tower.row.images}",
                f"Put the {' or '.join(SETTINGS)} of the original model there, or none.",
            )
        try:
            return cls.from_pretrained(folder)
        except ImportError:
            raise
        except Exception as error:  # transformers can raise anything on malformed files
            raise FormatError(f"{folder} has no usable {' or '.join(SETTINGS)}: {str(error)[:200]}") from None
    return cls(
        image_mean=keys.reals("vision.image_mean", 3),
        image_std=keys.reals("vision.image_std", 3),
        **tower.row.pixels(keys),
    )


def _kind_beside(folder: Path, usual: str) -> str | None:
    """The class of the settings for images in a folder; None without such settings. FormatError if they cannot be read.

    usual: the class of settings that name none.

    processor_config.json may be without them: older processors have them in preprocessor_config.json alone.
    """
    for name in SETTINGS:
        if not (folder / name).is_file():
            continue
        try:
            found = read_json(folder / name)
        except (OSError, FormatError) as error:
            raise FormatError(f"{folder} has no usable {name}: {str(error)[:200]}") from None
        if isinstance(found, dict) and name == SETTINGS[1]:
            found = found.get("image_processor")
            if found is None:
                continue
        if not isinstance(found, dict) or not isinstance(kind := found.get("image_processor_type", usual), str):
            raise FormatError(f"{folder} has no usable {name}: it has no settings for images")
        return kind
    return None
