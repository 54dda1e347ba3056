"""Models with a vision tower from two GGUF files: images, settings of processors, and errors for files that do not fit.

tests/golden compares a tower of every kind with the original.
"""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.smolvlm import processing_smolvlm

import fewbit as package
from fewbit.api import convert
from fewbit.errors import FormatError, PlanError
from fewbit.formats.containers.gguf import GgufFile
from fewbit.models import images
from fewbit.models.gguf import processor, towers
from fewbit.models.source import locate, with_tower
from fewbit.nn.layers import QLinear
from tests import mmproj_files, models
from tests.e2e.conftest import Fewbit

pytest.importorskip("PIL")
from PIL import Image  # after the check

# GLM's processor makes arrays of tensors, and NumPy warns of this version of PyTorch
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:mmproj.gguf. its tower for sound is left out"),
]
_NEEDS_TORCHVISION = ("pixtral", "mistral3", "llama4", "lfm2_vl", "gemma4_unified", "kimi_k25")
PROMPT = "The weight of a block"


class Files(NamedTuple):
    """A model of transformers, and the same as two GGUF files."""

    folder: Path
    text: Path
    tower: Path

    @property
    def pair(self) -> dict[str, Any]:
        return {"model": self.text, "mmproj": self.tower}


def made(place: Path, kind: str, text: str = "f32", tower: str = "f32") -> Files:
    folder = mmproj_files.save(place / "m", kind)
    (place / "files").mkdir()
    return Files(
        folder,
        mmproj_files.text_file(folder, place / "files" / "text.gguf", kind, text),
        mmproj_files.tower_file(folder, place / "files" / "mmproj.gguf", kind, tower),
    )


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Files:
    files = made(tmp_path_factory.mktemp("gemma"), "gemma3")
    for other in files.text.parent.glob("*.plain"):
        other.unlink()
    return files


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Two, of different sizes."""
    generator, files = torch.Generator().manual_seed(0), [tmp_path / "picture.png", tmp_path / "other.png"]
    for file, size in zip(files, ((40, 50), (67, 29)), strict=True):
        pixels = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(file)
    return files


@pytest.fixture
def picture(pictures: list[Path]) -> Path:
    return pictures[0]


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("kind", mmproj_files.KINDS)
def test_the_processor_is_the_originals(kind: str, tmp_path: Path, pictures: list[Path], monkeypatch: Any) -> None:
    files = made(tmp_path, kind)
    source = with_tower(locate(files.text), files.tower)
    if kind.partition("-")[0] in _NEEDS_TORCHVISION:
        pytest.importorskip("torchvision")
    if kind == "smolvlm":  # the package writes the number of a video's frames
        monkeypatch.setattr(processing_smolvlm, "num2words", str)
    ours, theirs = images.load_processor(source), mmproj_files.processor(kind)
    for given in (images.read(pictures[:1]), images.read(pictures)):
        found = images.inputs(ours, PROMPT, given, source.config, chat=False)
        same(found, images.inputs(theirs, PROMPT, given, source.config, chat=False))
        assert int((found["input_ids"] == images.image_token(source)).sum()) >= 3 * len(given)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
@pytest.mark.parametrize("kind", _NEEDS_TORCHVISION)
def test_missing_torchvision_is_said(kind: str, tmp_path: Path) -> None:
    files = made(tmp_path, kind)
    with pytest.raises(PlanError, match="Processor needs the package torchvision"):
        images.load_processor(with_tower(locate(files.text), files.tower))


@pytest.mark.parametrize("kind", ["pixtral", "mistral3"])
def test_pixels_of_pixtral_are_the_originals(kind: str, tmp_path: Path, pictures: list[Path]) -> None:
    tower, given = towers.opened(made(tmp_path, kind).tower, "llama"), images.read(pictures)
    wanted = mmproj_files.KINDS[kind].images()(given, return_tensors="pt")
    found = processor.images(tower)(given, return_tensors="pt")
    assert found["image_sizes"].tolist() == wanted["image_sizes"].tolist()
    assert torch.equal(found["pixel_values"], wanted["pixel_values"])


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "glm4v", "glm4v_moe", "glm_ocr"])
def test_images_beside_each_other_are_several(kind: str, tmp_path: Path, picture: Path) -> None:
    files = made(tmp_path, kind)
    given: dict[str, Any] = {"images": [picture, picture], "max_new_tokens": 4, "device": "cpu"}
    marked = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
    marked = ("<|begin_of_image|>", "<|image|>", "<|end_of_image|>") if kind.startswith("glm") else marked
    image, place = marked[1], "".join(marked)
    found = [
        package.generate(prompt=f"{start}{PROMPT}", **model, **given).text
        for model in ({"model": files.folder}, files.pair)
        for start in ("", 2 * image, 2 * place)
    ]
    assert set(found) == {found[0]}


@pytest.mark.parametrize("chat", [False, True])
def test_a_part_of_an_image_in_a_prompt_is_refused(gemma: Files, picture: Path, chat: bool) -> None:
    with pytest.raises(PlanError, match="the prompt has <image_soft_token>, which stands for a part of an image"):
        package.generate(prompt="a <image_soft_token>", images=picture, chat=chat, device="cpu", **gemma.pair)


def test_settings_beside_the_tower_are_used(tmp_path: Path, gemma: Files, picture: Path) -> None:
    shutil.copy(gemma.tower, tmp_path / "mmproj.gguf")
    own = transformers.Gemma3ImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1] * 3, resample=0)
    own.save_pretrained(tmp_path)
    tower, pictures = towers.opened(tmp_path / "mmproj.gguf", "gemma3_text"), images.read([picture])
    found = processor.images(tower)(pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(found, own(pictures, return_tensors="pt")["pixel_values"])
    (tmp_path / "preprocessor_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(FormatError, match=r"has no usable preprocessor_config\.json"):
        processor.images(tower)


def test_images_give_the_text_of_the_folder(gemma: Files, picture: Path, fewbit: Fewbit) -> None:
    shared = ("--image", picture, "--max-new-tokens", 8, "--device", "cpu", "--json")
    wanted = fewbit("generate", gemma.folder, PROMPT, *shared)
    found = fewbit("generate", gemma.text, PROMPT, "--mmproj", gemma.tower, *shared)
    assert wanted.code == found.code == 0, wanted.err + found.err
    assert found.json["text"] == wanted.json["text"]
    assert found.json["tokens"] == wanted.json["tokens"] > 1


def test_a_folder_with_both_files_is_the_whole_model(gemma: Files, picture: Path, fewbit: Fewbit) -> None:
    folder = gemma.text.parent
    whole = package.load(folder, device="cpu")
    assert isinstance(whole, transformers.Gemma3ForConditionalGeneration)
    assert isinstance(package.load(gemma.text, device="cpu"), transformers.Gemma3ForCausalLM)
    one = package.generate(folder, PROMPT, images=picture, max_new_tokens=4, device="cpu")
    assert (
        one.text == package.generate(prompt=PROMPT, images=picture, max_new_tokens=4, device="cpu", **gemma.pair).text
    )
    for command in (("inspect",), ("generate", "--device", "cpu", "--max-new-tokens", 2)):
        done = fewbit(command[0], folder, *([PROMPT] if command[0] == "generate" else []), *command[1:])
        assert done.code == 0, done.err


def test_auto_processor_makes_that_of_a_folder(gemma: Files, picture: Path, tmp_path: Path) -> None:
    folder = gemma.text.parent
    made_of = transformers.AutoProcessor.from_pretrained(folder)
    assert type(made_of).__name__ == "Gemma3Processor"
    given = made_of(text=f"<start_of_image>{PROMPT}", images=[Image.open(picture)], return_tensors="pt")
    model = package.load(folder, device="cpu")
    ids = model.generate(**given, max_new_tokens=4, do_sample=False)[0, given["input_ids"].shape[1] :]
    found = package.generate(folder, PROMPT, images=picture, max_new_tokens=4, device="cpu")
    assert made_of.tokenizer.decode(ids) == found.text
    alone = transformers.AutoProcessor.from_pretrained(folder, gguf_file=gemma.text.name)
    assert isinstance(alone, transformers.PreTrainedTokenizerBase)
    (tmp_path / "text").mkdir()
    shutil.copy(gemma.text, tmp_path / "text")
    alone = transformers.AutoProcessor.from_pretrained(tmp_path / "text")
    assert isinstance(alone, transformers.PreTrainedTokenizerBase)
    shutil.copy(gemma.tower, tmp_path / "text" / "one.gguf")
    shutil.copy(gemma.tower, tmp_path / "text" / "two.gguf")
    with pytest.raises(FormatError, match=r"has several vision towers \(one\.gguf, two\.gguf\)"):
        transformers.AutoProcessor.from_pretrained(tmp_path / "text")


def test_a_vocabulary_may_lack_gemmas_image_token(tmp_path: Path, gemma: Files, picture: Path) -> None:
    file = GgufFile(gemma.text)
    tokens = list(file.metadata["tokenizer.ggml.tokens"])
    tokens[tokens.index("<image_soft_token>")] = "[PAD290]"
    text = mmproj_files.changed(gemma.text, tmp_path / "text.gguf", {"tokenizer.ggml.tokens": tokens})
    source = with_tower(locate(text), gemma.tower)
    assert images.image_token(source) == len(tokens)
    given: dict[str, Any] = {"images": picture, "max_new_tokens": 4, "device": "cpu"}
    found = package.generate(text, PROMPT, mmproj=gemma.tower, **given)
    assert found.text == package.generate(prompt=PROMPT, **gemma.pair, **given).text


def test_packed_weights_stay_packed_beside_a_tower(tmp_path: Path, picture: Path) -> None:
    files = made(tmp_path, "gemma3", text="q8_0", tower="f16")
    loaded = package.load(mmproj=files.tower, model=files.text, dtype="float32", device="cpu")
    packed = {name for name, module in loaded.named_modules() if isinstance(module, QLinear)}
    assert len(packed) > 10
    assert all(name.startswith(("model.language_model", "lm_head")) for name in packed)
    weight = loaded.model.vision_tower.encoder.layers[0].mlp.fc1.weight
    original = mmproj_files.original(files.folder).model.vision_tower.encoder.layers[0].mlp.fc1.weight
    assert torch.equal(weight, original.half().float())
    assert package.generate(prompt=PROMPT, images=picture, max_new_tokens=4, device="cpu", **files.pair).tokens == 4
    with pytest.raises(PlanError, match="a GGUF file holds no vision tower"):
        loaded.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    loaded.dequantize().save_pretrained(tmp_path / "plain")
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    given = mmproj_files.inputs("gemma3", again)
    with torch.inference_mode():
        one, other = again(**given).logits, loaded(**given).logits
    assert float((one - other).norm() / one.norm()) < 1e-4


def test_a_quantized_tower_is_dequantized_with_a_note(tmp_path: Path, gemma: Files) -> None:
    path = mmproj_files.quantized(gemma.tower, tmp_path / "mmproj.gguf", "q8_0")
    with pytest.warns(UserWarning, match=r"mmproj\.gguf: q8_0 tensors of the tower are dequantized in memory"):
        loaded = package.load(gemma.text, mmproj=path, dtype="float32", device="cpu")
    original = mmproj_files.original(gemma.folder)
    given = mmproj_files.inputs("gemma3", original)
    with torch.inference_mode():
        wanted, found = original(**given).logits, loaded(**given).logits
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.1


def test_a_row_of_the_embedding_in_the_tower_is_ignored(tmp_path: Path) -> None:
    files = made(tmp_path, "mistral3")
    extra = {"v.token_embd.img_break": torch.zeros(64)}
    tower = mmproj_files.changed(files.tower, tmp_path / "mmproj.gguf", {}, extra)
    package.load(files.text, mmproj=tower, device="cpu")


def test_a_vocabulary_shorter_than_the_embedding(tmp_path: Path, gemma: Files, picture: Path) -> None:
    tokens = list(GgufFile(gemma.text).metadata["tokenizer.ggml.tokens"])
    at = tokens.index("<image_soft_token>")
    assert len(tokens) > at + 1
    keys: dict[str, Any] = {"tokenizer.ggml.tokens": tokens[:at]}
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        if (values := GgufFile(gemma.text).metadata.get(key)) is not None:
            keys[key] = values[:at]
    text = mmproj_files.changed(gemma.text, tmp_path / "text.gguf", keys)
    source = with_tower(locate(text), gemma.tower)
    assert images.image_token(source) == at
    given: dict[str, Any] = {"images": picture, "max_new_tokens": 4, "device": "cpu"}
    found = package.generate(text, PROMPT, mmproj=gemma.tower, **given)
    assert found.text == package.generate(prompt=PROMPT, **gemma.pair, **given).text


def test_missing_tokens_of_a_processor_are_named(tmp_path: Path, picture: Path) -> None:
    files = made(tmp_path, "internvl")
    tokens = list(GgufFile(files.text).metadata["tokenizer.ggml.tokens"])
    for token in ("<img>", "<video>"):
        without = ["[X]" if each == token else each for each in tokens]
        mmproj_files.changed(files.text, tmp_path / f"{token}.gguf", {"tokenizer.ggml.tokens": without})
    given: dict[str, Any] = {"mmproj": files.tower, "images": picture, "max_new_tokens": 2, "device": "cpu"}
    with pytest.raises(FormatError, match="its vocabulary has no token '<img>'"):
        package.generate(tmp_path / "<img>.gguf", PROMPT, **given)
    assert package.generate(tmp_path / "<video>.gguf", PROMPT, **given).tokens


def test_a_tower_for_sound_beside_gemma_4s_is_left_out(tmp_path: Path) -> None:
    files = made(tmp_path, "gemma4")
    keys = {"clip.has_audio_encoder": True, "clip.audio.projector_type": "gemma4a"}
    heard = {"a.blk.0.ln1.weight": torch.zeros(8), "mm.a.input_projection.weight": torch.zeros(64, 8)}
    tower = mmproj_files.changed(files.tower, tmp_path / "mmproj.gguf", keys, heard)
    with pytest.warns(UserWarning, match=r"mmproj\.gguf: its tower for sound is left out"):
        loaded = package.load(files.text, mmproj=tower, dtype="float32", device="cpu")
    assert loaded.config.audio_config is None
    same(loaded.state_dict(), package.load(mmproj=files.tower, model=files.text, device="cpu").state_dict())


@pytest.mark.parametrize(("width", "kind"), [(64, "vision"), (1536, None), (2560, None)])
def test_small_models_of_gemma_4_read_images_causally(tmp_path: Path, width: int, kind: str | None) -> None:
    files = made(tmp_path, "gemma4")
    more = {"mm.input_projection.weight": torch.zeros(width, 64)}
    tower = mmproj_files.changed(files.tower, tmp_path / "mmproj.gguf", {}, more)
    read = {**locate(files.text).config, "hidden_size": width}
    config = towers.to_config(read, towers.opened(tower, "gemma4_text"), GgufFile(files.text))
    assert config["text_config"]["use_bidirectional_attention"] == kind


def test_newer_llava_files_are_refused_by_name(tmp_path: Path) -> None:
    files = made(tmp_path, "llava")
    cases: tuple[tuple[dict[str, Any], dict[str, Any], str], ...] = (
        ({"clip.vision.mm_patch_merge_type": "spatial_unpad"}, {}, "clip.vision.mm_patch_merge_type: it cuts images"),
        ({"clip.vision.image_grid_pinpoints": np.array([336, 672], np.int32)}, {}, "image_grid_pinpoints: it cuts"),
        ({}, {"model.image_newline": torch.zeros(64)}, "has model.image_newline: it cuts images into tiles"),
    )
    for keys, tensors, words in cases:
        tower = mmproj_files.changed(files.tower, tmp_path / "mmproj.gguf", keys, tensors)
        with pytest.raises(FormatError, match=words):
            package.load(files.text, mmproj=tower, device="cpu")
    tower = mmproj_files.changed(files.tower, tower, {"clip.vision.mm_patch_merge_type": "flat"})
    package.load(files.text, mmproj=tower, device="cpu")


def test_settings_for_other_images_are_refused(tmp_path: Path, gemma: Files) -> None:
    shutil.copy(gemma.tower, tmp_path / "mmproj.gguf")
    tower = towers.opened(tmp_path / "mmproj.gguf", "gemma3_text")
    said = tmp_path / "processor_config.json"
    said.write_text('{"processor_class": "Gemma3Processor"}', encoding="utf-8")  # none for images
    assert processor.images(tower).size == processor.images(towers.opened(gemma.tower, "gemma3_text")).size
    transformers.Idefics3ImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"settings of a Idefics3ImageProcessor.*need Gemma3ImageProcessor"):
        processor.images(tower)
    (tmp_path / "preprocessor_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(FormatError, match=r"no usable preprocessor_config\.json: it has no settings for images"):
        processor.images(tower)


def _stored(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


_COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
    "torch.save": _stored,
}


@pytest.mark.parametrize(("kind", "text"), [*((kind, "f32") for kind in mmproj_files.KINDS), ("qwen3_vl_moe", "q8_0")])
def test_a_model_with_a_tower_is_copied(kind: str, text: str, tmp_path: Path) -> None:
    files = made(tmp_path, kind, text=text)
    loaded = package.load(files.text, mmproj=files.tower, dtype="float32", device="cpu")
    copies = {name: copied(loaded) for name, copied in _COPIES.items()}
    given = mmproj_files.inputs(kind, loaded)
    with torch.inference_mode():
        wanted = loaded(**given).logits
        loaded.generate(given["input_ids"][:, 20:], max_new_tokens=2, do_sample=False)
        copies["after generation"] = copy.deepcopy(loaded)  # transformers' own models are not pickled after a forward
        for name, again in copies.items():
            assert repr(again) == repr(loaded), name
            assert torch.equal(again(**given).logits, wanted), name


def test_a_tower_that_is_left_out_is_said(gemma: Files, tmp_path: Path) -> None:
    folder = gemma.text.parent
    wanted = f"left out: {gemma.tower.name} of {folder}, which is a vision or audio tower"
    assert wanted in package.preview(folder, plan="q8_0").notes
    assert wanted in package.quantize(folder, tmp_path / "q.gguf", plan="q8_0", device="cpu", progress=False).notes
    assert wanted in package.convert(folder, tmp_path / "plain", to="dense").notes
    copied: dict[str, Any] = {"to": "gguf", "set": {"general.name": "x"}}
    assert wanted in package.convert(folder, tmp_path / "copy.gguf", **copied).notes
    assert wanted in convert.preview(folder, **copied).notes
    assert wanted not in package.preview(gemma.text, plan="q8_0").notes
    text: dict[str, Any] = {"text": [models.sentences(60)], "length": 32, "device": "cpu", "progress": False}
    unused = f"measured on text, which does not use {gemma.tower.name} of {folder}"
    assert package.evaluate(folder, **text).notes == [unused]
    assert package.evaluate(gemma.text, reference=folder, **text).notes == [unused]
    whole = f"measured on text, which does not use model.vision_tower of {gemma.folder}"
    assert package.evaluate(gemma.folder, **text).notes == [whole]


def test_inspect_says_what_a_tower_is_for(tmp_path: Path, gemma: Files, fewbit: Fewbit) -> None:
    said = "gemma3, of Gemma3ForConditionalGeneration, beside a language model of type gemma3_text"
    for name in (gemma.tower, gemma.text.parent):
        assert package.inspect(name).towers == {"mmproj.gguf": said}
    assert package.inspect(gemma.text).towers == {}
    found = package.inspect(gemma.tower, metadata=True)
    assert found.parameters == sum(entry.spec.nbytes // 4 for entry in GgufFile(gemma.tower).entries.values())
    assert found.metadata["clip.projector_type"] == "gemma3"
    sound = {"clip.has_vision_encoder": False, "clip.has_audio_encoder": True}
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"clip.projector_type": "resampler"}, "'resampler', which fewbit does not read: transformers 5.24 has no"),
        (sound, "has a tower for sound alone, and fewbit reads towers for images only"),
    )
    for keys, words in cases:
        tower = mmproj_files.changed(gemma.tower, tmp_path / "mmproj.gguf", keys)
        done = fewbit("inspect", tower)
        assert (done.code, words in " ".join(done.out.split())) == (0, True), done.out + done.err


def test_folders_that_cannot_be_the_whole_model(tmp_path: Path, gemma: Files) -> None:
    unread, alone = tmp_path / "unread", tmp_path / "alone"
    for folder in (unread, alone):
        folder.mkdir()
    text = Path(shutil.copy(gemma.text, unread / "model.gguf"))
    mmproj_files.changed(gemma.tower, unread / "mmproj.gguf", {"clip.projector_type": "resampler"})
    with pytest.raises(FormatError, match="'resampler', which fewbit does not read") as told:
        package.load(unread, device="cpu")
    assert told.value.hint == f"Name the language model's file, which runs on text: {text}"
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(gemma.tower, alone / name)
    with pytest.raises(FormatError, match=r"has vision or audio towers alone, such as a\.gguf"):
        package.load(alone, device="cpu")


_BAD: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("unknown", {"clip.projector_type": "x"}, {}, "'x', which fewbit does not read\nfewbit reads"),
    ("known", {"clip.projector_type": "ldp"}, {}, "does not read: transformers 5.24 has no MobileVLM\n"),
    (
        "package",
        {"clip.projector_type": "gemma3nv"},
        {},
        "with the package timm, and never without its tower for sound",
    ),
    ("no model", {"clip.projector_type": "step3vl"}, {}, "transformers 5.24 has no Step3-VL\n.* runs on text"),
    (
        "no text",
        {"clip.projector_type": "glm5v"},
        {},
        r"no files of its language model \(glm5-next\)\nfewbit reads [^.]*(\.5[^.]*)?\.$",
    ),
    ("sound", {"clip.has_vision_encoder": False, "clip.has_audio_encoder": True}, {}, "has a tower for sound alone"),
    (
        "both",
        {"clip.has_audio_encoder": True},
        {},
        "for sound beside that for images; with the projector 'gemma3', fewbit reads only",
    ),
    ("none", {"clip.has_vision_encoder": None}, {}, "has no tower for images"),
    ("another model", {"clip.projector_type": "qwen2vl_merger"}, {}, "for language models of type qwen2"),
    ("sizes", {"clip.vision.patch_size": 0}, {}, "patch_size is 0, not an integer above 0"),
    ("sides", {"clip.vision.image_size": 33}, {}, "image_size is 33, which is no multiple of vision.patch_size, 8"),
    ("scale", {"clip.vision.projector.scale_factor": 3}, {}, "scale_factor is 3, which does not divide 4 patches"),
    ("large scale", {"clip.vision.projector.scale_factor": 100}, {}, "is 100, which does not divide 4 patches"),
    ("activation", {"clip.use_gelu": False}, {}, "its activation is quick_gelu"),
    ("epsilon", {"clip.vision.attention.layer_norm_epsilon": "x"}, {}, "not a finite number"),
    ("missing", {}, {"v.blk.1.ln1.bias": None}, r"the tensor v\.blk\.1\.ln1\.bias is missing"),
    ("blocks", {"clip.vision.block_count": 20000}, {}, r"block_count is 20000, and it has tensors of 4 blocks"),
    ("fewer", {"clip.vision.block_count": 3}, {}, r"block_count is 3, and it has tensors of 4 blocks"),
    ("added", {}, {"v.blk.3.ls1.weight": torch.zeros(48)}, r"the tensor v\.blk\.3\.ls1.* has no place in a Gemma3For"),
    ("positions", {"clip.vision.image_size": 40}, {}, "are for 25 positions, and v.position_embd.weight has 16"),
    ("huge", {"clip.vision.image_size": 1 << 30}, {}, "image_size is 134217728 patches; at most 1024 are read"),
    ("shape", {}, {"v.post_ln.bias": torch.zeros(47)}, r"v\.post_ln\.bias has shape \[47\], the model expects \[48\]"),
    (
        "width",
        {},
        {"mm.input_projection.weight": torch.zeros(48, 32)},
        "makes vectors of width 32, and .* has width 64",
    ),
    ("mean", {"clip.vision.image_mean": None}, {}, "image_mean is None, not 3 numbers"),
]


@pytest.mark.parametrize(("keys", "tensors", "words"), [case[1:] for case in _BAD], ids=[case[0] for case in _BAD])
def test_files_that_do_not_fit_are_refused(
    keys: dict[str, Any], tensors: dict[str, Any], words: str, tmp_path: Path, gemma: Files, picture: Path
) -> None:
    tower = mmproj_files.changed(gemma.tower, tmp_path / "mmproj.gguf", keys, tensors)
    with pytest.raises(FormatError, match=words):
        package.generate(gemma.text, PROMPT, images=picture, mmproj=tower, device="cpu", max_new_tokens=1)


def test_wrong_files_in_the_wrong_places_are_named(tmp_path: Path, gemma: Files, picture: Path, fewbit: Fewbit) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gemma.tower.read_bytes()[:-1000])
    llama = models.save(tmp_path / "llama", "llama")
    cases = (
        (gemma.text, gemma.text, 3, "is no vision tower (mmproj): its architecture is 'gemma3'"),
        (gemma.tower, gemma.text, 3, "is the vision or audio tower of a model (mmproj), not a model"),
        (gemma.text, cut, 3, "would end at byte"),
        (gemma.text, tmp_path / "none.gguf", 2, "no such"),
        (gemma.text, tmp_path, 2, "expected a file, and this is a folder"),
        (llama, gemma.tower, 2, "is no GGUF file"),
    )
    for model, tower, code, words in cases:
        done = fewbit("generate", model, PROMPT, "--image", picture, "--mmproj", tower)
        assert (done.code, words in done.err) == (code, True), done.err


def test_images_without_the_file_of_the_tower_are_refused(
    tmp_path: Path, gemma: Files, picture: Path, fewbit: Fewbit
) -> None:
    done = fewbit("generate", gemma.text, PROMPT, "--image", picture)
    assert done.code == 2
    assert "is a GGUF file, which holds no vision tower" in done.err
    assert "Give the file of the tower as --mmproj, or leave out --image" in done.err
    folder = shutil.copytree(gemma.text.parent, tmp_path / "three")
    shutil.copy(gemma.tower, folder / "mmproj-2.gguf")
    with pytest.raises(FormatError, match=r"has several vision towers \(mmproj-2\.gguf, mmproj\.gguf\)"):
        package.load(folder)


@pytest.mark.parametrize(
    "kind",
    [
        *("gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "pixtral", "llava", "idefics3", "internvl"),
        *(
            "gemma4",
            "gemma4_unified",
            "llama4",
            "lfm2_vl",
            "lighton_ocr",
            "exaone4_5",
            "glm4v_moe",
            "glm4v",
            "glm_ocr",
            "minicpmv4_6",
            "kimi_k25",
            "granite4_vision",
        ),
    ],
)
def test_any_value_of_a_key_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    files = made(tmp_path, kind)
    source = locate(files.text)
    tower, text, vocabulary = (
        towers.opened(files.tower, source.config["model_type"]),
        source.config,
        GgufFile(files.text),
    )
    sections = f"{vocabulary.metadata['general.architecture']}.rope.dimension_sections"
    refused = 0
    for metadata, keys in ((tower.file.metadata, list(tower.file.metadata)), (vocabulary.metadata, [sections])):
        for key in [*keys, "clip.vision.feature_layer", "clip.vision.spatial_merge_size", "granite.deepstack_mapping"]:
            before = metadata.get(key)
            for value in (None, "x", True, 0, -1, 1.5, float("nan"), np.array([1, 2], np.int32), ["a", "b"], 1 << 20):
                metadata[key] = value
                try:
                    towers.to_config(text, tower, vocabulary)
                    with suppress(ImportError):  # torchvision is missing: the values are read before
                        processor.images(tower)
                except FormatError:
                    refused += 1
            metadata[key] = before
    assert refused > 40


@pytest.mark.parametrize(
    ("text", "tower", "differs"),
    [
        ("glm_ocr", "glm4v", r"blk\.0\.attn_q\.weight has shape \[128, 64\], the model expects \[64, 64\]"),
        ("glm4v", "glm_ocr", r"the tensor blk\.0\.attn_q\.bias has no place in a GlmOcrForConditionalGeneration"),
    ],
)
def test_a_tower_of_the_same_width_of_another_model(text: str, tower: str, differs: str, tmp_path: Path) -> None:
    """The projector, the type of the language model and the width are the same: only its tensors tell."""
    ours = mmproj_files.text_file(mmproj_files.save(tmp_path / text, text), tmp_path / "text.gguf", text)
    theirs = mmproj_files.tower_file(mmproj_files.save(tmp_path / tower, tower), tmp_path / "mmproj.gguf", tower)
    with pytest.raises(
        FormatError, match=rf"text\.gguf: {differs}\. .*because of its tower, .*/mmproj\.gguf"
    ) as raised:
        package.load(ours, mmproj=theirs)
    assert raised.value.hint == "Give the mmproj file that was made of the same model."
