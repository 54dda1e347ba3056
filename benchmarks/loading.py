"""Peak memory and seconds of loading a quantized model through `from_pretrained`, against its packed bytes.

    python -m benchmarks.loading [smollm2] [--plans rtn-4bit,awq-4bit,nf4,int8,q4_k_m]

Each model is loaded in a process of its own that has imported all it needs. `peak` is what was resident at most
(VmHWM, reset after the imports) beyond what was resident before, mapped pages of files included; `touched` is
the same once a byte of every page of every weight was read, since a mapped weight is resident only then; `packed` is
`get_memory_footprint()`; `read` is the time that reading the files' bytes takes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import fewbit
from fewbit.plans.plan import find

LOAD = """
import json, sys, time
from pathlib import Path
import torch
import fewbit
fewbit.prefer()
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
import fewbit.api
from fewbit.system import heap
folder, file = Path(sys.argv[1]), sys.argv[2] or None
start = time.perf_counter()
for path in folder.glob("*.gguf" if file else "*.safetensors"):
    path.read_bytes()
read = time.perf_counter() - start
heap.return_freed()
Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
before = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(folder, **({"gguf_file": file} if file else {}))
seconds = time.perf_counter() - start
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
peak = int(status["VmHWM"].split()[0]) * 1024 - before
for tensor in [*model.parameters(), *model.buffers()]:
    tensor.detach().flatten().view(torch.uint8)[::4096].sum()  # a byte of every page
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
touched = int(status["VmHWM"].split()[0]) * 1024 - before
packed = model.get_memory_footprint()
shares = {"share": peak / packed, "touched_share": touched / packed}
print(json.dumps({"packed": packed, "peak": peak, "touched": touched, **shares, "seconds": seconds, "read": read}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--plans", default="rtn-4bit,awq-4bit,nf4,int8,q4_k_m")
    args = parser.parse_args()
    for name in args.plans.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            file = "model.gguf" if name.startswith("q") else ""
            plan = find(name).changed(method="rtn")  # the values are of no matter here
            out = Path(scratch) / "out"
            out.mkdir(exist_ok=bool(file))
            fewbit.quantize(args.model, out / file if file else out / "model", plan=plan)
            place = out if file else out / "model"
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", LOAD, str(place), file],
                check=True,
                capture_output=True,
                text=True,
                encoding="utf-8",
            )
            print(name, json.dumps(json.loads(done.stdout.splitlines()[-1])), flush=True)


if __name__ == "__main__":
    main()
