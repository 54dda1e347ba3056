"""How fast a quantized model continues a text, fused and not: tokens a second and multiplications for each token.

    python benchmarks/decode.py MODEL [--tokens 128] [--length 512] [--rounds 5] [--device cpu]

One run, the two in turn: after a round to warm up, the median and the range of `--rounds` rounds. The texts are greedy;
whether they are equal, token for token, is printed too. Multiplications are calls of a kernel for one step.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

import fewbit
from fewbit.models.decoding.generate import continue_text, prompt_ids
from fewbit.models.skeleton import load_tokenizer
from fewbit.models.source import locate
from fewbit.nn.layers import QLinear

PROMPT = "Once upon a time, in a small village near the sea,"


def multiplications(model: Any) -> int:
    """Calls of kernels for one token."""
    count = 0

    def counted(kernel: Any) -> Any:
        plain = kernel.linear

        def linear(*args: Any) -> Any:
            nonlocal count
            count += 1
            return plain(*args)

        return linear

    packed = [m.kernel for m in model.modules() if isinstance(m, QLinear)]
    kernels: list[Any] = list({id(kernel): kernel for kernel in packed}.values())
    for kernel in kernels:
        kernel.linear = counted(kernel)
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
    for kernel in kernels:
        del kernel.linear
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    tokenizer = load_tokenizer(locate(args.model))
    ids = prompt_ids(tokenizer, PROMPT)
    models = {
        "as it is": fewbit.load(args.model, device=args.device),
        "fused": fewbit.load(args.model, device=args.device, fuse=args.length),
    }
    rates: dict[str, list[float]] = {name: [] for name in models}
    texts: dict[str, str] = {}
    for turn in range(args.rounds + 1):
        for name, model in models.items():
            model.generation_config.eos_token_id = None  # all texts are equally long
            done = continue_text(model, tokenizer, ids, max_new_tokens=args.tokens)
            texts[name] = done.text
            assert done.rate is not None
            if turn:
                rates[name].append(done.rate)
    for name, model in models.items():
        middle, low, high = statistics.median(rates[name]), min(rates[name]), max(rates[name])
        print(f"{name:9} {middle:7.1f} tokens/s ({low:.1f} to {high:.1f}), {multiplications(model)} multiplications")
    ratio = statistics.median(b / a for a, b in zip(*rates.values(), strict=True))
    equal = "equal" if len(set(texts.values())) == 1 else "DIFFERENT"
    print(f"fused is {ratio:.2f} times as fast; the texts are {equal}")


if __name__ == "__main__":
    main()
