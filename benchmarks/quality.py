"""How much of round-to-nearest's loss GPTQ, or another method, wins back, at equal bytes, in one run.

    python benchmarks/quality.py [--calibration FILE] [--text FILE] [--length 1024] [--windows 8] [--bits 4 3]
    python benchmarks/quality.py --model tiny --length 512 --windows 64 --bits 4 3 2 --group 128     # docs/tiny.md
    python benchmarks/quality.py --model build/tiny-moe --length 512 --windows 32 --group 128 --methods gptq awq

Calibrates on 64 x 512 tokens of --calibration, measures KL divergence from the bf16 model on --text. Without files it
uses the two disjoint texts that suit the model: its own for tiny, Python's reference manual for others. Prints a table
and, with --json, the numbers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import fewbit
from fewbit.plans.plan import find
from fewbit.report.results import Evaluation
from fewbit.texts.calibration import Calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--text")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=["gptq"], help="to compare with round to nearest")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    calibration = Calibration(args.calibration, samples=args.samples, length=512)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for bits in args.bits:
            measured: dict[str, Evaluation] = {}
            for method in ("rtn", *args.methods):
                plan = find("rtn-4bit").changed(method=method, scheme=f"int{bits}-g{args.group}-sym")
                out = Path(scratch) / f"{method}-{bits}"
                start = time.perf_counter()
                fewbit.quantize(args.model, out, plan=plan, calibration=calibration)
                seconds = time.perf_counter() - start
                done = fewbit.evaluate(
                    out, reference=args.model, text=args.text, length=args.length, samples=args.windows
                )
                measured[method] = done
                assert done.quality.kl is not None
                rows.append(
                    {
                        "bits": bits,
                        "method": method,
                        "kl": done.quality.kl.mean.value,
                        "kl_of_rtn": done.quality.kl.mean.value / rtn_kl(measured["rtn"]),
                        "perplexity": done.quality.perplexity.value,
                        "weights_bytes": done.inspection.weights_bytes,
                        "seconds": seconds,
                    }
                )
                print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()))
            assert len({done.inspection.weights_bytes for done in measured.values()}) == 1
    if args.json:
        print(json.dumps(rows, indent=1))


def rtn_kl(done: Evaluation) -> float:
    assert done.quality.kl is not None
    return done.quality.kl.mean.value


if __name__ == "__main__":
    main()
