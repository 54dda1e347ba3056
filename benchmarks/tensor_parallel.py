"""How fast several GPUs generate one text: a model over them by `device_map`, and each with its part of every linear.

    torchrun --nproc-per-node 2 -m benchmarks.tensor_parallel [--layers 80] [--tokens 64] [--rounds 3]

The model is a Llama of 70B's shape (or of --width, --inner and --layers) with random weights in int4-g128, made on the
GPUs one layer at a time. Rows: as `from_pretrained(..., device_map="auto")` places it, as it is and fused; then
`load(..., tensor_parallel=True)`, as it is and fused. Each gives tokens a second after the first token, the median and
the range of the rounds, and the most memory of the first GPU. Logits are compared with those of the first row.
Without GPUs, processes on the CPU do the same: give a small shape then.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fewbit.models import parallel
from fewbit.models.decoding import decode
from fewbit.models.decoding import fuse as fusing
from fewbit.nn.layers import QLinear
from fewbit.schemes.base import QTensor, parse
from fewbit.system import ranks

SCHEME = parse("int4-g128-sym")
HEAD = 128  # dimensions of an attention head
Own = Callable[[str, QLinear, QTensor], QTensor]


def random_weight(n: int, k: int, seed: int, device: str) -> QTensor:
    """Random codes, with scales that keep the size of activations."""
    generator = torch.Generator(device).manual_seed(seed)
    specs = SCHEME.part_specs((n, k))
    codes = torch.randint(0, 256, specs["codes"].shape, generator=generator, device=device, dtype=torch.uint8)
    scale = torch.full(specs["scale"].shape, 0.22 / k**0.5, device=device, dtype=specs["scale"].dtype)
    return QTensor(SCHEME, (n, k), {"codes": codes, "scale": scale})


def build(args: argparse.Namespace) -> Any:
    """The model on the meta device."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=args.width,
        intermediate_size=args.inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // HEAD,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.generation_config.eos_token_id = None  # all texts are equally long
    return model.eval().requires_grad_(False)


def fill(model: Any, device_of: Callable[[str], str], own: Own) -> None:
    """Give the model its weights. device_of: the device of a module. own: the part of a weight that this rank keeps."""
    for seed, (name, module) in enumerate(list(model.named_modules())):
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed = QLinear(module.in_features, module.out_features, None, name)
            whole = random_weight(module.out_features, module.in_features, seed, device_of(name))
            packed.adopt(own(name, packed, whole), torch.bfloat16)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, packed)
            continue
        for leaf, value in list(module.named_parameters(recurse=False)):
            generator = torch.Generator(device_of(name)).manual_seed(seed)
            made = torch.ones(value.shape, dtype=value.dtype, device=device_of(name))
            if value.dim() > 1:
                made.normal_(0, 0.02, generator=generator)
            module.register_parameter(leaf, nn.Parameter(made, requires_grad=False))


def by_device_map(args: argparse.Namespace, gpus: int) -> Any:
    """The model over all GPUs, an equal number of blocks on each."""
    from accelerate import dispatch_model

    model = build(args)
    if not gpus:
        fill(model, lambda name: "cpu", lambda name, layer, weight: weight)
        return model
    places: dict[str, int] = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": gpus - 1}
    places |= {"lm_head": gpus - 1} | {f"model.layers.{i}": i * gpus // args.layers for i in range(args.layers)}
    on = {f"{name}.": place for name, place in places.items()}
    fill(
        model,
        lambda name: f"cuda:{next(place for start, place in on.items() if f'{name}.'.startswith(start))}",
        lambda name, layer, weight: weight,
    )
    return dispatch_model(model, places, main_device=0, skip_keys=model._skip_keys_device_placement)


def in_parts(args: argparse.Namespace, device: str) -> Any:
    """This rank's part of the model."""
    model, split = build(args), parallel.Split(ranks.rank(), ranks.size(), device)
    split.read_plan(model)
    fill(model, lambda name: device, split.own)
    split.finish(model)
    return model


def logits_of(model: Any) -> Tensor:
    ids = torch.arange(16, device=model.device)[None]
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids, use_cache=False).logits.float().cpu()
    return found


