"""What each lever of quality brings, alone and together: ablations of `gptq` with several seeds, in one run.

    python -m benchmarks.effort tiny --bits 4 3 2 --seeds 0 1 2 --samples 64 --at-once 8
    python -m benchmarks.effort smollm2 --calibration wikipedia.txt --text wikitext2-test.txt --length 512

A row is one of `ROWS`: --target, --effort and a later `tune`. Rows of `AUTO_ROUND` need the package auto-round. They
get the same calibration tokens, and the file that it writes as `auto_gptq` is evaluated. Each cell is a process of its
own; --at-once of them run at a time, so seconds are upper bounds. It writes one JSON line for each cell, and prints a
table: the KL divergence of the first seed with its 95 % interval, and the mean over all seeds of the change from
`gptq`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewbit.texts.calibration import Calibration

ROWS: dict[str, tuple[float, str, str]] = {  # name -> (--target, --effort, what `tune` trains afterwards)
    "gptq": (0.0, "fast", ""),
    "target": (0.75, "fast", ""),
    "scales": (0.0, "fast", "scales"),
    "codes": (0.0, "fast", "codes"),
    "high": (0.0, "high", ""),
    "target and high": (0.75, "high", ""),
    "best": (0.0, "best", ""),
    "target and best": (0.75, "best", ""),
}
AUTO_ROUND: dict[str, dict[str, Any]] = {  # name -> arguments of auto_round.AutoRound
    "AutoRound": {"iters": 200},
    "AutoRound 1000": {"iters": 1000},
    "AutoRound 1000, alg_ext": {"iters": 1000, "enable_alg_ext": True},
}


def measured(args: argparse.Namespace, row: str, bits: int, seed: int) -> dict[str, Any]:
    """One cell: the KL divergence with its interval, and the seconds of `quantize` and `tune`."""
    import fewbit
    from fewbit.texts.calibration import Calibration

    calibration = Calibration(args.calibration, samples=args.samples, length=512, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        if row in AUTO_ROUND:
            out = by_auto_round(args, row, bits, calibration, Path(folder))
        else:
            out = by_fewbit(args, row, bits, calibration, Path(folder))
        seconds = time.perf_counter() - start
        done = fewbit.evaluate(
            out, reference=args.model, text=args.text, length=args.length, samples=args.windows, progress=False
        )
    assert done.quality.kl is not None
    kl = done.quality.kl.mean
    cell = {"model": args.model, "bits": bits, "seed": seed, "row": row}
    return cell | {"kl": kl.value, "low": kl.low, "high": kl.high, "s": seconds}


def by_fewbit(args: argparse.Namespace, row: str, bits: int, calibration: Calibration, folder: Path) -> Path:
    """The folder that `quantize`, and `tune` after it, wrote."""
    import fewbit
    from fewbit.pipeline.optimization import Optimization
    from fewbit.plans.plan import find

    target, effort, later = ROWS[row]
    options = {"target": str(target)}
    plan = find("gptq-4bit").changed(scheme=f"int{bits}-g{args.group}-sym", options=options)
    out = folder / "out"
    fewbit.quantize(args.model, out, plan=plan, calibration=calibration, effort=effort, progress=False)
    if not later:
        return out
    wanted, tuned = Optimization(codes=later == "codes"), folder / "tuned"
    text = replace(calibration, text="self", samples=4 * args.samples) if wanted.codes else calibration
    fewbit.tune(out, tuned, reference=args.model, calibration=text, optimization=wanted, progress=False)
    return tuned


def by_auto_round(args: argparse.Namespace, row: str, bits: int, calibration: Calibration, folder: Path) -> Path:
    """The folder that AutoRound wrote, of the same scheme and from the same tokens."""
    from auto_round import AutoRound

    from fewbit.models.skeleton import load_tokenizer
    from fewbit.models.source import locate
    from fewbit.pipeline.job import windows

    source = locate(args.model)
    tokens, _ = windows(calibration, source, load_tokenizer(source))
    given = {"bits": bits, "group_size": args.group, "sym": True, "seed": calibration.seed} | AUTO_ROUND[row]
    dataset = [{"input_ids": each[None], "attention_mask": each[None] * 0 + 1} for each in tokens.long()]
    rounder = AutoRound(str(source.folder), dataset=dataset, nsamples=len(tokens), seqlen=tokens.shape[1], **given)
    rounder.quantize_and_save(str(folder / "out"), format="auto_gptq")
    return max(folder.rglob("config.json")).parent


def cell(args: argparse.Namespace, row: str, bits: int, seed: int) -> dict[str, Any] | None:
    """`measured`, in a process of its own; None if it failed."""
    command = [sys.executable, "-m", "benchmarks.effort", args.model, "--cell", row]
    command += ["--bits", str(bits), "--seeds", str(seed), "--samples", str(args.samples), "--group", str(args.group)]
    command += ["--length", str(args.length), "--windows", str(args.windows)]
    command += ["--calibration", args.calibration] if args.calibration else []
    command += ["--text", args.text] if args.text else []
    run = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if run.returncode:
        print(f"{row}, {bits} bits, seed {seed} failed: {run.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    line = run.stdout.strip().splitlines()[-1]
    print(line, flush=True)
    found: dict[str, Any] = json.loads(line)
    return found


def table(cells: list[dict[str, Any]], rows: list[str], bits: list[int], seeds: list[int]) -> str:
    """A Markdown table of the cells."""
    by = {(each["row"], each["bits"], each["seed"]): each for each in cells}
    lines = ["| | " + " | ".join(f"{b} bits | change | s" for b in bits) + " |", "|---" * (1 + 3 * len(bits)) + "|"]
    for row in rows:
        words = [row]
        for b in bits:
            own = [by[row, b, seed] for seed in seeds if (row, b, seed) in by]
            if not own:
                words += ["not measured", "", ""]
                continue
            changes = [
                each["kl"] / by["gptq", b, each["seed"]]["kl"] - 1 for each in own if ("gptq", b, each["seed"]) in by
            ]
            first = own[0]
            change = f"{100 * mean(changes):+.1f} %" if changes and row != "gptq" else ""
            if len(changes) > 1 and row != "gptq":
                change += f" ({100 * min(changes):+.1f} to {100 * max(changes):+.1f})"
            words += [f"{first['kl']:.4g} ({first['low']:.4g} to {first['high']:.4g})", change]
            words.append(f"{mean(each['s'] for each in own):.0f}")
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=[*ROWS, *AUTO_ROUND], metavar="ROW")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--calibration")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--text")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--cell", choices=[*ROWS, *AUTO_ROUND], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(measured(args, args.cell, args.bits[0], args.seeds[0])))
        return
    # The longest first, so that the last process does not run alone.
    wanted = [(row, b, s) for row in reversed(args.rows) for b in args.bits for s in args.seeds]
    with ThreadPoolExecutor(args.at_once) as pool:
        cells = [each for each in pool.map(lambda one: cell(args, *one), wanted) if each]
    print(table(cells, args.rows, args.bits, args.seeds))


if __name__ == "__main__":
    main()
