"""How time and memory of quantizing grow with a model: random models of real shapes, one process each.

    python benchmarks/scale.py --work FOLDER --cases 7b-4:rtn 7b-32:rtn 7b-2:gptq moe-1:gptq --samples 16 --json out.json

A case is a shape, its number of blocks, and a method; ``7b-32/4:gptq`` quantizes the first 4 of 32 blocks and leaves the others
in float. ``135m`` is SmolLM2's shape, ``1b`` has hidden 2048, 8192 wide, ``3b`` hidden 3072, 8192 wide, ``7b`` is Llama's
(hidden 4096, 11008 wide), ``8b`` Llama 3's (14336 wide, 8 heads of keys), ``moe`` has 128 experts (hidden 2048, experts
768 wide, 8 of 128 chosen), ``moe64`` one of 64, ``tiny`` only tries this out.
Models are made once, in bfloat16, in shards of 2 GiB, and kept in ``--work``. Weights are random, so qualities mean nothing
and are not printed.

Processor seconds are those of :func:`quantkit.quantize`, checks, files and comparison included. Memory is the peak of the whole
process: resident (what a limit counts that knows no difference), of which anonymous (what cannot be given back), and what
``quantkit plan`` predicts. ``disk`` is the most that the run held on the disk at a time, the output's directory and nameless
files for activations together; ``target`` is what stays. ``--max-memory`` limits the runs.
Peaks are sampled every 20 ms; the resident one is the system's own.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 16},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "num_key_value_heads": 8},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "moe": {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    },
}  # fmt: skip
SHAPES["moe64"] = SHAPES["moe"] | {"num_experts": 64}
VOCABULARY, SHARD_BYTES = 32000, 2 << 30
COLUMNS = ("case", "model MB", "method", "cpu s", "wall s", "peak MiB", "anonymous MiB", "predicted MiB", "off", "disk MB")
COLUMNS = (*COLUMNS, "target MB")


def main() -> None:
    arguments = parse()
    if arguments.worker:
        print("RESULT " + json.dumps(measure(Path(arguments.worker), arguments)))
        return
    rows = []
    for case in arguments.cases:
        name, method = case.split(":")
        shape, _, first = name.partition("/")
        source = arguments.work / shape
        if not (source / "model.safetensors.index.json").exists():
            make(source, *shape.split("-"))
        options = ["--method", method, *(["--first", first] if first else []), *passed_on(arguments)]
        command = [sys.executable, __file__, "--worker", str(source), *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        row = json.loads(next(line for line in done.splitlines() if line.startswith("RESULT "))[7:])
        rows.append({"case": name, **row})
        print(" | ".join(f"{name} {value}" for name, value in zip(COLUMNS, cells(rows[-1]), strict=True)), flush=True)
    if arguments.json:
        facts = {"samples": arguments.samples, "length": arguments.length, "max_memory": arguments.max_memory}
        machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        arguments.json.write_text(json.dumps(facts | machine | {"rows": rows}, indent=2) + "\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for row in rows:
        print("| " + " | ".join(cells(row)) + " |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["1b-4:rtn", "1b-16:rtn", "1b-4:gptq"])
    parser.add_argument("--work", type=Path, default=Path("scale-work"))
    parser.add_argument("--scheme", default="w4a16")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--max-memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def passed_on(arguments: argparse.Namespace) -> list[str]:
    limit = ["--max-memory", arguments.max_memory] if arguments.max_memory else []
    return ["--scheme", arguments.scheme, "--samples", str(arguments.samples), "--length", str(arguments.length), *limit]


def cells(row: dict) -> list[str]:
    mib = [f"{row[name] / 2**20:,.0f}" for name in ("peak", "anonymous", "predicted")]
    off = f"{row['predicted'] / row['peak'] - 1:+.0%}"
    times = [f"{row[name]:.0f}" for name in ("cpu_seconds", "wall_seconds")]
    disk = [f"{row[name] / 1e6:,.0f}" for name in ("disk", "target")]
    return [row["case"], f"{row['bytes'] / 1e6:,.0f}", row["method"], *times, *mib, off, *disk]


def make(path: Path, shape: str, blocks: str) -> None:
    """Write a random model, shard by shard."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    mixture = shape.startswith("moe")
    config = AutoConfig.for_model(
        "qwen3_moe" if mixture else "llama", num_hidden_layers=int(blocks), vocab_size=VOCABULARY, dtype="bfloat16",
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, **SHAPES[shape],
    )  # fmt: skip
    config.architectures = ["Qwen3MoeForCausalLM" if mixture else "LlamaForCausalLM"]
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    config.save_pretrained(path)
    shard: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}
    torch.manual_seed(0)
    shapes = list(checkpoint_shapes(empty))
    for i, (name, size) in enumerate(shapes):
        spread = 0.02 if "embed" in name else size[-1] ** -0.5 * (0.1 if "down_proj" in name or "o_proj" in name else 1)
        value = torch.ones(size, dtype=torch.bfloat16)
        shard[name] = value if len(size) < 2 else value.normal_(0, spread)
        if i == len(shapes) - 1 or sum(one.nbytes for one in shard.values()) > SHARD_BYTES:
            file = f"part-{len(set(files.values())):05d}.safetensors"
            save_file(shard, path / file, metadata={"format": "pt"})
            files |= dict.fromkeys(shard, file)
            shard = {}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def checkpoint_shapes(model: object):
    """Yield the names that files use, and shapes; experts one by one."""
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            yield name, tuple(parameter.shape)
            continue
        stem = name.rpartition(".")[0]
        count, rows, columns = parameter.shape
        parts = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
        for expert in range(count):
            yield from ((f"{stem}.{expert}.{part}.weight", (rows // len(parts), columns)) for part in parts)


def measure(source: Path, arguments: argparse.Namespace) -> dict:
    """Quantize one model in this process."""
    import torch

    import quantkit
    from quantkit.recipe.run import plan_recipe
    from quantkit.recipe.schema import recipe_of

    out = source.parent / f"{source.name}-{arguments.method}"
    shutil.rmtree(out, ignore_errors=True)
    asked = {"samples": arguments.samples, "length": arguments.length}
    recipe = {"model": str(source), "scheme": arguments.scheme, "method": arguments.method, "output": {"path": str(out)}}
    blocks = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    left = range(blocks if arguments.first is None else arguments.first, blocks)
    rules = [{"match": f"model.layers.{index}.*", "skip": True} for index in left]
    recipe |= {"calibration": asked, "run": {"max_memory": arguments.max_memory}, "rules": rules}
    planned = plan_recipe(recipe_of(recipe))
    ids = torch.randint(3, VOCABULARY, (arguments.samples, arguments.length), generator=torch.Generator().manual_seed(0))
    seen, stop = {"anonymous": 0, "disk": 0}, threading.Event()
    watching = threading.Thread(target=watch, args=(seen, stop, out), daemon=True)
    watching.start()
    wall, cpu = time.perf_counter(), time.process_time()
    run = quantkit.Run(max_memory=arguments.max_memory)
    calibration = quantkit.Calibration(data=list(ids.split(8)))
    ruled = [quantkit.Rule(**rule) for rule in rules]
    settings = {"method": arguments.method, "rules": ruled, "calibration": calibration, "run": run}
    quantkit.quantize(source, arguments.scheme, out=out, **settings)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    stop.set()
    watching.join()
    found = {"method": arguments.method, "bytes": sum(file.stat().st_size for file in source.glob("*.safetensors"))}
    found["target"] = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    peak = memory("VmHWM")  # not from rusage, which also knows the process that started this one
    shutil.rmtree(out)
    return found | seen | {"cpu_seconds": cpu, "wall_seconds": wall, "peak": peak, "predicted": planned.estimate.peak_bytes}


def memory(what: str) -> int:
    """Return one of the system's figures of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def nameless() -> int:
    """Return the bytes of mapped files that have no name any more: activations."""
    sizes: dict[str, int] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("(deleted)") and "/.quantkit-" in line:
            addresses, _, offset, _, inode, *_ = line.split()
            start, end = (int(one, 16) for one in addresses.split("-"))
            sizes[inode] = max(sizes.get(inode, 0), int(offset, 16) + end - start)
    return sum(sizes.values())


def watch(seen: dict[str, int], stop: threading.Event, out: Path) -> None:
    """Note peaks until told to stop."""
    turns = 0
    while not stop.is_set():
        seen["anonymous"] = max(seen["anonymous"], memory("RssAnon"))
        if turns % 50 == 0:
            with contextlib.suppress(OSError):  # a file went between being found and looked at
                held = sum(f.stat().st_blocks * 512 for f in out.rglob("*") if f.is_file()) + nameless()
                seen["disk"] = max(seen["disk"], held)
        turns += 1
        time.sleep(0.02)


if __name__ == "__main__":
    main()
