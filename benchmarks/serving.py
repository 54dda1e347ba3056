"""Tokens per second of `fewbit serve` for one client and for several, beside `generate` on the same model.

    python -m benchmarks.serving MODEL [--clients 1,8] [--tokens 100] [--rounds 5] [--load SECONDS]
        [--beside URL] [--dtype TYPE] [--stream]

The server is a process of its own on this machine; each client asks for `--tokens` tokens of a greedy completion, again
when it has the answer. Medians of the rounds, with the lowest and the highest. `generate` runs in this process first.
Only tokens that came are counted: answers may end earlier. `--beside http://127.0.0.1:8080/v1` measures another server
with the same clients, in turns with this one, round by round. `--stream` measures streamed answers too.

With `--load`, 32 clients ask for that many seconds. Shown are how many answers equal those that a single client got
before, and the memory of the server over the time. An answer that is lost ends the benchmark.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import psutil  # type: ignore[import-untyped]

Ask = Callable[[int], int]
PROMPTS = ("The garden is", "Once upon a time", "The best way to", "In the morning", "My friend has", "A small house")


def generated(model: str, tokens: int, rounds: int) -> list[float]:
    """Tokens per second of `generate`, prompt included, with a model that is loaded once."""
    from fewbit.models.decoding.generate import continue_text, prompt_ids
    from fewbit.models.load import load_model
    from fewbit.models.loading import Loading
    from fewbit.models.skeleton import load_tokenizer
    from fewbit.models.source import locate
    from fewbit.system import machine

    source = locate(model)
    loaded, tokenizer = load_model(source, Loading(machine.device(None)), for_text=True), load_tokenizer(source)
    found = []
    for _ in range(rounds + 1):
        start, count = time.perf_counter(), 0
        for prompt in PROMPTS:
            count += continue_text(loaded, tokenizer, prompt_ids(tokenizer, prompt), max_new_tokens=tokens).tokens
        found.append(count / (time.perf_counter() - start))
    return found[1:]  # the first round warms up


def served(ways: list[Ask], clients: int, rounds: int) -> list[list[float]]:
    """Tokens per second of all clients together, of each way to ask. The ways take turns."""
    found: list[list[float]] = [[] for _ in ways]
    with ThreadPoolExecutor(clients) as pool:
        for _ in range(rounds + 1):
            for way, own in zip(ways, found, strict=True):
                start = time.perf_counter()
                count = sum(pool.map(way, range(len(PROMPTS) * clients)))
                own.append(count / (time.perf_counter() - start))
    return [own[1:] for own in found]


def asking(client: openai.OpenAI, tokens: int, *, stream: bool = False) -> Ask:
    """Asks this server for a completion, and counts its tokens."""
    name = client.models.list().data[0].id
    create: Any = client.completions.create  # of its overloads, none takes options of a dictionary
    given: dict[str, Any] = {"model": name, "max_tokens": tokens, "temperature": 0}
    if stream:
        given |= {"stream": True, "stream_options": {"include_usage": True}}

    def ask(index: int) -> int:
        done = create(prompt=PROMPTS[index % len(PROMPTS)], **given)
        if stream:
            *_, done = done
        return int(done.usage.completion_tokens)

    return ask


def loaded(client: openai.OpenAI, process: psutil.Process, seconds: float) -> None:
    """32 clients at once. RuntimeError if a request has no answer."""
    name = client.models.list().data[0].id

    def ask(index: int) -> str:
        prompt, new = f"{PROMPTS[index % len(PROMPTS)]} {index % 16}", 8 + index % 24
        return client.completions.create(model=name, prompt=prompt, max_tokens=new, temperature=0).choices[0].text

    kinds = 48  # lcm of 6, 16 and 24
    wanted = [ask(index) for index in range(kinds)]
    numbers, memory = itertools.count(), [process.memory_info().rss]
    begun = time.perf_counter()

    def work() -> tuple[int, int]:
        done = same = 0
        while time.perf_counter() - begun < seconds:
            index = next(numbers)
            done, same = done + 1, same + (ask(index) == wanted[index % kinds])
            if index % 100 == 99:
                memory.append(process.memory_info().rss)
        return done, same

    with ThreadPoolExecutor(32) as pool:
        results = [each.result() for each in [pool.submit(work) for _ in range(32)]]
    done, same, took = sum(r[0] for r in results), sum(r[1] for r in results), time.perf_counter() - begun
    shown = [round(memory[i * (len(memory) - 1) // 4] / 1e6) for i in range(5)]
    print(
        f"load: {done} answers in {took:.0f} s, {same} as to a single client; server's memory in MB: {shown}",
        flush=True,
    )
    if (asked := next(numbers)) != done:
        raise RuntimeError(f"{asked - done} of {asked} requests have no answer")


def told(what: str, found: list[float]) -> None:
    print(f"{what:16} {statistics.median(found):8.1f} tokens/s   ({min(found):.1f} to {max(found):.1f})", flush=True)


def client_of(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", default="1,8")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--load", type=float, default=0)
    parser.add_argument("--beside")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--dtype", help="of the server")
    args = parser.parse_args()
    told("generate", generated(args.model, args.tokens, args.rounds))
    command = [sys.executable, "-m", "fewbit", "serve", args.model, "--port", "0"]
    command += ["--dtype", args.dtype] if args.dtype else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8") as server:
        assert server.stderr is not None
        line = next(line for line in server.stderr if line.startswith("Serving "))
        address = line.split("chat at ")[1].split(",")[0]
        try:
            asked = [client_of(each) for each in (f"{address}/v1", args.beside) if each]
            if args.load:
                loaded(asked[0], psutil.Process(server.pid), args.load)
            ways = {"whole": asking(asked[0], args.tokens)}
            if args.stream:
                ways["streamed"] = asking(asked[0], args.tokens, stream=True)
            if args.beside:
                ways["beside"] = asking(asked[1], args.tokens)
            for clients in map(int, args.clients.split(",")):
                own, *others = served(list(ways.values()), clients, args.rounds)
                told(f"{clients} clients", own)
                for name, other in zip(list(ways)[1:], others, strict=True):
                    told(name, other)
                    streamed = name == "streamed"
                    label = "streamed / whole" if streamed else "fewbit / beside"
                    pairs = zip(other, own, strict=True) if streamed else zip(own, other, strict=True)
                    ratios = [a / b for a, b in pairs]
                    print(f"{label:16} {statistics.median(ratios):8.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
