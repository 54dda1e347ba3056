"""QLoRA on a mixture of experts: MODEL DATA.jsonl OUT. The experts are packed, and each gets its own adapter."""

import json
import sys
from pathlib import Path

import fewbit

model, data, out = sys.argv[1:]
base = f"{out}-base"
fewbit.quantize(model, base, plan="nf4", overwrite=True)
tuning = fewbit.Tuning(rank=8, learning_rate=2e-3, steps=20, held_out=0)
done = fewbit.finetune(base, out, data=data, tuning=tuning)
loaded = fewbit.load(base, adapter=out)
adapted = {name.partition(".lora_A")[0] for name, _ in loaded.named_parameters() if ".lora_A" in name}
print(f"{sum('.experts.' in name for name in adapted)} of {len(adapted)} adapted linears are of experts")
print(f"{loaded.get_memory_footprint() / 1e6:.2f} MB in memory, adapter included")
for line in Path(data).read_text(encoding="utf-8").splitlines()[:1]:
    print(fewbit.generate(base, json.loads(line)["prompt"], adapter=out, max_new_tokens=4).text)
