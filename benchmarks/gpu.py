"""The CUDA kernels and the recorded decode, side by side with torch's own, in one run on one device.

    python benchmarks/gpu.py [machine matmul modes chain attention sample decode engine] [--json results.json] [--quick]

Every number is from this run: read and copy rates and a large bf16 product first, the rest as times and as ratios to them
and to bf16 products (cuBLAS) of the same shape. A time is the median over replays of one CUDA graph that calls the kernel
once per copy of its weights, with copies enough to fill the second cache four times over; contenders take turns, and the
first one is timed again at the end (`again`: how far the machine drifted). Results are checked before they are timed.
`of_floor` is the share of the time that the machine part's own rates would need: bytes at its read rate, or arithmetic at its
bf16 rate, whichever is longer. Peers (``gpu_peers.py``) that cannot run, or whose results are wrong, stand under ``missing``
with the reason.
``gpu_table.py`` prints what a JSON says of the goals. ``--smoke`` runs it all, tiny, on the CPU in plain torch: a check of this
file, not of speed.
"""

import argparse
import dataclasses
import itertools
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gpu_peers
import torch
from torch import Tensor
from torch.nn import functional as F

from quantkit.engine.cuda import CudaBackend
from quantkit.engine.engine import TokenEngine
from quantkit.engine.request import Limits
from quantkit.engine.sampling import Sampling
from quantkit.kernels.cuda import calls, layout, prefill
from quantkit.kernels.cuda import ops as cuda_ops
from quantkit.kernels.cuda.attention import PAGE_TOKENS, LayerPages, Where
from quantkit.kernels.cuda.decoder import CudaDecoder
from quantkit.kernels.cuda.graph import GraphDecoder
from quantkit.kernels.functions.sampling import Draw
from quantkit.kernels.program.definition import Attention, Layer, Linear, Mlp, Norm, Program, Rotary
from quantkit.nn.linear import QuantLinear
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec
from quantkit.system.files import write_json

SHAPES = {"o": (4096, 4096), "qkv": (6144, 4096), "down": (4096, 14336), "gate_up": (28672, 4096), "head": (128256, 4096)}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
GROUP = 128


@dataclasses.dataclass
class Bench:
    """The device, how large everything is, and what was found."""

    device: str
    smoke: bool
    quick: bool
    found: dict[str, Any]

    @property
    def cache_bytes(self) -> int:
        """Size of the second cache."""
        return 0 if self.smoke else torch.cuda.get_device_properties(0).L2_cache_size

    def time(self, calls: list[Callable[[], Any]]) -> Callable[[], float]:
        """Record ``calls`` once; return a function that gives the median microseconds of one of them."""
        if self.smoke:

            def run() -> float:
                start = time.perf_counter()
                for call in calls:
                    call()
                return (time.perf_counter() - start) * 1e6 / len(calls)

            return run
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            calls[0]()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for call in calls:
                    call()
        torch.cuda.synchronize()

        def replay() -> float:
            times = []
            for _ in range(22):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) * 1e3 / len(calls))
            return statistics.median(times[2:])

        return replay

    def compare(self, contenders: dict[str, list[Callable[[], Any]]], rounds: int = 3) -> dict[str, float]:
        """Time contenders in turn; return microseconds of each, and ``again``: the first one's last over its first."""
        timers = {name: self.time(calls) for name, calls in contenders.items()}
        seen: dict[str, list[float]] = {name: [] for name in timers}
        for _ in range(1 if self.quick else rounds):
            for name, timer in timers.items():
                seen[name].append(timer())
        first = next(iter(timers))
        last = timers[first]()
        return {**{name: statistics.median(times) for name, times in seen.items()}, "again": last / seen[first][0]}


def random_weight(n: int, k: int, dtype: str, group: int, device: str, symmetric: bool = True) -> GridTensor:
    """Return a weight of random codes whose products stay near one."""
    spec = QuantSpec(dtype, (1, group), symmetric)
    codes = torch.randint(0, 2**spec.bits, (n, k), dtype=torch.uint8, device=device)
    groups = k // group if group > 0 else 1
    scale = (torch.rand(n, groups, device=device) + 0.5) / (2**spec.bits * k**0.5)
    return GridTensor.from_codes(codes, scale.half(), None, spec)


