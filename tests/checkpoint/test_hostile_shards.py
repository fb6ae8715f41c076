"""GPTQ checkpoints of several files whose files, indices, groups or zero points contradict each other: one error each."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit
from quantkit import Output
from quantkit.checkpoint.read import open_checkpoint
from quantkit.errors import QuantkitError
from tests.tiny import build

INDEX = "model.safetensors.index.json"


def made(path: Path, scheme: str, format: str) -> Path:
    model = build("llama", hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)
    quantkit.quantize(model, scheme, method="rtn", output=Output(path, format=format))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkit.formats.containers.directory.MAX_FILE_BYTES", 12_000)
        return {
            "gptq": made(folder / "gptq", "w4a16-g32", "gptq"),
            "v2": made(folder / "v2", "w4a16-g32", "gptq-v2"),
            "w8": made(folder / "w8", "w8a16-g32", "gptq"),
            "zeros": made(folder / "zeros", "w4a16-asym-g32", "gptq-v2"),
        }


def files(path: Path) -> list[Path]:
    return sorted(path.glob("model-*.safetensors"))


def index_of(path: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((path / INDEX).read_text())["weight_map"]
    return found


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object], suffix: str) -> None:
    """Change the tensors of the first file that has one with a suffix."""
    for file in files(path):
        tensors = load_file(file)
        if any(name.endswith(suffix) for name in tensors):
            change(tensors)
            save_file(tensors, file, metadata={"format": "pt"})
            return


def first(tensors: dict[str, Tensor], suffix: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(suffix))


def say(path: Path, **values: object) -> None:
    """Change the config and its twin."""
    for name, place in (("config.json", "quantization_config"), ("quantize_config.json", None)):
        found = json.loads((path / name).read_text())
        (found[place] if place else found).update(values)
        (path / name).write_text(json.dumps(found))


def swap(path: Path) -> None:
    """Exchange two files without a word in the index."""
    one, two = files(path)[:2]
    one.rename(path / "x")
    two.rename(one)
    (path / "x").rename(two)


def misplace(path: Path) -> None:
    found = index_of(path)
    name = sorted(found)[0]
    found[name] = next(file for file in sorted(found.values()) if file != found[name])
    (path / INDEX).write_text(json.dumps({"weight_map": found}))


def outside(path: Path) -> None:
    found = index_of(path)
    found[sorted(found)[0]] = "../elsewhere.safetensors"
    (path / INDEX).write_text(json.dumps({"weight_map": found}))


def twice(path: Path) -> None:
    one, two = files(path)[:2]
    tensors = load_file(two)
    name, value = next(iter(load_file(one).items()))
    save_file({**tensors, name: value}, two, metadata={"format": "pt"})


def look(path: Path) -> None:
    """Read every weight."""
    with open_checkpoint(path) as opened:
        for name in opened.schemes:
            opened.qtensor(opened.contents.sites[name])


CASES: dict[str, tuple[str, Callable[[Path, dict[str, Path]], object], str]] = {
    "a file is gone": ("gptq", lambda path, _: files(path)[1].unlink(), "the file is missing"),
    "two files are exchanged": ("gptq", lambda path, _: swap(path), "should be in"),
    "an entry names another file": ("gptq", lambda path, _: misplace(path), "should be in"),
    "an entry names a file elsewhere": ("gptq", lambda path, _: outside(path), "want the name of a .safetensors file"),
    "a tensor is in two files": ("gptq", lambda path, _: twice(path), "is also in"),
    "a file is cut off": (
        "gptq",
        lambda path, _: files(path)[0].write_bytes(files(path)[0].read_bytes()[:-64]),
        "not a valid safetensors file",
    ),
    "a file of other bits": (
        "gptq",
        lambda path, all: shutil.copy(files(all["w8"])[0], files(path)[0]),
        "should be in|the config promises|is also in",
    ),
    "files of version 2 under the name of version 1": (
        "v2",
        lambda path, _: say(path, checkpoint_format="gptq", format="gptq"),
        "they are those of gptq_v2: correct checkpoint_format",
    ),
    "files of version 1 under the name of version 2": (
        "gptq",
        lambda path, _: say(path, checkpoint_format="gptq_v2", format="gptq_v2"),
        "they are those of gptq: correct checkpoint_format",
    ),
    "zero points though sym": ("zeros", lambda path, _: say(path, sym=True), "qzeros are not all 8"),
    "a g_idx that does not count": (
        "gptq",
        lambda path, _: rewrite(path, lambda found: found[first(found, "g_idx")].fill_(0), "g_idx"),
        "g_idx does not count groups",
    ),
    "zero points of another shape": (
        "zeros",
        lambda path, _: rewrite(
            path,
            lambda found: found.update({first(found, "qzeros"): found[first(found, "qzeros")][:, :-1].contiguous()}),
            "qzeros",
        ),
        "the config promises",
    ),
    "codes of another dtype": (
        "gptq",
        lambda path, _: rewrite(
            path,
            lambda found: found.update({first(found, "qweight"): found[first(found, "qweight")].to(torch.int16)}),
            "qweight",
        ),
        "the config promises",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_contradictions_are_one_error_that_says_which(sources: dict[str, Path], tmp_path: Path, case: str) -> None:
    kind, damage, words = CASES[case]
    path = tmp_path / "out"
    shutil.copytree(sources[kind], path)
    assert len(files(path)) > 2
    quantkit.load(path)
    damage(path, sources)
    with pytest.raises(QuantkitError, match=words):
        look(path)
