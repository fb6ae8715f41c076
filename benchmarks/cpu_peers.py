"""The contenders of ``benchmarks/cpu.py``, each in a process of its own: ``python cpu_peers.py KIND MODEL_DIRECTORY THREADS``.

A worker loads, says on a line of JSON what it holds, and then answers requests, a line each: ``{"prefill": 512}`` gives
seconds for reading 512 tokens; ``{"decode": 32, "context": 128}`` gives seconds of each of 32 greedy tokens after 128 others
(the context is read before and not timed). Idle workers sleep. This file runs in the peers' own environments: it imports
nothing of quantkit unless it is quantkit's turn.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


def bytes_of(path: str | Path) -> int:
    return sum(file.stat().st_size for file in Path(path).iterdir() if file.suffix in (".safetensors", ".bin"))


class Quantkit:
    """The native engine; ``quantkit[-float]-exact`` keeps activations float, ``-int8`` rounds them."""

    def __init__(self, kind: str, path: str) -> None:
        from quantkit.checkpoint.open import open_model
        from quantkit.engine.backend import OneSequence
        from quantkit.hf.backend import make_backend

        start = time.perf_counter()
        quantized = kind != "quantkit-bf16"
        model, tokenizer = open_model(path, head="int8" if quantized else "float")
        self.model: Any = model.eval()
        self.load_s = time.perf_counter() - start
        compute = "int8" if kind.endswith("int8") else "exact"
        backend: Any = make_backend(self.model, engine="native", compute=compute)
        self.step = OneSequence(backend, 2048 + 256)
        self.vocabulary = self.model.config.vocab_size
        program = backend.decoder.program
        read = sum(bytes_read(linear.weight, linear.expert or 0) for linear in program.linears())
        weights = sum(math.prod(linear.shape) for linear in program.linears())
        self.facts = {
            "bytes": bytes_of(path),
            "read_bytes": read,
            "bits_per_read_weight": read * 8 / weights,
            "kv_bytes_per_token": backend.nbytes / backend._kv.pages / OneSequence.PAGE_TOKENS,
            "load_s": self.load_s,
            "kl_of_int8_activations": divergence(backend, tokenizer) if tokenizer and compute == "int8" else None,
            "engine": backend.engine,
        }
        self.filled = 0

    def prefill(self, tokens: int) -> float:
        """Return seconds to read ``tokens`` tokens."""
        ids = prompt(tokens, self.vocabulary)
        start = time.perf_counter()
        int(self.step(ids, 0).argmax(-1))
        self.filled = 0
        return time.perf_counter() - start

    def decode(self, count: int, context: int) -> list[float]:
        """Return the seconds of each of ``count`` tokens after ``context``."""
        if self.filled != context:
            self.step(prompt(context, self.vocabulary), 0)
            self.filled = context
        token, times = 7, []
        for position in range(context, context + count):
            start = time.perf_counter()
            token = int(self.step([token], position).argmax(-1))
            times.append(time.perf_counter() - start)
        return times


def divergence(backend: Any, tokenizer: Any, tokens: int = 512) -> float:
    """Return the mean KL, in nats per token, that rounding activations alone makes on the text that every Python carries."""
    from quantkit.calibrate.data import text_default
    from quantkit.engine.backend import Span

    ids = tokenizer("\n".join(text_default()[0])[: 8 * tokens])["input_ids"][:tokens]
    found = []
    for exact in (True, False):
        backend.exact = exact
        table = range(-(-len(ids) // 32))
        found.append(backend.step([Span(0, 0, ids, table, len(ids), fresh=True)]).float().log_softmax(-1))
    p, q = found
    return float((p.exp() * (p - q)).sum(-1).mean())


def bytes_read(weight: Any, expert: int) -> int:
    """Return the bytes of a float weight, or of a quantized one in its kernel's layout."""
    import torch

    return int(weight.nbytes if isinstance(weight, torch.Tensor) else weight.prepacked(torch.float32, expert).weight.nbytes)


