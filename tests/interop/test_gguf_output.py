"""Files that fewbit writes: llama.cpp loads them, computes the same, and would have given each tensor the same type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fewbit.api import convert, evaluate, generate, quantize
from fewbit.formats.containers import imatrix
from fewbit.formats.containers.gguf import GgufFile
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import locate
from fewbit.plans.mixtures import MIXTURES
from fewbit.plans.plan import Plan, Rule, find
from fewbit.schemes.ggml.few import Few
from fewbit.texts.calibration import Calibration
from tests import gguf_files
from tests.interop import llama_cpp as peer
from tests.interop import original as in_full

pytestmark = [pytest.mark.interop, pytest.mark.skipif(bool(peer.missing()), reason=peer.missing() or "")]

FEW = Calibration(samples=4, length=128)
# Types with convolutions, states or routers
SMALL = ("mamba", "mamba2", "granitemoehybrid", "granitemoehybrid-dense", "lfm2_moe", "qwen3_moe")
TEXT = "Once upon a time, there was a little dog who lived in a big red house. Every day he ran to the"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny in 32 bits."""
    path = tmp_path_factory.mktemp("original") / "tiny.gguf"
    in_full.write("tiny", path)
    return path


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("matrix") / "imatrix.gguf"
    quantize.imatrix("tiny", path, calibration=FEW)
    return path


@pytest.mark.parametrize("limit", ["3MB", "500kB"])
def test_parts_of_a_file_run_in_llama_cpp(limit: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    quantize.quantize("tiny", whole, plan=find("q8_0").changed(method="rtn"))
    done = convert.convert(whole, tmp_path / "m.gguf", to="gguf", max_shard=limit)
    assert len(list(tmp_path.glob("m-*-of-*.gguf"))) > 2
    found = []
    for path in (whole, Path(done.out)):
        with peer.loaded(path) as model:
            found.append(model.logits(model.tokenize(TEXT)))
    assert np.array_equal(found[0], found[1])


@pytest.mark.parametrize("name", MIXTURES)
def test_a_file_of_every_plan_runs_in_llama_cpp(name: str, whole: Path, matrix: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    quantize.quantize("tiny", ours, plan=name, imatrix=matrix)
    importance = {name: each.mean_square.numpy() for name, each in imatrix.read(matrix).items()}
    peer.quantize(whole, theirs, MIXTURES[name].file_type, importance)
    mine, other = GgufFile(ours), GgufFile(theirs)
    assert list(mine.entries.values()) == list(other.entries.values())
    for key in ("general.file_type", "general.quantization_version"):
        assert mine.metadata[key] == other.metadata[key]
    ids = load_tokenizer(locate("tiny"))(TEXT)["input_ids"]
    loaded = generate.load(ours, dtype=torch.float32)
    with torch.inference_mode():
        here = loaded(input_ids=torch.tensor([ids])).logits[0].numpy()
    with peer.loaded(whole) as original, peer.loaded(ours) as model, peer.loaded(theirs) as foreign:
        assert model.tokenize(TEXT) == ids
        there, exact = model.logits(ids), original.logits(ids)
        # llama.cpp rounds activations to 8 bits, which moves its logits by some hundredths.
        assert np.linalg.norm(here - there) < 0.05 * np.linalg.norm(here)
        assert model.greedy(ids, 4)
        # The two quantizers differ. Ours is nearer to the original, or as near: 0.52 to 1.06 of their distance.
        assert np.linalg.norm(there - exact) < 1.1 * np.linalg.norm(foreign.logits(ids) - exact)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_other_methods_make_files_that_run(method: str, whole: Path, tmp_path: Path) -> None:
    out, theirs = tmp_path / "out.gguf", tmp_path / "theirs.gguf"
    quantize.quantize("tiny", out, plan=find("q4_0").changed(method=method), calibration=FEW)
    weighed = {"of no tensor": np.ones(1, np.float32)} if method == "gptq" else None
    peer.quantize(whole, theirs, MIXTURES["q4_0"].file_type, weighed)
    assert list(GgufFile(out).entries.values()) == list(GgufFile(theirs).entries.values())
    with peer.loaded(out) as model:
        ids = model.tokenize(TEXT)
        assert np.isfinite(model.logits(ids)).all()


@pytest.mark.parametrize("name", Few.examples)
def test_types_of_few_levels_run_in_llama_cpp(name: str, tmp_path: Path) -> None:
    plan = Plan("few", "gguf", (Rule("model.embed_tokens", "q8_0", "rtn"), Rule("*", name, "rtn")))
    quantize.quantize("tiny", tmp_path / "m.gguf", plan=plan)
    assert {entry.type for entry in GgufFile(tmp_path / "m.gguf").entries.values()} == {name, "q8_0", "f32"}
    ids = load_tokenizer(locate("tiny"))(TEXT)["input_ids"]
    with torch.inference_mode():
        here = generate.load(tmp_path / "m.gguf", dtype=torch.float32)(input_ids=torch.tensor([ids])).logits[0].numpy()
    with peer.loaded(tmp_path / "m.gguf") as model:
        there = model.logits(ids)
    assert np.linalg.norm(here - there) < 0.05 * np.linalg.norm(here)  # it rounds activations to 8 bits


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "mxfp4_moe"])
@pytest.mark.parametrize(
    "kind",
    [
        "qwen3_moe",
        "mamba",
        "mamba2",
        "granitemoehybrid",
        "granitemoehybrid-dense",
        "lfm2_moe",
        "gemma4_text-experts",
    ],
)
def test_small_tensors_keep_the_type_that_they_keep_there(kind: str, name: str, tmp_path: Path) -> None:
    """Convolutions, what sets a state, and what chooses experts."""
    folder, theirs = gguf_files.halved(gguf_files.save(tmp_path / "m", kind)), tmp_path / "theirs.gguf"
    original = gguf_files.written(folder, tmp_path / "whole.gguf")
    quantize.quantize(folder, tmp_path / "ours.gguf", plan=find(name).changed(method="rtn"))
    peer.quantize(original, theirs, MIXTURES[name].file_type)
    ours, wanted = ({n: e.type for n, e in GgufFile(path).entries.items()} for path in (tmp_path / "ours.gguf", theirs))
    assert ours == wanted
    with peer.loaded(tmp_path / "ours.gguf", context=64) as model:
        assert np.isfinite(model.logits(gguf_files.ids(length=14)[0].tolist())).all()


