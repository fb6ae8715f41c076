"""The engine on a real model: does it say what transformers says, what quantized keys and values cost, what drafts are worth.

    python benchmarks/engine.py identity      greedy tokens against transformers' generate: alone, ragged batch, with drafts
    python benchmarks/engine.py kv            KL and perplexity through the key/value memory, and its bytes
    python benchmarks/engine.py speculate     tokens per second with and without drafts, round by round

``quantkit trace demo`` is the fourth: static against continuous batching.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from quantkit.engine.request import Limits
from quantkit.engine.step import Memory
from quantkit.evaluation import BaseLogits, cut_windows, score
from quantkit.evaluation.through_cache import ThroughCache
from quantkit.files import write_json
from quantkit.generation import Engine, encode_prompt
from quantkit.models import open_model
from quantkit.spec import kv_preset

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
TEXTS = {
    "repeats": f"Repeat this program, word for word:\n\n{CODE}",
    "prose": "Tell me a long story about a lighthouse keeper and the sea.",
}


def chat(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = encode_prompt([{"role": "user", "content": text}], tokenizer).tolist()
    return ids


def answers(engine: Engine, prompts: list[list[int]], new: int) -> list[list[int]]:
    requests = [engine.submit(ids, max_new_tokens=new) for ids in prompts]
    for _ in engine.run():
        pass
    return [request.ids for request in requests]


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
    for name, options in {
        "alone": {"running": 1},
        "batch of 8": {"running": 8},
        "batch of 8, n-gram drafts": {"running": 8},
    }.items():
        limits = Limits(**{"kv_tokens": 4096, **options})
        engine = Engine(model, limits=limits, drafter="ngram" if "drafts" in name else None, engine=arguments.engine)
        ours = answers(engine, prompts, new)
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        found[name] = {"same": same, "of": len(prompts), "accepted": engine.stats["accepted"]}
        print(f"{name:28} {same} of {len(prompts)} answers of {new} tokens equal transformers' generate", flush=True)
    return found


def kv(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    ids = torch.tensor(tokenizer(Path(arguments.text).read_text(encoding="utf-8"))["input_ids"])
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


def speculate(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, text in TEXTS.items():
        prompt, times = chat(tokenizer, text), dict[str, list[float]]()
        limits = Limits(running=1, kv_tokens=2048)
        engines = {"plain": Engine(model, limits=limits, engine=arguments.engine)}
        engines["ngram"] = Engine(model, limits=limits, engine=arguments.engine, drafter="ngram")
        tokens = {}
        for turn in range(arguments.rounds + 1):
            for kind, engine in engines.items():
                request = engine.submit(prompt, max_new_tokens=arguments.tokens)
                for _ in engine.run():
                    pass
                tokens[kind] = request.ids
                if turn:
                    times.setdefault(kind, []).append((len(request.ids) - 1) / (request.token_s[-1] - request.token_s[0]))
        ratio = statistics.median(b / a for a, b in zip(times["plain"], times["ngram"], strict=True))
        stats = engines["ngram"].stats
        rate = stats["accepted"] / max(stats["drafted"], 1)
        found[name] = {"plain": times["plain"], "ngram": times["ngram"], "ratio": ratio, "acceptance": rate}
        speeds = ", ".join(f"{kind} {statistics.median(speed):.1f}" for kind, speed in times.items())
        same = tokens["plain"] == tokens["ngram"]
        right = f"{stats['accepted']} of {stats['drafted']} drafts right"
        print(f"{name:8} tokens/s: {speeds}; {ratio:.2f}x; {right}; same tokens: {same}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("identity", "kv", "speculate"))
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", help="kv: text to score")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--chunk", type=int, default=32, help="kv: tokens per step; 1 is what decoding does")
    parser.add_argument("--schemes", nargs="+", default=["float", "int8", "int4"])
    parser.add_argument("--json")
    arguments = parser.parse_args()
    model, tokenizer = open_model(arguments.model, getattr(torch, arguments.dtype))
    start = time.perf_counter()
    found = {"identity": identity, "kv": kv, "speculate": speculate}[arguments.what](model.eval(), tokenizer, arguments)
    print(f"{arguments.what}: {time.perf_counter() - start:.0f} s, {torch.get_num_threads()} threads")
    if arguments.json:
        write_json(arguments.json, found)


if __name__ == "__main__":
    main()