def rates(model: Any, args: argparse.Namespace) -> list[float]:
    """Tokens a second after the first token, of each round."""
    ids = torch.arange(5, 5 + args.prompt, device=model.device)[None]

    def seconds(new: int) -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
            out.cpu()
        return time.perf_counter() - begin

    seconds(8)
    return [args.tokens / (seconds(args.tokens + 1) - seconds(1)) for _ in range(args.rounds)]


def measured(model: Any, args: argparse.Namespace, label: str, rows: dict[str, Any]) -> None:
    """Add the rows of a model as it is, and fused."""
    for name in (label, f"{label}, fused"):
        if name != label:
            fusing.fuse(model)
            decode.within(model, args.prompt + args.tokens + 8)
        logits, found = logits_of(model), rates(model, args)
        peak = torch.cuda.max_memory_allocated(0) / 1e9 if torch.cuda.is_available() else 0.0
        rows[name] = (found, peak, logits)
        if ranks.first():
            print(f"{name}: {statistics.median(found):.1f} tokens/s", file=sys.stderr, flush=True)


def sum_time(args: argparse.Namespace, device: str) -> float:
    """Microseconds of one sum over all ranks of the activations of a token, 100 in a row."""
    x = torch.zeros(1, 1, args.width, dtype=torch.bfloat16, device=device)
    for count in (20, 100):
        begin = time.perf_counter()
        for _ in range(count):
            dist.all_reduce(x)
        x.cpu()
        spent = (time.perf_counter() - begin) / count * 1e6
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 8192), ("inner", 28672), ("layers", 80), ("vocabulary", 128256), ("kv-heads", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("prompt", 16), ("tokens", 64), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", choices=("map", "parallel"), help="Measure one of the two.")
    args = parser.parse_args()
    device, rows = ranks.connected(None), dict[str, Any]()
    if args.only != "parallel":
        gpus = ranks.size() if torch.cuda.is_available() else 0
        if ranks.first():
            measured(by_device_map(args, gpus), args, "device_map", rows)
        gc.collect()
        if gpus:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    ranks.all_gather(None)  # through gloo: NCCL would keep the waiting GPU busy
    if args.only != "map":
        measured(in_parts(args, device), args, "tensor parallel", rows)
    if ranks.first():
        base = next(iter(rows.values()))
        print(
            f"| {ranks.size()} processes on {device.partition(':')[0]}, {args.layers} layers of {args.width} ", end=""
        )
        print("| tokens/s | range | times the first | GPU 0, GB | logits differ by |\n|---|---|---|---|---|---|")
        for name, (found, peak, logits) in rows.items():
            middle, ratio = statistics.median(found), statistics.median(found) / statistics.median(base[0])
            far = float((logits - base[2]).norm() / base[2].norm())
            print(
                f"| {name} | {middle:.1f} | {min(found):.1f}-{max(found):.1f} | {ratio:.2f} | {peak:.1f} | {far:.1e} |"
            )
        best = {
            kind: max(statistics.median(r[0]) for n, r in rows.items() if n.startswith(kind))
            for kind in ("device_map", "tensor parallel")
            if any(n.startswith(kind) for n in rows)
        }
        if len(best) == 2:
            print(f"\nthe best of each: {best['tensor parallel'] / best['device_map']:.2f} times as fast in parts")
    if args.only != "map":
        spent = sum_time(args, device)
        if ranks.first():
            print(f"one sum over the processes takes {spent:.0f} us")
    sys.stdout.flush()
    ranks.all_gather(None)
    os._exit(0)  # NCCL would wait for the CUDA graphs that have its calls


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
