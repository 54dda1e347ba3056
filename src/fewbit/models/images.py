"""Images in a prompt: the model's processor makes token ids and pixels of text and image files."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import transformers
from torch import Tensor
from transformers import AutoConfig, AutoProcessor
from transformers.models.auto import processing_auto

from fewbit.errors import FormatError, PlanError
from fewbit.models import classes
from fewbit.models.gguf import processor as gguf_processor
from fewbit.models.gguf import towers
from fewbit.models.skeleton import tokenizer_at
from fewbit.models.source import Source
from fewbit.system.files import read_json, unwritable

_COPY = "Copy preprocessor_config.json and processor_config.json of the original model into it."
_NAMED_IN = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def read(files: Sequence[Any]) -> list[Any]:
    """The images in these files as RGB; objects of pillow stay. PlanError without pillow, or for a file that it cannot
    read."""
    _check_pillow()
    from PIL import Image  # an extra

    found = []
    for file in files:
        if isinstance(file, Image.Image):
            found.append(file.convert("RGB"))
            continue
        try:
            with Image.open(file) as image:
                found.append(image.convert("RGB"))
        except FileNotFoundError:
            raise PlanError(f"`images={file}`: there is no such file") from None
        except Exception as error:  # decoders of image formats raise anything on a damaged file
            raise PlanError(f"`images={file}`: pillow cannot read this file as an image: {_brief(error)}") from None
    return found


def _check_pillow() -> None:
    if find_spec("PIL") is None:
        raise PlanError("images need the package pillow", "pip install pillow")


def load_processor(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The model's processor. PlanError if the model takes no images, or if a package is missing; FormatError if the
    processor is missing or cannot be read."""
    if source.mmproj is not None:
        tower = towers.opened(source.mmproj, source.language.config["model_type"])
        named: dict[str, Any] = {**source.options, **tower.row.named}
        return gguf_processor.made(tower, tokenizer_at(source.folder, **named))
    if source.gguf is not None:
        raise PlanError(
            f"{source.name} is a GGUF file, which holds no vision tower",
            "Give the file of the tower as `mmproj`, or leave out `images`.",
        )
    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    if (cls := classes.model_class(config)) is not None and not _takes_images(cls):
        raise PlanError(f"{source.name} is a {cls.__name__}, which takes no images", "Leave out `images`.")
    _check_pillow()
    try:
        made: Any = AutoProcessor.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a processor is code of the model's author
        if "torchvision" not in str(error).lower():
            raise FormatError(f"{source.folder} has no usable processor: {_brief(error)}", _COPY) from None
        made = _without_videos(source, error)
    if not hasattr(made, "image_processor"):  # without a processor, transformers gives the tokenizer
        raise FormatError(f"{source.folder} has no image processor", _COPY)
    return made


def image_token(source: Source) -> int:
    """The id of the token in whose places an image is; -1 if config.json does not say. A vocabulary may lack it."""
    return _image_id(source.config)


def _image_id(config: Mapping[str, Any]) -> int:
    found = config.get("image_token_id", config.get("image_token_index"))
    return found if isinstance(found, int) else -1


