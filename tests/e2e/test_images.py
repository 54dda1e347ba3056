"""`fewbit generate --image`: what reaches the model, and clear errors before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fewbit as package
from fewbit.errors import FormatError, PlanError
from fewbit.models import images
from tests import models, multimodal
from tests.e2e.conftest import Fewbit

pytest.importorskip("PIL")
from PIL import Image  # after the check

IMAGE_TOKEN = models.VOCAB  # the first id after the tokenizer's own
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% elif p['type'] == 'text' %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """A tiny LLaVA with its processor, quantized. Its chat template takes lists of parts only."""
    config = multimodal.config("llava")
    config.text_config.vocab_size, config.image_token_index = IMAGE_TOKEN + 1, IMAGE_TOKEN
    folder = multimodal.save(tmp_path / "model", "llava", config)
    tokenizer = models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 32, "width": 32}
    transformers.LlavaProcessor(
        transformers.LlavaImageProcessorPil(size=size, crop_size=size),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)
    package.quantize(folder, tmp_path / "out", plan="nf4", device="cpu")
    return tmp_path / "out"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each call of `generate` of a LLaVA."""
    calls: list[dict[str, Any]] = []
    generate = transformers.LlavaForConditionalGeneration.generate

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append({"input_ids": args[0], **kwargs})
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "generate", noted)
    return calls


@pytest.mark.parametrize("chat", [False, True])
def test_images_reach_the_model(
    chat: bool, llava: Path, picture: Path, fewbit: Fewbit, seen: list[dict[str, Any]]
) -> None:
    options = ["--chat"] if chat else []
    done = fewbit(
        "generate", llava, "The weight", "--image", picture, "--image", picture, "--max-new-tokens", 2, *options
    )
    assert done.code == 0, done.err
    (given,) = seen
    assert given["pixel_values"].shape == (2, 3, 32, 32)
    assert (given["input_ids"] == IMAGE_TOKEN).sum() == 2 * 16
    shown = models.tokenizer().decode(given["input_ids"][0][given["input_ids"][0] != IMAGE_TOKEN])
    assert shown == ("<user>The weight<assistant>" if chat else "The weight")


def test_an_image_changes_the_answer_of_python(llava: Path, picture: Path, seen: list[dict[str, Any]]) -> None:
    package.generate(llava, "<image> The weight", images=picture, max_new_tokens=1)
    package.generate(llava, "<image> The weight", images=[Image.new("RGB", (8, 8))], max_new_tokens=1)
    first, second = seen
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert not torch.equal(first["pixel_values"], second["pixel_values"])


def test_a_chat_template_for_parts_gets_a_text(llava: Path, fewbit: Fewbit, seen: list[dict[str, Any]]) -> None:
    done = fewbit("generate", llava, "The weight", "--chat", "--max-new-tokens", 1)
    assert done.code == 0, done.err
    assert "The weight" in models.tokenizer().decode(seen[0]["input_ids"][0])


def test_an_older_chat_template_is_found(llava: Path, seen: list[dict[str, Any]]) -> None:
    (llava / "chat_template.jinja").unlink()
    (llava / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}), encoding="utf-8")
    package.generate(llava, "The weight", chat=True, max_new_tokens=1)
    assert "<user>The weight" in models.tokenizer().decode(seen[0]["input_ids"][0])


def test_a_model_without_vision_takes_no_images(tmp_path: Path, picture: Path, fewbit: Fewbit) -> None:
    folder = models.save(tmp_path / "llama", "llama")
    done = fewbit("generate", folder, "The weight", "--image", picture)
    assert done.code == 2
    assert "is a LlamaForCausalLM, which takes no images" in done.err
    assert "Leave out --image" in done.err


def test_a_model_without_vision_needs_no_pillow_to_say_so(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match="takes no images"):
        package.generate(models.save(tmp_path / "llama", "llama"), "The weight", images=[picture])


def test_files_that_are_no_images_are_named(llava: Path, tmp_path: Path, fewbit: Fewbit) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    for file, words in ((broken, "pillow cannot read this file"), (tmp_path / "none.png", "there is no such file")):
        done = fewbit("generate", llava, "The weight", "--image", file)
        assert done.code == 2
        assert f"--image {file}: {words}" in done.err


def test_a_missing_processor_is_an_error(llava: Path, picture: Path, fewbit: Fewbit) -> None:
    (llava / "processor_config.json").unlink()
    with pytest.raises(FormatError, match=r"has no (image|usable) processor"):
        package.generate(llava, "The weight", images=[picture])


def test_images_need_pillow(llava: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match="images need the package pillow"):
        package.generate(llava, "The weight", images=[picture])


def test_a_prompt_with_too_few_image_tokens_is_refused(llava: Path, picture: Path) -> None:
    with pytest.raises(PlanError, match=r"the prompt has 1 image tokens \(<image>\) for 2 images"):
        package.generate(llava, "<image> The weight", images=[picture, picture])


def test_a_video_part_without_torchvision_is_left_out(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = multimodal.config("qwen3_5")
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    for number, name in enumerate(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")):
        setattr(config, name, models.VOCAB + number)
    config.text_config.vocab_size = models.VOCAB + len(names)
    folder = multimodal.save(tmp_path / "model", "qwen3_5", config)
    tokenizer = models.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.save_pretrained(folder)
    limits = {"shortest_edge": 256, "longest_edge": 1024}
    transformers.Qwen2VLImageProcessorPil(patch_size=8, size=limits).save_pretrained(folder)
    models.edit_json(folder / "preprocessor_config.json", processor_class="Qwen3VLProcessor")

    def needs(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", needs)
    package.quantize(folder, tmp_path / "out", plan="nf4", device="cpu")
    prompt = "<|vision_start|><|image_pad|><|vision_end|>The weight"
    done = package.generate(tmp_path / "out", prompt, images=[picture], max_new_tokens=2)
    assert done.tokens == 2
    models.edit_json(folder / "preprocessor_config.json", processor_class="NeedsMoreProcessor")
    with pytest.raises(PlanError, match="needs the package torchvision"):
        package.generate(folder, prompt, images=[picture])
