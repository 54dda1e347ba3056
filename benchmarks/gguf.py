"""What fewbit's encoders lose at a file type of llama.cpp's, beside llama.cpp's own, in one run.

    make interop                     # builds llama-cpp-python, the peer
    python -m benchmarks.gguf [--model tiny] [--types q4_k_m q3_k_m q2_k] [--length 512] [--windows 32] [--samples 64]

All arms calibrate on the same windows of text. llama.cpp's quantizer gets the importance matrix that `fewbit imatrix`
writes from them; `imatrix` is fewbit's own encoder with that same file, `imatrix, tokens weighed` with the statistics
that it gathers itself, and `gptq` uses whole Hessians, which say more of the text than a matrix's diagonal can. `high`
is `gptq` with --effort high, which also trains on text that the original writes. Every file is run by llama.cpp on
held-out windows: perplexity, and KL divergence from the unquantized model there. Tensor data must be equal in size to
the byte. `--ours` adds the same numbers from fewbit's own runtime. `--made FOLDER` has files TYPE-ARM.gguf that were
made before, for example on a GPU; their seconds are then those of a copy.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fewbit
from fewbit.api import quantize as api
from fewbit.formats.containers import imatrix
from fewbit.formats.containers.gguf import GgufFile
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import locate
from fewbit.plans.mixtures import MIXTURES
from fewbit.plans.plan import find
from fewbit.texts import sources
from fewbit.texts import windows as texts_windows
from fewbit.texts.calibration import Calibration
from tests.interop import llama_cpp as peer
from tests.interop import original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--types", nargs="+", default=["q4_k_m", "q3_k_m", "q2_k"])
    parser.add_argument("--arms", nargs="+", default=["llama.cpp", "imatrix", "imatrix, tokens weighed", "gptq"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--made", type=Path, default=Path("nothing"))
    parser.add_argument("--ours", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if reason := peer.missing():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(run(args, Path(scratch)))
    if args.json:
        print(json.dumps(rows, indent=1))


def run(args: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """A row for each type and arm, printed as it comes."""
    windows = held_out(args.model, args.length, args.windows)
    whole, matrix = scratch / "original.gguf", scratch / "imatrix.gguf"
    original.write(args.model, whole)
    text = Calibration(samples=args.samples, length=args.length)
    api.imatrix(args.model, matrix, calibration=text)
    reference = scratch / "logits.npy"
    with peer.loaded(whole, args.length) as model:
        # In a file: 32 windows of a vocabulary of 49,152 are 3 GB.
        kept = np.lib.format.open_memmap(
            reference, "w+", np.float16 if args.length * args.windows * model.vocabulary > 1 << 28 else np.float32,
            (len(windows), args.length, model.vocabulary),
        )  # fmt: skip
        for i, window in enumerate(windows):
            kept[i] = model.logits(window)
        perplexity, _ = peer.perplexity_and_kl(model, windows)
    print(f"{args.model}: perplexity {perplexity:.4f}, {len(windows)} windows of {args.length}", flush=True)
    for kind in args.types:
        base = None
        for arm in args.arms:
            out = scratch / f"{kind}-{arm.replace(' ', '')}.gguf"
            start = time.perf_counter()
            if (made := args.made / f"{kind}-{arm}.gguf").is_file():
                shutil.copy(made, out)
            else:
                quantize(arm, kind, args.model, out, whole, matrix, text)
            seconds = time.perf_counter() - start
            with peer.loaded(out, args.length) as model:
                perplexity, kl = peer.perplexity_and_kl(model, windows, list(kept))
            base = base or kl
            row = {"type": kind, "arm": arm, "kl": kl, "of_first": kl / base, "perplexity": perplexity}
            row |= {"bytes": GgufFile(out).nbytes, "seconds": seconds}
            if args.ours:
                done = fewbit.evaluate(out, reference=args.model, length=args.length, samples=args.windows)
                assert done.quality.kl is not None
                row |= {"kl_here": done.quality.kl.mean.value, "perplexity_here": done.quality.perplexity.value}
            print(" ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
            out.unlink()
            yield row


def quantize(arm: str, kind: str, model: str, out: Path, whole: Path, matrix: Path, text: Calibration) -> None:
    """The file `out` of that type, as the arm makes it."""
    if arm == "llama.cpp":
        importance = {name: each.mean_square.numpy() for name, each in imatrix.read(matrix).items()}
        peer.quantize(whole, out, MIXTURES[kind].file_type, importance)
    elif arm == "imatrix":
        fewbit.quantize(model, out, plan=kind, imatrix=matrix)
    elif arm == "imatrix, tokens weighed":
        fewbit.quantize(model, out, plan=kind, calibration=text)
    elif arm == "high":
        fewbit.quantize(model, out, plan=find(kind).changed(method="gptq"), calibration=text, effort="high")
    else:
        fewbit.quantize(model, out, plan=find(kind).changed(method=arm), calibration=text)


def held_out(model: str, length: int, count: int) -> list[list[int]]:
    """Windows of the text that suits the model and was not calibrated on."""
    source = locate(model)
    text = sources.load_text(sources.own_source(source.config), "evaluation")
    tokens = texts_windows.encode(text, load_tokenizer(source))
    found: list[list[int]] = texts_windows.windows(tokens, length, count).tolist()
    return found


if __name__ == "__main__":
    main()