def machine(bench: Bench) -> None:
    """Measure what the device gives: read rate, copy rate, a bf16 product."""
    size = 1 << (14 if bench.smoke else 30)
    data = torch.ones(size, dtype=torch.float32, device=bench.device)
    into = torch.empty_like(data)
    side = 64 if bench.smoke else 8192
    a = torch.randn(side, side, device=bench.device).bfloat16()
    found = bench.compare({"read": [lambda: data.sum()], "copy": [lambda: into.copy_(data)], "product": [lambda: a @ a]})
    bench.found["machine"] = {
        "device": "cpu" if bench.smoke else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "read_tb_s": data.nbytes / found["read"] / 1e6,
        "copy_tb_s": 2 * data.nbytes / found["copy"] / 1e6,
        "bf16_tflop_s": 2 * side**3 / found["product"] / 1e6,
        "clocks": "" if bench.smoke else shell("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw", "--format=csv"),
    }
    print(bench.found["machine"])


def shell(*line: str) -> str:
    """Return what a command prints."""
    return subprocess.run(line, capture_output=True, text=True, check=False).stdout.strip()


def floor_us(bench: Bench, size: int, operations: int) -> float:
    """Return the microseconds that so many bytes and operations need at this run's own rates; 0 where those are not known."""
    rates = bench.found.get("machine")
    if rates is None:
        return 0.0
    best = max(rates["read_tb_s"], rates["copy_tb_s"])
    return max(size / best / 1e6, operations / rates["bf16_tflop_s"] / 1e6)


