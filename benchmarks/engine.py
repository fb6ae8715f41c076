"""The engine on a real model: does it say what transformers says, what quantized keys and values cost, what drafts are worth.

    python benchmarks/engine.py identity      greedy tokens against transformers' generate: alone, ragged batch, with drafts
    python benchmarks/engine.py kv            KL and perplexity through the key/value memory, and its bytes
    python benchmarks/engine.py speculate     tokens per second with and without drafts, on texts that suit and not

Self-drafting needs int8 weights: ``quantkit.quantize("demo", "w8a16-g64", out=DIR)``, then ``--model DIR --head int8``.
``quantkit trace demo`` is the fourth: static against continuous batching.
"""

import argparse
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from quantkit.calibrate.data import text_default
from quantkit.checkpoint.open import open_model
from quantkit.engine.backend import Memory
from quantkit.engine.request import Limits
from quantkit.engine.sampling import Sampling
from quantkit.evaluation import BaseLogits, cut_windows, score
from quantkit.evaluation.through_cache import ThroughCache
from quantkit.generation.engine import Engine
from quantkit.generation.text import encode_prompt
from quantkit.nn.linear import QuantLinear
from quantkit.spec import kv_preset
from quantkit.system.files import write_json

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "List five animals, one per line.",
    "Explain in two sentences why the sky is blue.",
    "Who wrote Hamlet?",
    "Count from 1 to 20.",
    "Give me a recipe for pancakes.",
    "Name three rivers in Europe and the countries they run through.",
)
CODE = """class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def add(self, other):
        return Point(self.x + other.x, self.y + other.y)

    def subtract(self, other):
        return Point(self.x - other.x, self.y - other.y)
"""
STORY = "Tell me a long story about a lighthouse keeper and the sea."
TEXTS = {  # what to say, and how
    "repeats": (f"Repeat this program, word for word:\n\n{CODE}", Sampling()),
    "counts": ("Count from 1 to 60.", Sampling()),
    "prose": (STORY, Sampling()),
    "sampled prose": (STORY, Sampling(0.8, seed=1)),
    "noise": (STORY, Sampling(3.0, seed=1)),  # what nobody can guess
}


