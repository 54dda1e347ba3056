"""Where the time and memory of quantizing a Llama-3-8B-shaped random model on a GPU go: seconds of each stage.

python benchmarks/quantize_gpu.py [--layers 3] [--samples 128] [--length 2048] [--plans gptq-4bit awq-4bit nf4 q4_k_m]
    [--tokens-at-once 2048]

The model has 8B's widths and vocabulary and so many of its 32 blocks; weights are random (normal, std 0.02), tokens
too. The GPU is waited for at each border of a stage, so that its time is charged to the stage that asked for it: the
sum is an upper bound of the time without these waits. What the whole model would take is a block in the middle times 32
and what comes before and after the blocks. With `--layers 32 --untimed` it is what it takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fewbit.formats.awq import AWQFormat
from fewbit.formats.containers.safetensors import Checkpoint
from fewbit.formats.gptq import GPTQFormat
from fewbit.methods import gptq
from fewbit.models.gguf import names, positions
from fewbit.models.gguf.header import Header
from fewbit.models.skeleton import BlockCall, Skeleton
from fewbit.models.source import locate
from fewbit.pipeline import blocks as pipeline_blocks
from fewbit.pipeline import progress as pipeline_progress
from fewbit.pipeline import run as pipeline_run
from fewbit.pipeline import write_folder, write_gguf
from fewbit.pipeline.capture import Inputs, tokens_at_once
from fewbit.pipeline.job import Job
from fewbit.plans import plan as plans
from fewbit.schemes.affine import Affine
from fewbit.schemes.base import QTensor
from fewbit.schemes.ggml.scheme import GGML
from fewbit.schemes.nf4 import FourBit
from fewbit.stats import Need, Stats

WHOLE = 32  # blocks of the model whose widths these are
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


class Clock:
    """Seconds by stage, those of a stage within another not counted twice; `lap` gives them and starts anew."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.stack = ["all else"]
        self.last = self._now()

    def _now(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    def _charge(self) -> None:
        now = self._now()
        self.spent[self.stack[-1]] += now - self.last
        self.last = now

    def lap(self) -> dict[str, float]:
        self._charge()
        found, self.spent = self.spent, defaultdict(float)
        return found

    def watch(self, owner: Any, name: str, label: str) -> None:
        inner: Callable[..., Any] | None = getattr(owner, name, None)
        if inner is None:
            return

        @wraps(inner)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return inner(*args, **kwargs)
            self._charge()
            self.stack.append(label)
            try:
                return inner(*args, **kwargs)
            finally:
                self._charge()
                self.stack.pop()

        setattr(owner, name, wrapper)


class Watch(threading.Thread):
    """The most memory of the device in use, as its driver counts, looked at every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.stop = 0, threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.02):
            free, total = torch.cuda.mem_get_info()
            self.most = max(self.most, total - free)


def make(folder: Path, layers: int) -> None:
    """Write the random model, a shard for each block."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}), encoding="utf-8")
    hidden, middle, words = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    kv = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    generator = torch.Generator("cuda").manual_seed(0)
    where: dict[str, str] = {}

    def save(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {}
        for key, shape in shapes.items():
            made = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
            tensors[key] = made.fill_(1) if len(shape) == 1 else made.normal_(0, 0.02, generator=generator)
            where[key] = name
        save_file({key: tensor.cpu() for key, tensor in tensors.items()}, folder / name, metadata={"format": "pt"})

    save(
        "outside.safetensors",
        {
            "model.embed_tokens.weight": (words, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (words, hidden),
        },
    )
    for layer in range(layers):
        p = f"model.layers.{layer}."
        shapes: dict[str, tuple[int, ...]] = {f"{p}input_layernorm.weight": (hidden,)}
        shapes |= {f"{p}post_attention_layernorm.weight": (hidden,)}
        rows = {"q": hidden, "k": kv, "v": kv, "o": hidden}
        shapes |= {f"{p}self_attn.{x}_proj.weight": (n, hidden) for x, n in rows.items()}
        shapes |= {f"{p}mlp.{x}_proj.weight": (middle, hidden) for x in ("gate", "up")}
        save(f"block-{layer:02}.safetensors", shapes | {f"{p}mlp.down_proj.weight": (hidden, middle)})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def watch(clock: Clock) -> None:
    clock.watch(Skeleton, "_load", "reading weights")
    clock.watch(Skeleton, "capture", "capture")
    clock.watch(BlockCall, "run", "forward and replay")
    clock.watch(Stats, "add", "statistics")
    clock.watch(pipeline_blocks, "rewrite", "rewriting (AWQ's search)")
    clock.watch(gptq, "moved", "targets")
    clock.watch(gptq, "inverse_factor", "Cholesky and inverse")
    clock.watch(gptq, "feed_back", "column loop")
    clock.watch(gptq, "descend", "refinement: descent")
    clock.watch(Affine, "refit", "refinement: scales")
    clock.watch(Affine, "fit", "scale search")
    for scheme in (Affine, FourBit, GGML):
        clock.watch(scheme, "pack", "packing")
    for scheme in (FourBit, GGML):
        clock.watch(scheme, "fit", "encoding")
        clock.watch(scheme, "nearest", "encoding")
    clock.watch(QTensor, "dequantize", "dequantizing")
    clock.watch(GPTQFormat, "lay_out", "laying out")
    clock.watch(AWQFormat, "lay_out", "laying out")
    clock.watch(pipeline_blocks, "_lost", "error measurement")
    clock.watch(pipeline_run.Run, "save", "saving the block")


def plan_of(name: str) -> plans.Plan:
    """A preset; one of a GGUF mixture followed by `-rtn` needs no calibration."""
    if name.endswith("-rtn"):
        mixture = name.removesuffix("-rtn")
        return plans.Plan(name, "gguf", (plans.Rule("*", f"mixture:{mixture}", "rtn"),))
    return plans.find(name)


def measure(folder: Path, name: str, args: argparse.Namespace, clock: Clock | None) -> dict[str, Any]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    device = Watch()
    device.start()
    start = time.perf_counter()
    job = Job.prepare(locate(folder), plan_of(name), "cuda")
    tokens = torch.randint(
        0, CONFIG["vocab_size"], (args.samples, args.length), generator=torch.Generator().manual_seed(0)
    )
    at_once = args.tokens_at_once or tokens_at_once(job.settled.skeleton, job.settled.resolved.assignments.values())
    inputs = Inputs(tokens if job.settled.need > Need.NOTHING else None, tokens_at_once=at_once)
    run = pipeline_run.Run(f"benchmark-{name}", str(folder), f"blocks quantized by {name}")
    laps: list[dict[str, float]] = []
    ends = [time.perf_counter()]
    if clock:
        clock.lap()

    def progress(step: pipeline_progress.Step) -> None:
        if clock:
            laps.append(clock.lap())
        ends.append(time.perf_counter())

    out = Path(tempfile.mkdtemp()) / "out"
    with run:
        for old in run.files():
            old.unlink()
        reports = pipeline_blocks.quantize_blocks(job.settled, inputs, run, progress)
        quantized = time.perf_counter()
        if job.single_file:
            config = job.settled.skeleton.config
            header = Header({"general.architecture": "llama"}, names.routes(config), positions.extra_tensors(config))
            write_gguf.write(out, job.settled, Checkpoint(run.files()), header, {})
        else:
            out.mkdir()
            write_folder.write(out, job.settled, Checkpoint(run.files()))
        written = time.perf_counter()
    run.forget()
    shutil.rmtree(out.parent)
    device.stop.set()
    device.join()
    return {
        "plan": name,
        "prepare": ends[0] - start,
        "blocks": [b - a for a, b in pairwise(ends)],
        "laps": laps,
        "quantize": quantized - ends[0],
        "write": written - quantized,
        "total": written - start,
        "allocator": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "device": device.most,
        "error": sum(r.error for r in reports) / len(reports),
        "notes": sorted({note for r in reports for note in r.notes}),
    }


def show(found: dict[str, Any], layers: int) -> None:
    gb = 2**30
    blocks = found["blocks"][:layers]
    print(f"\n## {found['plan']}: {layers} blocks, mean error {found['error']:.6f}, notes {found['notes']}")
    print(
        "seconds of each block",
        " ".join(f"{b:.2f}" for b in blocks),
        "| outside",
        [round(b, 2) for b in found["blocks"][layers:]],
    )
    middle = found["laps"][max(0, layers - 2)] if found["laps"] else {}
    for label, seconds in sorted(middle.items(), key=lambda item: -item[1]):
        if seconds > 0.0005:
            print(f"  {label:26} {seconds * 1000:9.1f} ms")
    print(
        f"prepare {found['prepare']:.2f} s, blocks {found['quantize']:.2f} s, writing {found['write']:.2f} s, in all "
        f"{found['total']:.2f} s; peak {found['allocator'] / gb:.2f} GiB allocated, {found['reserved'] / gb:.2f} "
        f"reserved, {found['device'] / gb:.2f} of the device"
    )
    block = blocks[max(0, layers - 2)]
    print(f"a block in the middle {block:.3f} s, times {WHOLE}: {block * WHOLE:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--plans", nargs="+", default=["gptq-4bit", "awq-4bit", "nf4", "q4_k_m-rtn"])
    parser.add_argument("--tokens-at-once", type=int, help="tokens of a batch; default: as `fewbit quantize` chooses")
    parser.add_argument("--untimed", action="store_true", help="no waits at the borders of stages")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import triton

    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, vars(args))
    scratch = Path(tempfile.mkdtemp())
    start = time.perf_counter()
    make(scratch / "model", args.layers)
    print(f"model made and written in {time.perf_counter() - start:.1f} s", flush=True)
    clock = None if args.untimed else Clock()
    if clock:
        watch(clock)
    found = []
    for name in args.plans:
        found.append(measure(scratch / "model", name, args, clock))
        show(found[-1], args.layers)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