class Transformers:
    """transformers: eager fp32 or bf16, compiled, or with torch's (or torchao's) int4 product in every linear."""

    def __init__(self, kind: str, path: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        dtype = torch.float32 if "fp32" in kind else torch.bfloat16
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self.vocabulary = self.model.config.vocab_size
        itemsize = dtype.itemsize
        linears = [m for m in self.model.modules() if isinstance(m, torch.nn.Linear)]
        weights = sum(m.weight.numel() for m in linears)
        read = weights * itemsize
        if kind == "torch-int4pack":
            read = swap_int4(self.model)
        elif kind.startswith("torchao"):
            read = swap_torchao(self.model, linears)
        self.facts = {"bytes": bytes_of(path), "read_bytes": read, "bits_per_read_weight": read * 8 / weights}
        self.compiled = kind.endswith("compiled")
        self.cache: Any = None
        self.filled = 0
        if self.compiled:
            import torch._inductor.config as inductor

            inductor.freezing = True
            self.forward = torch.compile(self.model.forward, dynamic=False)
            self.decode(2, 128)
        else:
            self.forward = self.model.forward

    def _fill(self, context: int, room: int) -> None:
        from transformers import DynamicCache, StaticCache

        self.cache = StaticCache(self.model.config, max_cache_len=context + room) if self.compiled else DynamicCache()
        ids = self.torch.tensor([prompt(context, self.vocabulary)])
        with self.torch.inference_mode():
            self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1)
        self.filled = context

    def prefill(self, tokens: int) -> float:
        """Return seconds to read ``tokens`` tokens."""
        ids = self.torch.tensor([prompt(tokens, self.vocabulary)])
        with self.torch.inference_mode():
            start = time.perf_counter()
            int(self.model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
        return time.perf_counter() - start

    def decode(self, count: int, context: int) -> list[float]:
        """Return the seconds of each of ``count`` tokens after ``context``."""
        torch = self.torch
        if self.filled != context or self.cache is None:
            self._fill(context, 256)
        token, times = torch.tensor([[7]]), []
        with torch.inference_mode():
            for position in range(context, context + count):
                start = time.perf_counter()
                options = {"position_ids": torch.tensor([[position]])} if self.compiled else {}
                out = self.forward(input_ids=token, past_key_values=self.cache, **options)
                token = out.logits[:, -1:].argmax(-1)
                int(token)
                times.append(time.perf_counter() - start)
        if self.compiled:
            self.cache = None  # a static cache cannot be cut; it is filled again
        else:
            self.cache.crop(-count)
        return times


def swap_int4(model: Any) -> int:
    """Put ``torch.ops.aten._weight_int4pack_mm_for_cpu`` (groups of 32) into every linear; return the bytes of the weights."""
    import torch

    group, total = 32, 0

    class Int4(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            w = linear.weight.detach().float()
            self.out, columns = w.shape
            blocks = w.view(self.out, -1, group)
            low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
            scale = ((high - low) / 15).clamp(min=1e-8)
            codes = ((blocks - low) / scale).round().clamp(0, 15).to(torch.int32).view(self.out, columns)
            self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            center = low + 8 * scale  # the product computes (code - 8) * scale + center
            both = torch.cat([scale, center], -1).transpose(0, 1).contiguous()  # (groups, out, 2)
            self.scales = both.to(linear.weight.dtype)
            self.nbytes = self.packed.nbytes + self.scales.nbytes

        def forward(self, x: Any) -> Any:
            flat = x.reshape(-1, x.shape[-1])
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, group, self.scales)
            return y.view(*x.shape[:-1], self.out)

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                made = Int4(child)
                setattr(parent, name, made)
                total += made.nbytes
    return total


def swap_torchao(model: Any, linears: list[Any]) -> int:
    """Quantize with torchao's int4 weight-only config for CPUs, groups of 32; return the bytes of the weights (4.5 bits)."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    weights = sum(m.weight.numel() for m in linears)
    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32))
    return weights * 5 // 8  # a scale and a zero point of 16 bits per 32 codes


class OpenVino:
    """OpenVINO GenAI on an exported directory (``cpu.py prepare`` writes it), with its defaults."""

    def __init__(self, kind: str, path: str) -> None:
        import numpy
        import openvino_genai

        self.genai, self.numpy = openvino_genai, numpy
        self.pipe = openvino_genai.LLMPipeline(path, "CPU")
        config = json.loads((Path(path) / "config.json").read_text())
        self.vocabulary = config["vocab_size"]
        stored = bytes_of(path)
        self.facts = {"bytes": stored, "read_bytes": None, "bits_per_read_weight": None}
        self.salt = 0

    def _run(self, context: int, count: int) -> Any:
        import openvino

        self.salt += 1  # a new first token: nothing comes from the prefix cache
        tokens = [self.salt % self.vocabulary, *prompt(context, self.vocabulary)[1:]]
        ids = self.numpy.array([tokens], dtype=self.numpy.int64)
        given = self.genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(self.numpy.ones_like(ids)))
        config = self.genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = count, True, False
        return self.pipe.generate(given, config).perf_metrics

    def prefill(self, tokens: int) -> float:
        """Return seconds to read ``tokens`` tokens."""
        return self._run(tokens, 1).get_ttft().mean / 1e3

    def decode(self, count: int, context: int) -> list[float]:
        """Return the seconds of each of ``count`` tokens after ``context``."""
        return [duration / 1e6 for duration in self._run(context, count + 1).raw_metrics.m_durations]


class Vllm:
    """vLLM on its CPU backend, in bfloat16."""

    def __init__(self, kind: str, path: str) -> None:
        # Left alone, it wants 92% of the machine's memory free, and keeps a core for itself that then multiplies nothing.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{int(os.environ['OMP_NUM_THREADS']) - 1}")
        from vllm import LLM, SamplingParams

        self.params = SamplingParams
        self.llm = LLM(
            path, dtype="bfloat16", skip_tokenizer_init=True, max_model_len=4096, max_num_seqs=1, gpu_memory_utilization=0.3
        )
        config = json.loads((Path(path) / "config.json").read_text())
        self.vocabulary = config["vocab_size"]
        self.facts = {"bytes": bytes_of(path), "read_bytes": None, "bits_per_read_weight": 16.0}
        self.salt = 0

    def _run(self, context: int, count: int) -> float:
        self.salt += 1  # a new first token: nothing comes from the prefix cache
        ids = [self.salt % self.vocabulary, *prompt(context, self.vocabulary)[1:]]
        params = self.params(max_tokens=count, min_tokens=count, ignore_eos=True, temperature=0.0, detokenize=False)
        start = time.perf_counter()
        self.llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        return time.perf_counter() - start

    def prefill(self, tokens: int) -> float:
        """Return seconds to read ``tokens`` tokens."""
        return self._run(tokens, 1)

    def decode(self, count: int, context: int) -> list[float]:
        """Return the seconds of each of ``count`` tokens after ``context``."""
        alone = self._run(context, 1)
        return [(self._run(context, count + 1) - alone) / count] * count


def prompt(tokens: int, vocabulary: int) -> list[int]:
    """Return tokens that jump through the vocabulary, the same for every contender."""
    return [(17 + 7919 * i) % vocabulary for i in range(tokens)]


def worker_class(kind: str) -> Callable[[str, str], Any]:
    for start, found in {"quantkit": Quantkit, "openvino": OpenVino, "vllm": Vllm}.items():
        if kind.startswith(start):
            return found
    return Transformers


def main() -> None:
    kind, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if not kind.startswith(("openvino", "vllm")):
        import torch

        torch.set_num_threads(threads)
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries may print; only answers go to the pipe
    worker = worker_class(kind)(kind, path)
    print(json.dumps({"ready": True, **worker.facts}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "prefill" in request:
            answer: Answer = {"seconds": worker.prefill(request["prefill"])}
        else:
            answer = {"seconds": worker.decode(request["decode"], request["context"])}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