def matmul(bench: Bench) -> None:
    """Time products of the shapes of an 8B model, by number of tokens."""
    ops, rows, missing = cuda_ops.ops(), [], bench.found.setdefault("missing", {})
    shapes = {"o": (64, 128), "down": (96, 256)} if bench.smoke else SHAPES
    for name, (n, k) in shapes.items():
        need = 4 * bench.cache_bytes
        copies = {bits: max(1, min(64, -(-need // (n * k * bits // 8)))) for bits in (4, 8, 16)}
        int4 = [random_weight(n, k, "int4", GROUP, bench.device) for _ in range(copies[4])]
        laid4 = [layout.prepack(one) for one in int4]
        laid8 = [layout.prepack(random_weight(n, k, "int8", -1, bench.device)) for _ in range(copies[8])]
        dense = [torch.randn(n, k, device=bench.device).bfloat16() / k**0.5 for _ in range(copies[16])]
        peers = gpu_peers.prepare(int4, missing)
        for tokens in (1, 4) if bench.smoke else (1, 16, 64, 1024) if bench.quick else TOKENS:
            if name == "head" and tokens > 256:
                continue
            x = torch.randn(tokens, k, device=bench.device).bfloat16()
            got = ops.fragment_matmul(x, *laid4[0], None, "codes")
            want = x.double() @ int4[0].dequantize().double().T
            wrong = gpu_peers.relative_error(got, want)
            assert wrong < 5e-3, (name, tokens, wrong)
            contenders = {
                "bf16": [partial(F.linear, x, w) for w in dense],
                "int4": [partial(ops.fragment_matmul, x, *w, None, "codes") for w in laid4],
                "int8": [partial(ops.fragment_matmul, x, *w, None, "codes") for w in laid8],
                "w8a8": [partial(ops.fragment_matmul, x, *w, None, "int8") for w in laid8],
            }
            others, errors = gpu_peers.contenders(peers, x, want, missing)
            found = bench.compare(contenders | others)
            moved = laid4[0].nbytes + x.nbytes + 2 * tokens * n
            row = {"shape": name, "tokens": tokens, **found, "error": wrong, **errors, "int4_tb_s": moved / found["int4"] / 1e6}
            row["int4_of_floor"] = floor_us(bench, moved, 2 * tokens * n * k) / found["int4"]
            row |= {f"{other}_speedup": found["bf16"] / found[other] for other in found if other not in ("bf16", "again")}
            rows.append(row)
            print(
                "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
            )
        del int4, laid4, laid8, dense, peers
    bench.found["matmul"] = rows
    for peer, reason in missing.items():
        print(f"{peer} does not run: {reason}")
    small = [row["int4_speedup"] for row in rows if row["tokens"] <= 16]
    print(f"geometric mean over up to 16 tokens: {statistics.geometric_mean(small):.3f} times bf16")


def modes(bench: Bench) -> None:
    """Time the modes that an int4 product can go, to see where one overtakes another."""
    rows, device = [], torch.device(bench.device)
    shapes = {"o": (64, 128)} if bench.smoke else {name: SHAPES[name] for name in ("o", "qkv", "down", "gate_up")}
    for (name, (n, k)), tokens in itertools.product(shapes.items(), (2,) if bench.smoke else (33, 64, 96, 128, 192, 256, 512)):
        copies = max(1, min(64, -(-4 * bench.cache_bytes // (n * k // 2))))
        weights = [layout.prepack(random_weight(n, k, "int4", GROUP, bench.device)) for _ in range(copies)]
        x = torch.randn(tokens, k, device=bench.device).bfloat16()
        contenders: dict[str, list[Callable[[], Any]]] = {"dispatched": [partial(product, x, w) for w in weights]}
        if not bench.smoke:
            contenders["codes"] = [partial(calls.matmul, x, w) for w in weights]
            contenders["expanded"] = [partial(calls.dense_matmul, x, w, None) for w in weights]
            if prefill.works(device, x.dtype, 4):
                contenders["wgmma"] = [partial(prefill.matmul, x, w) for w in weights]
        rows.append({"shape": name, "tokens": tokens, **bench.compare(contenders)})
        print(rows[-1])
    bench.found["modes"] = rows


def product(x: Tensor, weight: layout.Fragments) -> Tensor:
    y: Tensor = cuda_ops.ops().fragment_matmul(x, *weight, None, "codes")
    return y


def chain(bench: Bench) -> None:
    """Time the four products of a layer, 32 layers in a graph: what a token costs in products alone."""
    ops, rows = cuda_ops.ops(), []
    names, layers = ("qkv", "o", "gate_up", "down"), 2 if bench.smoke else 32
    shapes = {name: (64, 128) if bench.smoke else SHAPES[name] for name in names}
    int4 = [[layout.prepack(random_weight(*shapes[n], "int4", GROUP, bench.device)) for n in names] for _ in range(layers)]
    dense = [[torch.randn(shapes[n], device=bench.device).bfloat16() for n in names] for _ in range(layers)]
    for tokens in (1, 4, 8, 16):
        inputs = {name: torch.randn(tokens, shapes[name][1], device=bench.device).bfloat16() for name in names}

        def ours(inputs: dict[str, Tensor] = inputs) -> None:
            for layer in int4:
                for name, weight in zip(names, layer, strict=True):
                    ops.fragment_matmul(inputs[name], *weight, None, "codes")

        def theirs(inputs: dict[str, Tensor] = inputs) -> None:
            for layer in dense:
                for name, weight in zip(names, layer, strict=True):
                    F.linear(inputs[name], weight)

        found = bench.compare({"int4": [ours], "bf16": [theirs]})
        size = sum(weight.nbytes for layer in int4 for weight in layer)
        rows.append({"tokens": tokens, **found, "tokens_per_s": 1e6 / found["int4"], "tb_s": size / found["int4"] / 1e6})
        print(rows[-1])
    bench.found["chain"] = rows


def attention(bench: Bench) -> None:
    """Time one layer's attention of a decoded token at several lengths, by what keys and values are stored as."""
    ops, rows = cuda_ops.ops(), []
    heads, kv_heads, head = 32, 8, 128
    for context in (64,) if bench.smoke else (2048, 8192, 32768):
        for batch in (1,) if bench.quick or bench.smoke else (1, 8):
            count = batch * -(-context // PAGE_TOKENS)
            table = torch.randperm(count, device=bench.device).view(batch, -1).int()
            where = Where(
                *(torch.full((batch,), context - 1, device=bench.device).int(), torch.arange(batch, device=bench.device).int()),
                table,
            )
            q = torch.randn(batch, heads, head, device=bench.device).bfloat16()
            contenders, sizes = {}, {}
            for kind in ("float", "int8", "int4"):
                one = LayerPages.empty(count, kv_heads, head, kind, torch.bfloat16, bench.device)
                copies = max(1, min(64, -(-4 * bench.cache_bytes // one.nbytes)))
                pages = [LayerPages.empty(count, kv_heads, head, kind, torch.bfloat16, bench.device) for _ in range(copies)]
                for part in itertools.chain(*(p[:4] for p in pages)):
                    if part is not None and part.dtype in (torch.bfloat16, torch.float32):
                        part.normal_()
                sizes[kind] = one.nbytes
                contenders[kind] = [partial(ops.attend_pages, q, *where, *p, 0.088, None, None, None) for p in pages]
            keys, values = (torch.randn(batch, kv_heads, context, head, device=bench.device).bfloat16() for _ in range(2))
            dense = partial(F.scaled_dot_product_attention, q[:, :, None], keys, values, enable_gqa=True)
            contenders["sdpa"] = [dense]  # one copy: in the second cache where it fits
            found = bench.compare(contenders)
            rates = {f"{kind}_tb_s": sizes[kind] / found[kind] / 1e6 for kind in sizes}
            rates |= {f"{kind}_of_floor": floor_us(bench, sizes[kind], 0) / found[kind] for kind in sizes}
            rows.append({"context": context, "batch": batch, **found, **rates})
            print(rows[-1])
    bench.found["attention"] = rows


def program(bench: Bench, layers: int, weights: str, head: str) -> Program:
    """Return a decoder shaped as Llama-3-8B with random weights of these kinds."""
    hidden, inner, heads, kv_heads, size, words = (
        (128, 256, 2, 1, 64, 512) if bench.smoke else (4096, 14336, 32, 8, 128, 128256)
    )

    def linear(n: int, k: int, kind: str) -> Linear:
        if kind == "bf16":
            return Linear((torch.randn(n, k, device=bench.device) / k**0.5).bfloat16(), (n, k))
        return Linear(QuantLinear(random_weight(n, k, kind, -1 if kind == "int8" else GROUP, bench.device)), (n, k))

    def tables(n: int) -> tuple[Tensor, Tensor]:
        angles = torch.arange(n)[:, None] * 500000.0 ** (-torch.arange(size // 2) / (size // 2))
        return angles.cos(), angles.sin()

    norm = Norm(False, torch.ones(hidden), None, 1e-5)
    made = []
    for _ in range(layers):
        qkv = linear((heads + 2 * kv_heads) * size, hidden, weights)
        read = Attention((qkv,), linear(hidden, heads * size, weights), heads, kv_heads, size, size**-0.5, rotary=0)
        mlp = Mlp((linear(2 * inner, hidden, weights),), linear(hidden, inner, weights), "silu")
        made.append(Layer(read, mlp, attention_in=norm, mlp_in=norm))
    embedding = torch.randn(words, hidden, device=bench.device).bfloat16()
    return Program(
        f"8B {weights}, {head} head",
        embedding,
        tuple(made),
        linear(words, hidden, head),
        norm,
        (Rotary(size, False, tables),),
    )


def decode(bench: Bench) -> None:
    """Decode with whole models of 8B's shape: tokens per second of the recorded step."""
    rows = []
    contexts = (64,) if bench.smoke else (128, 2048) if bench.quick else (128, 2048, 8192, 32768)
    for weights, head in (("bf16", "bf16"), ("int4", "bf16"), ("int4", "int8")):
        decoder = CudaDecoder(
            program(bench, 2 if bench.smoke else 32, weights, head), device=bench.device, context_tokens=contexts[-1] + 256
        )
        for context, batch in itertools.product(contexts, (1,) if bench.quick or bench.smoke else (1, 4, 8, 16, 64)):
            for kv in ("float",) if context < 8192 else ("float", "int8", "int4"):
                if context * batch > 300_000:
                    continue
                state = GraphDecoder(decoder, batch, context + 200, kv=kv)
                state._where.positions.fill_(context)  # what stands in the pages does not matter for time
                state._lengths = [context] * batch
                count = 4 if bench.smoke else 64
                state.decode(count)
                start = time.perf_counter()
                state.decode(count).cpu()
                ms = (time.perf_counter() - start) * 1e3 / count
                rows.append(
                    {"weights": weights, "head": head, "kv": kv, "context": context, "batch": batch, "ms": ms}
                    | {"tokens_per_s": batch * 1e3 / ms}
                )
                print(rows[-1])
                del state
        del decoder
    bench.found["decode"] = rows


def engine(bench: Bench) -> None:
    """Serve requests with an int4 model of 8B's shape: tokens per second as a caller sees them, prompts apart from answers."""
    rows = []
    prompt, new = (40, 4) if bench.smoke else (2048, 128)
    decoder = CudaDecoder(
        program(bench, 2 if bench.smoke else 32, "int4", "int8"), device=bench.device, context_tokens=prompt + new
    )
    words = decoder.program.tokens
    drawn = Sampling(0.8, top_k=50, top_p=0.95, seed=1)
    modes = {"greedy": (Sampling(), True), "greedy, waiting for every token": (Sampling(), False), "drawn": (drawn, True)}
    for batch, (mode, (sampling, ahead)) in itertools.product((1, 2) if bench.smoke else (1, 8, 32), modes.items()):
        limits = Limits(running=batch, kv_tokens=batch * (prompt + new + PAGE_TOKENS), step_tokens=2048)
        server = TokenEngine(CudaBackend(decoder, context_tokens=prompt + new), words, limits=limits)
        server.launches_ahead = ahead
        options = {"max_new_tokens": new, "sampling": sampling, "watch": lambda token: None}
        for _ in range(2):  # the first time records the steps
            requests = [server.submit(torch.randint(words, (prompt,)).tolist(), **options) for _ in range(batch)]
            for _ in server.run():
                pass
        begin = max(request.token_s[0] for request in requests)
        end = max(request.token_s[-1] for request in requests)
        after = sum(sum(at > begin for at in request.token_s) for request in requests)
        asked = min(request.submitted_s for request in requests)
        rows.append(
            {"batch": batch, "mode": mode}
            | {"prompt_tokens_per_s": batch * prompt / (begin - asked), "tokens_per_s": after / (end - begin)}
        )
        print(rows[-1])
    bench.found["engine"] = rows


def sample(bench: Bench) -> None:
    """Time the choice of a token by how it is drawn, beside torch's argmax and the sort that a plain top-p begins with."""
    ops, rows = cuda_ops.ops(), []
    samplings = {
        "greedy": Sampling(),
        "temperature": Sampling(0.8),
        "top_k": Sampling(0.8, top_k=50),
        "top_p": Sampling(0.8, top_p=0.95),
        "all": Sampling(0.8, top_k=50, top_p=0.95, min_p=0.02),
    }
    for batch in (1, 4) if bench.smoke else (1, 8, 64):
        logits = (3 * torch.randn(batch, 512 if bench.smoke else 128256, device=bench.device)).bfloat16()
        positions = torch.arange(batch, dtype=torch.int32, device=bench.device)
        contenders: dict[str, list[Callable[[], Any]]] = {}
        for name, sampling in samplings.items():
            draw = Draw.greedy(batch, bench.device)
            draw.set([sampling] * batch)
            contenders[name] = [partial(ops.next_tokens, logits, *draw, positions)]
        contenders |= {"argmax": [partial(logits.argmax, -1)], "sort": [partial(logits.float().sort, -1)]}
        rows.append({"batch": batch, **bench.compare(contenders)})
        print(rows[-1])
    bench.found["sample"] = rows


PARTS = {part.__name__: part for part in (machine, matmul, modes, chain, attention, sample, decode, engine)}


def main() -> None:
    """Run the parts asked for and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=[], help=f"of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--json", help="write the numbers here")
    parser.add_argument("--quick", action="store_true", help="one round, fewer sizes")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU: a check of this file")
    options = parser.parse_args()
    bench = Bench("cpu" if options.smoke else "cuda", options.smoke, options.quick, {})
    for part in options.parts or PARTS:
        print(f"== {part}")
        with torch.no_grad():
            PARTS[part](bench)
        if not options.smoke:
            torch.cuda.empty_cache()
        if options.json:
            write_json(options.json, bench.found)


if __name__ == "__main__":
    main()
