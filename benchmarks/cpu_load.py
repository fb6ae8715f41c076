"""How long a checkpoint takes to load, and what it holds at most: ``python benchmarks/cpu_load.py DIRECTORY``.

Every way of loading runs in a process of its own, after all imports: without the cache, with an empty cache (which is
filled), and twice with what is there (the first of the two compares the digest of the whole file, the second remembers it).
Memory is the peak of resident memory over what the process had before, keys and values of the engine taken off, in units of
the size of the files.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WAYS = ("no cache", "empty cache", "second load", "third load")
CONTEXT = 128


def status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def load(path: str, cache: bool) -> dict[str, Any]:
    """Load, generate a token, and say what it took."""
    import torch

    from quantkit import checkpoint
    from quantkit.engine.backend import OneSequence
    from quantkit.hf.backend import make_backend
    from quantkit.kernels import build

    build.library()
    torch.ones(8, 8) @ torch.ones(8, 8)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = status("VmRSS"), time.perf_counter()
    model: Any = checkpoint.load(path, cache=cache)
    loaded, after_load = time.perf_counter() - start, status("VmHWM") - before
    backend: Any = make_backend(model, engine="native", compute="int8")
    step = OneSequence(backend, CONTEXT)
    int(step([7], 0).argmax())
    first = time.perf_counter() - start
    peak, now = status("VmHWM") - before, status("VmRSS") - before
    return {
        "load_s": loaded,
        "first_token_s": first,
        "load_peak_bytes": after_load,
        "peak_bytes": peak - backend.nbytes,
        "resident_bytes": now - backend.nbytes,
        "before_bytes": before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--json")
    parser.add_argument("--one", choices=("cache", "none"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(load(arguments.path, arguments.one == "cache")))
        return
    size = sum(file.stat().st_size for file in Path(arguments.path).glob("*.safetensors"))
    found = {}
    with tempfile.TemporaryDirectory(dir=Path(arguments.path).parent) as cache:
        for way in WAYS:
            command = [sys.executable, __file__, arguments.path, "--one", "none" if way == "no cache" else "cache"]
            kernels = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "quantkit" / "kernels"
            (Path(cache) / "quantkit").mkdir(exist_ok=True)
            if not (Path(cache) / "quantkit" / "kernels").exists():
                (Path(cache) / "quantkit" / "kernels").symlink_to(kernels)
            environment = {**os.environ, "XDG_CACHE_HOME": cache}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            row = found[way] = json.loads(done.stdout.splitlines()[-1])
            peak, alone, then = (row[f"{key}_bytes"] / size for key in ("peak", "load_peak", "resident"))
            times = f"load {row['load_s']:.2f} s, first token {row['first_token_s']:.2f} s"
            memory = f"peak {peak:.2f}x of the {size / 1e6:.0f} MB file (loading alone {alone:.2f}x), then {then:.2f}x"
            print(f"{way:12} {times}; {memory}", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"bytes": size, "ways": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