def test_perplexity_is_the_same_in_both(matrix: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    quantize.quantize("tiny", out, plan="q4_k_m", imatrix=matrix)
    here = evaluate.evaluate(out, text="tiny", length=256, samples=6).quality.perplexity.value
    from fewbit.texts import sources
    from fewbit.texts import windows as texts_windows

    text = sources.load_text("tiny", "evaluation")
    windows = texts_windows.windows(texts_windows.encode(text, load_tokenizer(locate("tiny"))), 256, 6).tolist()
    with peer.loaded(out) as model:
        there, _ = peer.perplexity_and_kl(model, windows)
    assert here == pytest.approx(there, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q4_k_m", "q3_k_m", "q2_k", "iq4_xs"])
def test_the_demo_model_falls_back_as_there(name: str, demo: Path, tmp_path: Path) -> None:
    source, theirs = tmp_path / "original.gguf", tmp_path / "theirs.gguf"
    in_full.write(demo, source)
    weighed = {"of no tensor": np.ones(1, np.float32)}
    peer.quantize(source, theirs, MIXTURES[name].file_type, weighed, threads=2)
    shown = quantize.preview(demo, plan=name)
    types = {tensor: what.split(",")[0] for tensor, what, _ in shown.tensors}
    assert types == {entry.name: entry.type for entry in GgufFile(theirs).entries.values()}
