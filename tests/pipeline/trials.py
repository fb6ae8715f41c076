"""Runs that are killed, two runs into one directory, many loads at once: nothing is lost, and the same command goes on.

    python -m tests.pipeline.trials kills 100
    python -m tests.pipeline.trials sweeps 20
    python -m tests.pipeline.trials trainings 20
    python -m tests.pipeline.trials races 50
    python -m tests.pipeline.trials loads 20

Every run is the command line itself in a process of its own, of a recipe that calibrates with GPTQ and evaluates. A trial ends
with the weights that an undisturbed run writes, byte for byte, or it is wrong and is printed; a sweep with the same table.
"""

import contextlib
import functools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

import quantkit
import quantkit.recipe.run
import quantkit.report  # what a child needs is imported before it is forked
from quantkit.cli import app
from quantkit.hf.load import PreTrainedModel
from quantkit.system.files import sha256_file
from tests.tiny import TEXT, tiny_llama, tiny_tokenizer

Trial = Callable[[Path, random.Random], tuple[str, str | None]]
"""Takes a directory with a float model in ``model``; returns what happened, and what is wrong with it if anything is."""

BUSY = "is at work there"
SEARCHED = {"budget": "5.4 bpw", "choices": ["w3a16-asym-g32", "w4a16-asym-g32", "w8a16-g32"]}
SCHEMES: dict[str, Any] = {"w4a16-asym": "w4a16-asym", "w8a16": "w8a16", "searched": SEARCHED}
COLUMNS = ("name", "status", "bits", "bytes", "kl", "perplexity", "top1", "statistics", "reason")
"""Columns of a sweep's table that do not depend on the machine's mood."""


def prepare(place: Path) -> None:
    """Write a float model of four blocks, its tokenizer and a text."""
    model = tiny_llama(num_hidden_layers=4, attention_bias=True)
    model.save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    (place / "text.txt").write_text(TEXT * 8)


def recipe(place: Path, out: Path, *, scheme: str = "w4a16-asym", overwrite: bool = False) -> Path:
    """Write a recipe of the model in ``place`` to ``out``, both relative to it, and return its file."""
    text = "text.txt"
    values = {
        "model": "./model",
        "scheme": SCHEMES[scheme],
        "method": "gptq",
        "steps": ["bias-correction"],
        "calibration": {"data": text, "samples": 8, "length": 64},
        "output": {"path": f"./{out.name}", "overwrite": overwrite},
        "evaluate": {"data": text, "windows": 2, "length": 32},
    }
    file = place / f"{out.name}-{scheme}-{overwrite}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def start(file: Path, log: Path, command: str = "run") -> int:
    """Run ``quantkit run``, or another command, in a child: a fork, because starting Python anew takes longer than the run."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(file.parent)
        torch.set_num_threads(1)
        app([command, str(file)])
    except SystemExit as error:
        status = int(error.code or 0)
    finally:
        os._exit(status)


def finish(child: int) -> int:
    """Wait for a child; return its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def weights(path: Path) -> dict[str, str]:
    """Return the checksums of a checkpoint's files, but its measurement, in which seconds stand."""
    skip = ("evaluation.json", "README.md", "quantkit.json", "search.json", ".quantkit.lock")
    return {file.name: sha256_file(file) for file in sorted(path.iterdir()) if file.is_file() and file.name not in skip}


