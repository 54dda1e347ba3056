"""An AWQ model as a GGUF file for llama.cpp: with the same values if the file can hold them, else quantized again."""

import sys

import fewbit

model, out = sys.argv[1:]
try:
    fewbit.convert(model, out, to="gguf")
    print("the same values")
except fewbit.PlanError as error:
    print(f"not exact: {error.message.splitlines()[0]}")
    done = fewbit.convert(model, out, to="gguf", requantize=True, plan="q8_0", samples=1, length=64)
    assert done.evaluation is not None
    print(f"quantized again, KL divergence {done.evaluation.quality.kl.mean.value:.4f}")
print(fewbit.generate(out, "Once upon a time", max_new_tokens=12).text)
