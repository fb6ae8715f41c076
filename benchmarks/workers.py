"""How the processor time of a run is divided among workers, and whether their codes are the same.

    python benchmarks/workers.py MODEL --work FOLDER --sizes 1 2 4 --samples 32 --json out.json

For every number of workers the model is quantized by as many processes of one thread each, as ``torchrun`` would start them.
``blocks`` is the processor time between the first and the last quantized layer, of the busiest worker, and ``share`` that of
one worker alone divided by it: the gain in time if each had a core to itself and waited for nobody. ``whole`` is the whole
run of the first worker, which also checks, writes, reads back and compares. ``differ`` counts bytes of the checkpoint that
are not those of the first row. Text is random tokens, so qualities mean nothing and are not printed.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

COLUMNS = ("workers", "blocks cpu s", "of each", "share", "whole cpu s", "differ")


def main() -> None:
    arguments = parse()
    if arguments.worker:
        print("RESULT " + json.dumps(measure(arguments)))
        return
    rows, first = [], b""
    for size in arguments.sizes:
        out = arguments.work / f"workers-{size}"
        shutil.rmtree(out, ignore_errors=True)
        found = run(arguments, size, out)
        written = b"".join(file.read_bytes() for file in sorted(out.glob("*.safetensors")))
        first = first or written
        differ = sum(a != b for a, b in zip(first, written, strict=True)) if first != written else 0
        blocks = [one["blocks"] for one in found]
        rows.append({"workers": size, "blocks": blocks, "whole": found[0]["whole"], "differ": differ, "bytes": len(written)})
        shutil.rmtree(out)
        print(rows[-1], flush=True)
    if arguments.json:
        asked = {"model": arguments.model.name, "samples": arguments.samples, "length": arguments.length}
        machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        arguments.json.write_text(json.dumps(asked | machine | {"method": arguments.method, "rows": rows}, indent=2) + "\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for row in rows:
        busiest = max(row["blocks"])
        each = ", ".join(f"{one:.1f}" for one in row["blocks"])
        share = f"{max(rows[0]['blocks']) / busiest:.2f}"
        print(f"| {row['workers']} | {busiest:.1f} | {each} | {share} | {row['whole']:.1f} | {row['differ']} |")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, default=Path("scale-work"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--scheme", default="w4a16")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(arguments: argparse.Namespace, size: int, out: Path) -> list[dict]:
    """Start the workers, and return what each has measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(out)]
    processes = [
        subprocess.Popen(command, env=base | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True) for rank in range(size)
    ]
    said = [one.communicate()[0] for one in processes]
    if any(one.returncode for one in processes):
        raise SystemExit(f"{size} workers ended with {[one.returncode for one in processes]}")
    return [json.loads(next(line for line in text.splitlines() if line.startswith("RESULT "))[7:]) for text in said]


def measure(arguments: argparse.Namespace) -> dict:
    """Quantize with the other workers."""
    import torch
    from transformers import AutoConfig

    import quantkit
    from quantkit.system.workers import launched

    torch.set_num_threads(1)
    vocabulary = AutoConfig.from_pretrained(arguments.model).vocab_size
    shape = (arguments.samples, arguments.length)
    ids = torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(0))
    times: list[float] = []

    def progress(event: quantkit.Progress) -> None:
        if event.stage == "quantize":
            times.append(time.process_time())

    with launched() as workers:
        begin = time.process_time()
        quantkit.quantize(
            arguments.model,
            arguments.scheme,
            out=arguments.worker,
            method=arguments.method,
            calibration=quantkit.Calibration(data=list(ids.split(4))),
            run=quantkit.Run(workers=workers, progress=progress),
        )
        return {"blocks": times[-1] - times[0], "whole": time.process_time() - begin}


if __name__ == "__main__":
    main()
