"""What generating text from a GGUF file adds to the memory of a process that has imported everything, in MB.

    OMP_NUM_THREADS=1 python benchmarks/resident.py FILE [--with llama.cpp] [--tokens 128]

`peak` is the largest resident size (VmHWM) less what was resident after the imports. Of that: `file`, resident pages of
the GGUF file, `code`, of libraries that the imports had not touched (both at the end of the text), and `rest`. The
imports are the modules that a process has after it has generated a token. Linux only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

PROMPT = "Once upon a time"
MODULES = """
import json, sys, fewbit
fewbit.generate(sys.argv[1], "Once", max_new_tokens=1, device="cpu")
print(json.dumps([*sys.modules]))
"""


def resident(file: Path) -> dict[str, float]:
    """MB of resident pages of the file, and of other files."""
    found, kind = {"file": 0.0, "code": 0.0}, ""
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            place = line.split(maxsplit=5)[5:]
            kind = "file" if place == [str(file)] else "code"
        elif line.startswith("Rss:"):
            found[kind] += int(line.split()[1]) / 1024
        elif line.startswith("Anonymous:"):  # of no file, or pages of a mapped file that were written
            found[kind] -= int(line.split()[1]) / 1024
    return found


def status(key: str) -> float:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(text.partition(f"{key}:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=lambda given: Path(given).resolve())
    parser.add_argument("--with", dest="by", choices=["fewbit", "llama.cpp"], default="fewbit")
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    if args.by == "fewbit":
        command = [sys.executable, "-W", "ignore", "-c", MODULES, str(args.file)]
        listed = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout
        for name in ["torch", "transformers", "fewbit", *json.loads(listed.splitlines()[-1])]:
            with suppress(Exception):  # some are no modules of files
                importlib.import_module(name)
        import fewbit
    else:
        llama: Any = importlib.import_module("llama_cpp")
    before, start = resident(args.file), status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak
    if args.by == "fewbit":
        fewbit.generate(args.file, PROMPT, max_new_tokens=args.tokens, device="cpu")
    else:
        model = llama.Llama(str(args.file), n_ctx=512, n_threads=1, verbose=False)
        model.create_completion(PROMPT, max_tokens=args.tokens)
    added = resident(args.file)
    parts = {kind: added[kind] - before[kind] for kind in ("file", "code")}
    peak = status("VmHWM") - start
    found = {"peak": peak, **parts, "rest": peak - sum(parts.values()), "imports": start}
    print(json.dumps({name: round(value) for name, value in found.items()}))


if __name__ == "__main__":
    main()
