"""Quantize a model, measure what was lost, and upload it with a card that says so: MODEL OWNER/NAME.

The token is that of `hf auth login`. The repository is private.
"""

import sys

import fewbit

model, repository = sys.argv[1:]
out = repository.rpartition("/")[2]
fewbit.quantize(model, out, plan="nf4", overwrite=True)
quality = fewbit.evaluate(out, reference=model, samples=4, record=True).quality
assert quality.same_top is not None
print(f"the same most likely token at {quality.same_top.value:.1%} of the positions")
if quality.same_top.value < 0.8:
    sys.exit("that is too much: nothing was uploaded")
print(fewbit.push(out, repository).url)
