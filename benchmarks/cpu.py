"""quantkit on a CPU beside its peers, in one run: prefill, decode, bits, bytes, and the read bandwidth of the machine.

    python benchmarks/cpu.py prepare --llama-cpp BIN --openvino PYTHON        make the models (minutes; once)
    python benchmarks/cpu.py measure --model 1b --llama-cpp BIN ...           one slice: a model and all its peers, in turn
    python benchmarks/cpu.py table                                            the README's table, from the JSON alone

A slice is one model, all contenders loaded (each a process that sleeps when it is not its turn), measured round by round
(A B C, A B C, ...); a round also measures what the memory can give (a 1 GiB buffer in huge pages, read by as many threads).
Medians over rounds; ratios only between numbers of one slice. A contender that is not there is named with the reason.

Peers: transformers (eager, compiled), torch's int4 product swapped into every linear, torchao (``--torchao PYTHON``),
llama.cpp (``--llama-cpp``: directory of llama-bench and llama-quantize), OpenVINO GenAI (``--openvino PYTHON``), vLLM
(``--vllm PYTHON``). llama-bench reads its context anew in every process, so at context 2048 all its repetitions come from one
call in the first round. ``--only REGEX`` repeats a few contenders in a slice of their own.
"""

import argparse
import ctypes
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cpu_models as models

ROOT = Path(__file__).parent
PREFILL, CONTEXTS = 512, (128, 2048)
MEMORY_SHARE = 0.7
"""Of the memory that is free when a slice starts, what all contenders together may take."""

OURS = ("quantkit-bf16", "quantkit-int8-exact", "quantkit-int8-int8", "quantkit-int4-exact", "quantkit-int4-int8")
TORCH = ("transformers-fp32", "transformers-bf16", "transformers-fp32-compiled", "torch-int4pack")
EVERYONE = (
    *OURS,
    *(f"llama.cpp-{kind}" for kind in models.GGUF_TYPES),
    *TORCH,
    "torchao-int4",
    "torchao-int4-compiled",
    "openvino-int4",
    "vllm-bf16",
)
"""All contenders; a table names those that no slice has."""

EQUAL = {
    "llama.cpp-Q8_0": "quantkit-int8-int8",
    "quantkit-bf16": None,
    "transformers-fp32": "quantkit-bf16",
    "transformers-fp32-compiled": "quantkit-bf16",
    "transformers-bf16": "quantkit-bf16",
    "vllm-bf16": "quantkit-bf16",
}
"""The row of ours with a peer's bits; int4 with int8 activations for everyone else."""

PROBE = """
#include <stdint.h>
#include <stddef.h>
// Sums n words that are read as several streams side by side: one stream per core seldom gets all that the memory can give.
template <int STREAMS> static uint64_t read_streams(const uint64_t* p, size_t n) {
    uint64_t s[STREAMS][8] = {};
    const size_t part = n / STREAMS;
    for (size_t i = 0; i + 8 <= part; i += 8)
        for (int k = 0; k < STREAMS; ++k) {
            const uint64_t* q = p + k * part + i;
            __builtin_prefetch(q + 512);
            for (int j = 0; j < 8; ++j) s[k][j] += q[j];
        }
    uint64_t t = 0;
    for (int k = 0; k < STREAMS; ++k)
        for (int j = 0; j < 8; ++j) t ^= s[k][j];
    return t;
}
extern "C" uint64_t read_all(const uint64_t* p, size_t n, int streams) {
    return streams == 1 ? read_streams<1>(p, n) : streams == 4 ? read_streams<4>(p, n) : read_streams<8>(p, n);
}
"""


class Missing(Exception):
    """Why a contender does not take part."""