def inputs(
    processor: Any, prompt: str, images: Sequence[Any], config: Mapping[str, Any], *, chat: bool
) -> dict[str, Tensor]:
    """The model's inputs for a prompt with images: `input_ids` [1, n], pixels, and what else the model needs.

    With `chat`, the images come before the prompt in the user's message. Else they are where the prompt has the image
    token, or before it. config: the content of config.json, which may name tokens around an image. PlanError if the
    prompt is not valid Unicode, or if the processor refuses it.
    """
    if reason := unwritable(prompt):
        raise PlanError(f"the prompt: {reason}", "Give the prompt in UTF-8.")
    token = _place(processor)
    own = _image_id(config)
    inner = processor.tokenizer.convert_ids_to_tokens(own) if own >= 0 else None
    if token and inner and inner != token and inner in prompt:
        raise PlanError(
            f"the prompt has {inner}, which stands for a part of an image",
            "Leave it out." if chat else f"Write {token} where an image belongs, or nothing.",
        )
    try:
        if chat:
            if not processor.chat_template:
                raise PlanError("this model's processor has no chat template", "Leave out `chat`.")
            parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
            made = processor.apply_chat_template(
                [{"role": "user", "content": parts}],
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:
            if token:
                prompt = _with_places(prompt, str(token), len(images))
                prompt = _with_marks(prompt, str(token), _marks(processor, config, "vision"))
            made = processor(text=[prompt], images=list(images), return_tensors="pt")
            if token and not (made["input_ids"] == config.get("image_start_token_id", -1)).any():
                marked = _with_marks(prompt, str(token), _marks(processor, config, "image"))
                made = made if marked == prompt else processor(text=[marked], images=list(images), return_tensors="pt")
    except PlanError:
        raise
    except Exception as error:  # a processor is code of the model's author
        raise PlanError(
            f"the model's processor refuses the prompt with {len(images)} images: {_brief(error)}",
            "Leave out `chat`."
            if chat
            else "Use `chat=True`, or write the model's image token where an image belongs.",
        ) from None
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def _place(processor: Any) -> str | None:
    """The token that the processor replaces by an image: that before an image, in older versions of Gemma's."""
    names = ("image_token", "boi_token") if hasattr(processor, "replace_image_token") else ("boi_token", "image_token")
    return next((found for name in names if (found := getattr(processor, name, None))), None)


def _with_places(prompt: str, token: str, count: int) -> str:
    """The prompt with one image token for each image: its own, or all before it. PlanError if it has another number."""
    found = prompt.count(token)
    if found not in (0, count):
        raise PlanError(
            f"the prompt has {found} image tokens ({token}) for {count} images",
            f"Write {token} once for each image, or not at all.",
        )
    return prompt if found else token * count + prompt


def _marks(processor: Any, config: Mapping[str, Any], kind: str) -> tuple[str, str]:
    """The tokens before and after an image, empty if config.json names none.

    kind: what config.json calls them. Some processors add those named "image", such as Molmo 2's, and GLM's does not.
    The processor of a GGUF model may have `marks` that config.json does not name.
    """
    ids = [config.get(f"{kind}_{end}_token_id") for end in ("start", "end")]
    found = [processor.tokenizer.convert_ids_to_tokens(each) if isinstance(each, int) else "" for each in ids]
    if all(found):
        return str(found[0]), str(found[1])
    return getattr(processor, "marks", ("", "")) if kind == "vision" else ("", "")


def _with_marks(prompt: str, token: str, marks: tuple[str, str]) -> str:
    """The prompt with the marks around each image token. Without them, a model takes neighbours for one image."""
    whole = token.join(marks)
    return prompt.replace(whole, token).replace(token, whole)


def _takes_images(cls: type) -> bool:
    return any("image" in name or "pixel" in name for name in inspect.signature(cls.forward).parameters)  # type: ignore[attr-defined]


def _without_videos(source: Source, error: Exception) -> Any:
    """The processor without its part for videos, which alone needs torchvision. PlanError if its images need it too."""
    needs = PlanError(
        f"the processor of {source.name} needs the package torchvision: {_brief(error)}", "pip install torchvision"
    )
    named = [read_json(source.folder / file) for file in _NAMED_IN if (source.folder / file).is_file()]
    name = next(
        (each["processor_class"] for each in named if isinstance(each, dict) and "processor_class" in each), None
    )
    name = name or vars(processing_auto)["PROCESSOR_MAPPING_NAMES"].get(source.config.get("model_type", ""))
    own: Any = getattr(transformers, str(name), None)
    try:
        parts = [part for part in own.get_attributes() if part != "video_processor"]
        cls: Any = type(own.__name__, (own,), {"get_attributes": classmethod(lambda _: parts)})
        return cls.from_pretrained(source.folder)
    except Exception:  # the class itself may need torchvision
        raise needs from None


def _brief(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def on(model: Any, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`given` without the token ids, on the model's device; floats in its dtype."""
    moved = {name: value.to(model.device) for name, value in given.items() if name != "input_ids"}
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in moved.items()}