@functools.cache
def undisturbed(scheme: str) -> tuple[dict[str, str], float]:
    """Return the checksums of what a recipe gives when nothing happens, and the seconds it takes."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        prepare(place)
        began = time.monotonic()
        code = finish(start(recipe(place, place / "out", scheme=scheme), place / "log"))
        took = time.monotonic() - began
        if code:
            raise RuntimeError(f"the recipe alone fails: {(place / 'log').read_text()}")
        return weights(place / "out"), took


def complaint(out: Path, scheme: str, code: int, log: Path) -> str | None:
    """Return what is wrong with a run that has come to its end."""
    if code:
        return f"exit {code}: {log.read_text()[-600:]}"
    if not (out / "evaluation.json").is_file():
        return "no measurement"
    wanted, _ = undisturbed(scheme)
    found = weights(out)
    if found != wanted:
        return f"other files: {sorted(set(found.items()) ^ set(wanted.items()))}"
    inside = sorted(file.name for file in out.iterdir() if file.is_dir())
    return f"left behind: {inside}" if inside else None


def kill(place: Path, draw: random.Random) -> tuple[str, str | None]:
    """Kill a run up to three times at random moments, some over another checkpoint; then let the same command end."""
    out, log, scheme = place / "out", place / "log", draw.choice(list(SCHEMES))
    _, took = undisturbed(scheme)
    over = draw.random() < 0.5
    if over:  # another checkpoint lies there already
        finish(start(recipe(place, out, scheme="w8a16" if scheme == "w4a16-asym" else "w4a16-asym"), log))
    file = recipe(place, out, scheme=scheme, overwrite=over)
    killed = kill_some(file, log, took, draw)
    code = finish(start(file, log))
    return f"{scheme}, {'over another' if over else 'fresh'}, killed {killed}", complaint(out, scheme, code, log)


def kill_some(file: Path, log: Path, took: float, draw: random.Random, command: str = "run") -> int:
    """Start a command one to three times, and kill it at a random moment; return how often it was still there."""
    killed = 0
    for _ in range(draw.randrange(1, 4)):
        child = start(file, log, command)
        # half anywhere, half in the last part, where files are published, cleared and measured
        time.sleep(took * (draw.random() if draw.random() < 0.5 else 0.5 + 0.5 * draw.random()))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        killed += finish(child) == -signal.SIGKILL
    return killed


def sweep_recipe(place: Path) -> Path:
    """Write a sweep of the model in ``place`` with a row that is searched, and return its file."""
    values = {
        "model": "./model",
        "schemes": ["w4a16-asym-g32", "w8a16-g32"],
        "quantizers": ["rtn", "gptq"],
        "budgets": [SEARCHED["budget"]],
        "choices": SEARCHED["choices"],
        "calibration": {"data": "text.txt", "samples": 8, "length": 64},
        "evaluate": {"data": "text.txt", "windows": 2, "length": 32},
        "output": {"path": "./sweep"},
    }
    file = place / "sweep.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def sweep_table(place: Path) -> list[tuple[Any, ...]]:
    """Return what a sweep has found."""
    rows = quantkit.SweepResult.load(place / "sweep").rows
    return [tuple(getattr(row, name) for name in COLUMNS) for row in rows]


@functools.cache
def undisturbed_sweep() -> tuple[list[tuple[Any, ...]], float]:
    """Return the table of the sweep when nothing happens, and the seconds it takes."""
    with own_place() as place:
        began = time.monotonic()
        if finish(start(sweep_recipe(place), place / "log", "sweep")):
            raise RuntimeError(f"the sweep alone fails: {(place / 'log').read_text()}")
        return sweep_table(place), time.monotonic() - began


def kill_sweep(place: Path, draw: random.Random) -> tuple[str, str | None]:
    """Kill a sweep up to three times at random moments; then let the same command end."""
    wanted, took = undisturbed_sweep()
    file, log = sweep_recipe(place), place / "log"
    killed = kill_some(file, log, took, draw, "sweep")
    if code := finish(start(file, log, "sweep")):
        return f"killed {killed}", f"exit {code}: {log.read_text()[-600:]}"
    found = sweep_table(place)
    return f"killed {killed}", None if found == wanted else f"another table: {found}"


TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "blocks, adapters": {"block_steps": 6, "adapters": 4},
    "stored": {"teacher": "stored", "top_k": 32},
    "hidden": {"hidden": 0.3, "learn_zero": True},
}
"""Kinds of training, as the section ``train`` of a recipe; a state is written after every update."""


def training_recipe(place: Path, kind: str) -> Path:
    """Write a recipe that trains the model in ``place``, and return its file."""
    settings = {"steps": 8, "windows": 2, "evaluate_every": 4, "held_out": 2, "rate": 0.05, "save_every_s": 0.0}
    values = {
        "model": "./model",
        "scheme": "w3a16-asym-g32",
        "method": "gptq",
        "train": {**settings, **TRAININGS[kind]},
        "calibration": {"data": "text.txt", "samples": 8, "length": 64},
        "output": {"path": "./out"},
    }
    file = place / f"training-{kind}.yaml".replace(", ", "-")
    file.write_text(yaml.safe_dump(values))
    return file


@functools.cache
def undisturbed_training(kind: str) -> tuple[dict[str, str], float]:
    """Return the checksums of what a training gives when nothing happens, and the seconds it takes."""
    with own_place() as place:
        began = time.monotonic()
        if finish(start(training_recipe(place, kind), place / "log", "train")):
            raise RuntimeError(f"the training alone fails: {(place / 'log').read_text()}")
        return weights(place / "out"), time.monotonic() - began


def kill_training(place: Path, draw: random.Random) -> tuple[str, str | None]:
    """Kill a training up to three times at random moments, fresh and continued; then let the same command end."""
    kind = draw.choice(list(TRAININGS))
    wanted, took = undisturbed_training(kind)
    file, log = training_recipe(place, kind), place / "log"
    killed = kill_some(file, log, took, draw, "train")
    said = f"{kind}, killed {killed}"
    if code := finish(start(file, log, "train")):
        return said, f"exit {code}: {log.read_text()[-600:]}"
    if (place / "out/training").exists():
        return said, "the state of training is left behind"
    found = weights(place / "out")
    return said, None if found == wanted else f"other files: {sorted(set(found.items()) ^ set(wanted.items()))}"


def race(place: Path, draw: random.Random) -> tuple[str, str | None]:
    """Start two runs into one directory, 0 to 0.2 s apart, of one recipe or of two."""
    out, logs = place / "out", [place / "log0", place / "log1"]
    same, over = draw.random() < 0.5, draw.random() < 0.5
    schemes = ["w4a16-asym", "w4a16-asym" if same else "w8a16"]
    if over:
        finish(start(recipe(place, out, scheme="w4a16-asym"), logs[0]))
    files = [recipe(place, out, scheme=scheme, overwrite=over) for scheme in schemes]
    children = []
    for file, log in zip(files, logs, strict=True):
        children.append(start(file, log))
        time.sleep(draw.random() * 0.2)
    codes = [finish(child) for child in children]
    said = [log.read_text() for log in logs]
    label = f"{'same' if same else 'other'} recipe{', overwrite' if over else ''}: {sorted(codes)}"
    for code, text in zip(codes, said, strict=True):
        refused = BUSY in text or "already holds a model" in text
        if code and not (code == 2 and refused):
            return label, f"exit {code}: {text[-600:]}"
    winners = [scheme for scheme, code in zip(schemes, codes, strict=True) if code == 0]
    if not winners:
        return label, f"nobody wrote: {said}"
    holds = [one for one in winners if complaint(out, one, 0, logs[0]) is None]
    if not holds:
        return label, complaint(out, winners[-1], 0, logs[0])
    for file, scheme, code in zip(files, schemes, codes, strict=True):
        if code and (same or over):  # the one who was sent away gives the command again
            return label, complaint(out, scheme, finish(start(file, logs[0])), logs[0])
    return label, None


def loads(place: Path, draw: random.Random) -> tuple[str, str | None]:
    """Load a checkpoint and its float model in eight threads at once: all the same, and nothing of torch is changed."""
    out = place / "out"
    if code := finish(start(recipe(place, out), place / "log")):
        return "not written", f"exit {code}"
    ids = torch.arange(3, 19).unsqueeze(0)
    found: dict[int, torch.Tensor | BaseException] = {}

    def one(number: int, wait_s: float) -> None:
        time.sleep(wait_s)
        try:
            model: PreTrainedModel = quantkit.load(out) if number % 4 else quantkit.open_model(str(place / "model"))[0]
            with torch.no_grad():
                found[number] = model(ids).logits
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=one, args=(number, draw.random() * 0.05)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [repr(value) for value in found.values() if isinstance(value, BaseException)]
    if failed or len(found) != 8:
        return "failed", "; ".join(failed)
    for number, logits in found.items():
        if not torch.equal(logits, found[number % 4 > 0]):  # type: ignore[arg-type]
            return "differ", "threads give different logits"
    if torch.nn.Linear(2, 2).weight.is_meta:
        return "patched", "a plain layer lands on the meta device"
    return "equal", None


TRIALS: dict[str, Trial] = {"kills": kill, "sweeps": kill_sweep, "trainings": kill_training, "races": race, "loads": loads}


@contextlib.contextmanager
def own_place() -> Iterator[Path]:
    """Yield a new directory with a float model."""
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory))
        yield Path(directory)


def main(kind: str, count: int) -> int:
    """Carry out ``count`` trials and print what was found; return how many were wrong."""
    tally: Counter[str] = Counter()
    wrong = []
    for seed in range(count):
        with own_place() as place:
            happened, bad = TRIALS[kind](place, random.Random(seed))
        tally[happened] += 1
        if bad:
            wrong.append(f"{kind} {seed}: {happened}: {bad}")
            print(wrong[-1], flush=True)
    print(json.dumps(dict(sorted(tally.items())), indent=1), f"{len(wrong)} of {count} wrong", sep="\n")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1], int(sys.argv[2])), 100))