class Bandwidth:
    """Reads a buffer larger than any cache with all threads."""

    def __init__(self, threads: int, nbytes: int = 1 << 30) -> None:
        from quantkit.kernels import build
        from quantkit.kernels.cpu import huge_pages

        with tempfile.TemporaryDirectory() as folder:
            source, made = Path(folder) / "probe.cpp", Path(folder) / "probe.so"
            source.write_text(PROBE)
            flags = ["-O3", *build.ISA_FLAGS["native"], "-fPIC", "-shared"]
            subprocess.run([*build.compiler(), *flags, str(source), "-o", str(made)], check=True)
            self._read = ctypes.CDLL(str(made)).read_all
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._buffer = huge_pages.allocate(nbytes).fill_(1)
        self._threads, self._pool = threads, ThreadPoolExecutor(threads)

    def measure(self, streams: Sequence[int] = (1, 4, 8, 1, 4, 8)) -> float:
        """Return GB/s, the best of a pass with each number of streams per thread."""
        import time

        part = len(self._buffer) // self._threads // 64 * 64
        best = 0.0
        for count in streams:
            start = time.perf_counter()
            addresses = [self._buffer.data_ptr() + i * part for i in range(self._threads)]
            jobs = [self._pool.submit(self._read, address, part // 8, count) for address in addresses]
            for job in jobs:
                job.result()
            best = max(best, part * self._threads / (time.perf_counter() - start) / 1e9)
        return best


class Worker:
    """A contender of ``cpu_peers.py`` in a process of its own."""

    def __init__(self, python: str, kind: str, path: Path, threads: int) -> None:
        command = [python, str(ROOT / "cpu_peers.py"), kind, str(path), str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if not kind.startswith("quantkit"):
            environment.pop("PYTHONPATH", None)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        raise Missing(lines[-1][:200] if lines else f"it ended with status {self._process.wait()}")

    def _ask(self, **request: int) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._answer()["seconds"]  # raises with its last words
        return self._answer()["seconds"]

    def prefill(self, tokens: int) -> list[float]:
        """Return tokens per second."""
        return [tokens / self._ask(prefill=tokens)]

    def decode(self, count: int, context: int, rounds: int) -> list[float]:
        """Return the median tokens per second over ``count`` tokens."""
        return [1 / statistics.median(self._ask(decode=count, context=context))]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


class LlamaBench:
    """llama.cpp's own benchmark, a process per request."""

    def __init__(self, binaries: Path, file: Path, threads: int) -> None:
        self._command = [str(binaries / "llama-bench"), "-m", str(file), "-t", str(threads), "-o", "json", "-ngl", "0"]
        self._done: set[int] = set()
        self.facts = models.gguf_facts(file)

    def _run(self, *options: str) -> list[float]:
        done = subprocess.run([*self._command, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Missing(f"llama-bench ended with status {done.returncode}: {done.stderr.strip()[-150:]}")
        return [float(sample) for sample in json.loads(done.stdout)[0]["samples_ts"]]

    def prefill(self, tokens: int) -> list[float]:
        """Return tokens per second."""
        return self._run("-p", str(tokens), "-n", "0", "-r", "1")

    def decode(self, count: int, context: int, rounds: int) -> list[float]:
        """Return tokens per second: one sample, or all at once where the context is long (and nothing in later rounds)."""
        if context <= 512:
            return self._run("-p", "0", "-n", str(count), "-d", str(context), "-r", "1")
        if context in self._done:
            return []
        self._done.add(context)
        return self._run("-p", "0", "-n", str(count), "-d", str(context), "-r", str(rounds))

    def close(self) -> None:
        """Nothing runs between requests."""


def contenders(name: str, arguments: argparse.Namespace) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Return contender to (bytes it needs, how to start it); starting raises :class:`Missing`."""
    work, threads = Path(arguments.work), arguments.threads
    floats = work / f"{name}-bf16"
    size = float_bytes(name, arguments)
    found: dict[str, tuple[int, Callable[[], Any]]] = {}

    def worker(kind: str, python: str | None, path: Path, need: float, option: str = "") -> None:
        def start() -> Worker:
            if python is None:
                raise Missing(f"no {option} was given")
            if not path.exists():
                raise Missing(f"{path.name} is not prepared")
            return Worker(python, kind, path, threads)

        found[kind] = (int(need), start)

    def llama(kind: str) -> None:
        def start() -> LlamaBench:
            file = work / f"{name}-{kind}.gguf"
            if arguments.llama_cpp is None:
                raise Missing("no --llama-cpp was given")
            if not file.exists():
                raise Missing(f"{file.name} is not prepared")
            return LlamaBench(Path(arguments.llama_cpp), file, threads)

        found[f"llama.cpp-{kind}"] = (int(size * 0.6), start)

    for kind in OURS:
        bits = kind.split("-")[1]
        path = floats if bits == "bf16" else work / f"{name}-{bits}"
        worker(kind, sys.executable, path, size * {"bf16": 2, "int8": 0.8, "int4": 0.5}[bits])
    for kind in models.GGUF_TYPES:
        llama(kind)
    for kind in TORCH:
        worker(kind, sys.executable, floats, size * {"fp32": 2, "bf16": 1, "int4pack": 1.5}[kind.split("-")[1]])
    worker("torchao-int4", arguments.torchao, floats, size * 1.5, "--torchao")
    worker("torchao-int4-compiled", arguments.torchao, floats, size * 1.5, "--torchao")
    worker("openvino-int4", arguments.openvino, work / f"{name}-openvino", size / 2, "--openvino")
    worker("vllm-bf16", arguments.vllm, floats, size * 1.5, "--vllm")
    return {kind: how for kind, how in found.items() if re.search(arguments.only, kind)}


def float_bytes(name: str, arguments: argparse.Namespace) -> int:
    """Return the bytes of a model in 16 bits."""
    return sum(file.stat().st_size for file in (Path(arguments.work) / f"{name}-bf16").glob("*.safetensors"))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one slice."""
    name, started, missing = arguments.model, dict[str, Any](), dict[str, str]()
    from quantkit.system.memory import available_bytes

    free = (available_bytes() or 1 << 40) * MEMORY_SHARE
    probe = Bandwidth(arguments.threads)
    for kind, (need, start) in contenders(name, arguments).items():
        if need > free:
            missing[kind] = f"needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are left to it"
            continue
        try:
            started[kind] = start()
            free -= need
        except Missing as error:
            missing[kind] = str(error)
        log(f"{kind}: {missing.get(kind, 'ready')}")
    rows: dict[str, dict[str, Any]] = {
        kind: {"prefill": [], **{f"decode{c}": [] for c in arguments.contexts}} for kind in started
    }
    bandwidth = [probe.measure()]
    for number in range(arguments.rounds):
        for kind in list(started):
            try:
                measure_round(started[kind], rows[kind], arguments)
            except Missing as error:
                missing[kind] = f"failed while it was measured: {error}"
                del started[kind], rows[kind]
        bandwidth.append(probe.measure())
        log(f"round {number + 1}: read {bandwidth[-1]:.1f} GB/s; " + ", ".join(f"{k} {last(r)}" for k, r in rows.items()))
    weights = float_bytes(name, arguments) / 2
    for kind, contender in started.items():
        rows[kind] |= {**contender.facts, "bits_per_weight": contender.facts["bytes"] * 8 / weights}
        contender.close()
    return {
        "model": name,
        "taken": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "tokens": {"prefill": PREFILL, "decode": arguments.tokens, "contexts": list(arguments.contexts)},
        "read_gb_per_s": bandwidth,
        "load_average": list(os.getloadavg()),
        "rows": rows,
        "missing": missing,
    }


def measure_round(contender: Any, row: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Time a contender once at everything."""
    if not arguments.no_prefill:
        row["prefill"] += contender.prefill(PREFILL)
    for context in arguments.contexts:
        row[f"decode{context}"] += contender.decode(arguments.tokens, context, arguments.rounds)


def last(row: dict[str, Any]) -> str:
    """Show the newest figures of a row."""
    return "/".join(f"{values[-1]:.1f}" for key, values in row.items() if key.startswith(("prefill", "decode")) and values)


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cpu_name() -> str:
    """Return the processor's name and how many of its cores there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def keep(slice_: dict[str, Any], path: Path) -> None:
    """Add a slice to the JSON; one with as many contenders replaces the older one of its model."""
    from quantkit.system.files import write_json

    known = json.loads(path.read_text()) if path.exists() else {"cpu": cpu_name(), "slices": []}
    covered = slice_["rows"].keys()
    known["slices"] = [
        old
        for old in known["slices"]
        if old["model"] != slice_["model"]
        or old["tokens"]["contexts"] != slice_["tokens"]["contexts"]
        or not old["rows"].keys() <= covered
    ]
    known["slices"].append(slice_)
    write_json(path, known)


def table(known: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a Markdown table; a cell has the figure, and how many times ours of the same bits is faster."""
    contexts = sorted({context for s in known["slices"] for context in s["tokens"]["contexts"]})
    keys = ["prefill", *(f"decode{context}" for context in contexts)]
    heads = ["prefill 512", *(f"decode at {context}" for context in contexts)]
    yield f"| | {known['cpu']} | bits read per weight | file MB (bits) | " + " | ".join([*heads, "of read bandwidth"]) + " |"
    yield "|---|---|---|---|" + "---|" * (len(heads) + 1)
    for name in models.MODELS:
        slices = [s for s in known["slices"] if s["model"] == name]
        kinds = {kind: None for s in slices for kind in s["rows"]}
        for kind in kinds:
            newest = next(s for s in reversed(slices) if kind in s["rows"])
            row = newest["rows"][kind]
            bits = row["bits_per_read_weight"]
            cells = [name, kind, f"{bits:.2f}" if bits else "", f"{row['bytes'] / 1e6:.0f} ({row['bits_per_weight']:.2f})"]
            cells += [cell(slices, kind, key) for key in keys]
            yield "| " + " | ".join([*cells, share(newest, row)]) + " |"
        reasons = dict.fromkeys(EVERYONE, "not asked for") | {k: r for s in slices for k, r in s["missing"].items()}
        for kind, reason in ((kind, reason) for kind, reason in reasons.items() if kind not in kinds):
            yield f"| {name} | {kind} | | | not measured: {reason} |" + " |" * len(keys)
    yield ""
    rows = [(s["model"], kind, row) for s in known["slices"] for kind, row in s["rows"].items()]
    kl = {(name, kind): value for name, kind, row in rows if (value := row.get("kl_of_int8_activations")) is not None}
    for (name, kind), value in kl.items():
        yield f"Rounding activations alone, {name}, {kind}: KL {value:.4f} to the same weights with float activations."
    found = [statistics.median(s["read_gb_per_s"]) for s in known["slices"] if s["read_gb_per_s"]]
    yield f"Read bandwidth, medians of the slices: {min(found, default=0):.1f} to {max(found, default=0):.1f} GB/s."


def cell(slices: list[dict[str, Any]], kind: str, key: str) -> str:
    """Return the median of a contender's figure, and the ratio of ours to it in the same slice."""
    for found in reversed(slices):
        values = found["rows"].get(kind, {}).get(key)
        if not values:
            continue
        median = statistics.median(values)
        ours = found["rows"].get(EQUAL.get(kind, "quantkit-int4-int8") or "", {}).get(key)
        times = f" ({statistics.median(ours) / median:.2f}x)" if ours and not kind.startswith("quantkit") else ""
        return f"{median:.1f}{times}" if median < 100 else f"{median:.0f}{times}"
    return ""


def share(found: dict[str, Any], row: dict[str, Any]) -> str:
    """Return which part of the read bandwidth decoding at the shortest context used, weights and keys and values counted."""
    context = min(found["tokens"]["contexts"])
    values = row.get(f"decode{context}")
    if not row.get("read_bytes") or not values or not found["read_gb_per_s"]:
        return ""
    read = row["read_bytes"] + row.get("kv_bytes_per_token", 0) * context
    return f"{read * statistics.median(values) / 1e9 / statistics.median(found['read_gb_per_s']):.0%}"


def prepare(arguments: argparse.Namespace) -> None:
    """Make every model that the given peers need."""
    work = Path(arguments.work)
    for name in [arguments.model] if arguments.model else models.MODELS:
        for bits in models.SCHEMES:
            log(str(models.quantized_directory(name, bits, work)))
        for kind in models.GGUF_TYPES if arguments.llama_cpp else ():
            log(str(models.gguf_file(name, kind, work, Path(arguments.llama_cpp))))
        if arguments.openvino:
            log(str(models.openvino_directory(name, work, arguments.openvino)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "measure", "table"))
    parser.add_argument("--model", choices=models.MODELS)
    parser.add_argument("--work", default=str(Path.home() / ".cache" / "quantkit" / "benchmarks"), help="where models lie")
    parser.add_argument("--device", default=f"{platform.machine()}-{os.cpu_count()}cores", help="names the JSON")
    parser.add_argument("--json", help="instead of benchmarks/results/cpu-<device>.json")
    for peer, kind in {"llama-cpp": "DIRECTORY", "openvino": "PYTHON", "torchao": "PYTHON", "vllm": "PYTHON"}.items():
        parser.add_argument(f"--{peer}", metavar=kind)
    parser.add_argument("--only", default="", metavar="REGEX", help="contenders to measure")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="decoded in each round")
    parser.add_argument("--contexts", type=int, nargs="*", default=list(CONTEXTS))
    parser.add_argument("--no-prefill", action="store_true")
    arguments = parser.parse_args()
    path = Path(arguments.json or ROOT / "results" / f"cpu-{arguments.device}.json")
    if arguments.what == "prepare":
        prepare(arguments)
    elif arguments.what == "table":
        print("\n".join(table(json.loads(path.read_text()))))
    elif arguments.model is None:
        parser.error("measure takes one slice at a time: --model")
    else:
        keep(measure(arguments), path)
        print("\n".join(table(json.loads(path.read_text()))))


if __name__ == "__main__":
    main()
