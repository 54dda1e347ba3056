"""How much sooner several processes quantize a model than one, on this machine's GPUs or its cores.

    python -m benchmarks.several MODEL [--processes 1,2] [--plan gptq-4bit] [--samples 128] [--length 2048]

Seconds and the most memory of the first process, of its GPU where there is one, for each number of processes in turn,
each from an empty cache. MODEL may be `8b`, where there is a GPU: a Llama of 8B's shape with random weights (--layers),
made for the time of the run. Loss is the mean relative output error over all linears.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TASK = """
import json, sys
from pathlib import Path
import torch
import fewbit
from fewbit.system import ranks
from fewbit.texts.calibration import Calibration
model, out, plan, samples, length = sys.argv[1:]
done = fewbit.quantize(model, out, plan=plan, calibration=Calibration(samples=int(samples), length=int(length)))
if not ranks.silent():
    errors = [tensor.error for tensor in done.tensors]
    found = {"seconds": done.seconds, "peak": done.gpu_peak or done.peak, "error": sum(errors) / len(errors)}
    Path(out + ".json").write_text(json.dumps(found), encoding="utf-8")
"""


def measured(count: int, model: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    out, task = folder / f"of-{count}", folder / "task.py"
    task.write_text(TASK, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // max(args.processes))), **os.environ}
    environment["FEWBIT_CACHE"] = str(folder / f"cache-{count}")
    asked = [str(task), model, str(out), args.plan, str(args.samples), str(args.length)]
    subprocess.run([*torchrun, *asked], check=True, env=environment)
    found: dict[str, float] = json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))
    return found


def random_8b(folder: Path, layers: int) -> str:
    """The random model, made on a GPU, with the tokenizer of `tiny`, whose tokens are a part of its vocabulary."""
    from benchmarks.quantize_gpu import make
    from fewbit.models.source import locate

    make(folder, layers)
    for file in locate("tiny").folder.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--plan", default="gptq-4bit")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    args.processes = [int(count) for count in args.processes.split(",")]
    with tempfile.TemporaryDirectory() as place:
        model = random_8b(Path(place) / "8b", args.layers) if args.model == "8b" else args.model
        rows = {count: measured(count, model, Path(place), args) for count in args.processes}
    base = rows[args.processes[0]]
    print("| processes | seconds | times as fast | peak of the first, GB | mean output error |\n|---|---|---|---|---|")
    for count, row in rows.items():
        faster = base["seconds"] / row["seconds"]
        print(f"| {count} | {row['seconds']:.1f} | {faster:.2f} | {row['peak'] / 1e9:.2f} | {row['error']:.4e} |")


if __name__ == "__main__":
    main()