def chat(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = encode_prompt([{"role": "user", "content": text}], tokenizer).tolist()
    return ids


def answers(engine: Engine, prompts: list[list[int]], new: int) -> list[list[int]]:
    requests = [engine.submit(ids, max_new_tokens=new) for ids in prompts]
    for _ in engine.run():
        pass
    return [request.ids for request in requests]


WAYS: dict[str, dict[str, Any]] = {
    "native, alone": {"running": 1},
    "native, batch of 8": {},
    "native, batch of 8, n-gram drafts": {"drafter": "ngram"},
    "native, alone, self-drafting": {"running": 1, "drafter": "self"},
    "native, batch of 8, self-drafting": {"drafter": "self"},
    "modules, dense, alone": {"engine": "modules", "running": 1, "page_tokens": 512},
    "modules, dense, batch of 8": {"engine": "modules", "page_tokens": 512},
    "modules, paged, batch of 8": {"engine": "modules", "page_tokens": 16},
    "modules, paged, batch of 8, n-gram drafts": {"engine": "modules", "page_tokens": 16, "drafter": "ngram"},
}


def identity(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    prompts, new = [chat(tokenizer, text) for text in QUESTIONS], arguments.tokens
    theirs = []
    with torch.no_grad():
        for ids in prompts:
            given = torch.tensor([ids])
            options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            said = model.generate(given, attention_mask=torch.ones_like(given), **options)
            theirs.append(said[0, len(ids) :].tolist())
    found = {}
    for name, way in WAYS.items():
        options = {"running": 8, "kv_tokens": 4096, **way}
        drafter, how = options.pop("drafter", None), options.pop("engine", "native")
        if drafter == "self" and not quantized_to_8(model):
            continue
        engine = Engine(model, limits=Limits(**options), drafter=drafter, engine=how)
        same = sum(a == b for a, b in zip(answers(engine, prompts, new), theirs, strict=True))
        stats = engine.stats
        found[name] = {"same": same, "of": len(prompts), "drafted": stats["drafted"], "accepted": stats["accepted"]}
        drafts = f"; {stats['accepted']} of {stats['drafted']} drafts right" if drafter else ""
        print(f"{name:42} {same} of {len(prompts)} answers of {new} tokens equal transformers' generate{drafts}", flush=True)
    return found


def quantized_to_8(model: Any) -> bool:
    return any(isinstance(module, QuantLinear) and module.spec.bits == 8 for module in model.modules())


def kv(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    text = Path(arguments.text).read_text(encoding="utf-8") if arguments.text else "\n\n".join(text_default()[1])
    ids = torch.tensor(tokenizer(text)["input_ids"])
    cut = cut_windows(ids, length=arguments.length, count=arguments.windows)
    base, found = BaseLogits(model), {}
    for name in arguments.schemes:
        through = ThroughCache(model, kv_preset(name), chunk=arguments.chunk, engine=arguments.engine)
        quality = score(through, cut, base, batch_size=arguments.windows)
        assert quality.divergence is not None
        backend: Any = through._backend
        memories = [Memory(pages, 32, 1) for pages in (0, 64)]
        per_token = (backend.bytes_for(memories[1]) - backend.bytes_for(memories[0])) / (64 * 32)
        backend.reserve(memories[1])
        assert backend.nbytes == backend.bytes_for(memories[1])
        kl = quality.divergence
        found[name] = {"kl": kl.mean, "kl_se": kl.mean_se, "perplexity": quality.perplexity, "bytes_per_token": per_token}
        predicted = f"perplexity {quality.perplexity:.3f} (float {kl.base_perplexity:.3f})"
        print(f"{name:6} KL {kl.mean:.5f} ± {kl.mean_se or 0:.5f}  {predicted}  {per_token:.0f} bytes per token", flush=True)
    return found


def race(
    engines: dict[str, Engine], prompt: list[int], sampling: Sampling, count: int, turn: int
) -> dict[str, tuple[float, list[int]]]:
    """Let every engine write the same answer, a step at a time, always the one that is behind: a busy moment hits all alike.

    Returns, for each, seconds in steps after the first token, and the tokens.
    """
    requests = {kind: engine.submit(prompt, max_new_tokens=count, sampling=sampling) for kind, engine in engines.items()}
    spent = dict.fromkeys(engines, 0.0)
    for engine in engines.values():
        engine.step()  # the prompt, and the first token
    kinds = list(engines)
    while any(engine.busy for engine in engines.values()):
        kinds = kinds[1:] + kinds[:1] if turn % 2 else kinds
        kind = min((k for k in kinds if engines[k].busy), key=lambda k: requests[k].answered)
        start = time.perf_counter()
        engines[kind].step()
        spent[kind] += time.perf_counter() - start
    return {kind: (spent[kind], requests[kind].ids) for kind in engines}


def speculate(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    limits, options = Limits(running=1, kv_tokens=2048), {"engine": arguments.engine, "compute": arguments.compute}
    drafters = [None, "ngram", *(["self"] if quantized_to_8(model) else [])]
    engines = {drafter or "plain": Engine(model, limits=limits, drafter=drafter, **options) for drafter in drafters}
    for name, (text, sampling) in TEXTS.items():
        prompt, tokens = chat(tokenizer, text), dict[str, list[int]]()
        seconds: dict[str, list[float]] = {kind: [] for kind in engines}
        counts = {kind: [engine.stats[what] for what in ("drafted", "accepted", "steps")] for kind, engine in engines.items()}
        for turn in range(arguments.rounds):
            for kind, (spent, ids) in race(engines, prompt, sampling, arguments.tokens, turn).items():
                seconds[kind].append(spent)
                tokens[kind] = ids
        found[name] = rows = {}
        for kind, engine in engines.items():
            drafted, accepted, steps = (
                engine.stats[what] - before for what, before in zip(("drafted", "accepted", "steps"), counts[kind], strict=True)
            )
            ratio = statistics.median(a / b for a, b in zip(seconds["plain"], seconds[kind], strict=True))
            speed = (arguments.tokens - 1) / statistics.median(seconds[kind])
            same = tokens[kind] == tokens["plain"]
            rows[kind] = {"tokens_per_s": speed, "ratio": ratio, "seconds": seconds[kind], "same_tokens": same}
            rows[kind] |= {"drafted": drafted, "accepted": accepted, "steps": steps}
            right = f"{accepted} of {drafted} drafts right ({accepted / max(drafted, 1):.0%}), " if kind != "plain" else ""
            said = f"{speed:6.1f} tokens/s, {ratio:.2f}x, {right}{'same tokens' if same else 'OTHER TOKENS'}"
            print(f"{name:14} {kind:6} {said}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("identity", "kv", "speculate"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--head", default="float", help="int8 rounds the output head")
    parser.add_argument("--compute", default="exact", help="speculate: int8 rounds them")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", help="kv: text to score; default: the held-out half of the language reference of Python")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--chunk", type=int, default=32, help="kv: tokens per step; 1 is what decoding does")
    parser.add_argument("--schemes", nargs="+", default=["float", "int8", "int4"])
    parser.add_argument("--json")
    arguments = parser.parse_args()
    model, tokenizer = open_model(arguments.model, getattr(torch, arguments.dtype), head=arguments.head)
    start = time.perf_counter()
    found = {"identity": identity, "kv": kv, "speculate": speculate}[arguments.what](model.eval(), tokenizer, arguments)
    print(f"{arguments.what}: {time.perf_counter() - start:.0f} s, {torch.get_num_threads()} threads")
    if arguments.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        options = {**vars(arguments), "model": Path(arguments.model).name, "json": None}
        write_json(arguments.json, {"options": options, "machine": machine, "found": found})


if __name__ == "__main__":
    main()
