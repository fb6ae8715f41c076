"""Every ordered pair of formats that share a grid: there, the same numbers; and back, the same bytes.

``awq`` has no symmetric grid: what comes back from it is the same numbers on an asymmetric one.
"""

import itertools
from pathlib import Path

import pytest
import torch

import quantkit
from quantkit import Output, reformat
from quantkit.checkpoint.read import open_checkpoint
from quantkit.formats.base import FORMATS
from tests.tiny import tiny_llama, tiny_tokenizer

pytest.importorskip("onnx")

ZEROS = ("compressed-tensors", "gptq-v2", "mlx", "native", "onnx", "onnx-int8", "onnx-qdq")
SHARED = {
    "w4a16-g32": (*ZEROS, "awq", "gguf", "gptq"),
    "w8a16-g32": (*ZEROS, "gguf", "gptq"),
    "w4a16-asym-g32": (*ZEROS, "awq"),
    "fp8-dynamic": ("compressed-tensors", "modelopt", "native"),
    "nvfp4": ("compressed-tensors", "modelopt", "native"),
}
"""Formats by the grid that they share; others hold none of it, or as blocks of another grid."""

RENAMED = {("w4a16-g32", "awq")}
"""Grids that a format holds under another name: the way back from it ends in other bytes, which stand for the same numbers."""

OTHERS = {"bitsandbytes", "float"}
"""One is only read, the other holds no codes."""
CASES = [(scheme, one) for scheme, formats in SHARED.items() for one in formats]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """One model on every grid, in every format that holds it."""
    folder, found = tmp_path_factory.mktemp("pairs"), {}
    for scheme, formats in SHARED.items():
        model = tiny_llama(num_hidden_layers=1)
        outputs = [Output(folder / scheme / name, format=name) for name in formats]
        quantkit.quantize(model, scheme, method="rtn", output=outputs, tokenizer=tiny_tokenizer())
        found |= {(scheme, name): folder / scheme / name for name in formats}
    return found


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Return what the codes of every layer stand for."""
    with open_checkpoint(path) as opened:
        return {name: opened.qtensor(opened.contents.sites[name]).dequantize(torch.float32) for name in opened.schemes}


def stored(path: Path) -> dict[str, bytes]:
    """Return the files that hold tensors."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.suffix in {".gguf", ".safetensors"}}


@pytest.mark.parametrize(("scheme", "source"), CASES)
def test_conversion_keeps_every_number_and_the_way_back_every_byte(
    tmp_path: Path, first: dict[tuple[str, str], Path], scheme: str, source: str
) -> None:
    own = first[scheme, source]
    want = weights(own)
    for to in SHARED[scheme]:
        if to == source:
            continue
        result = reformat(own, to, tmp_path / to)
        assert (result["from"], result["format"], result["rounded"]) == (source, to, [])
        got = weights(tmp_path / to)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], weight) for name, weight in want.items()), to
        reformat(tmp_path / to, source, tmp_path / f"{to}-back")
        if (scheme, to) in RENAMED:
            back = weights(tmp_path / f"{to}-back")
            assert all(torch.equal(back[name], weight) for name, weight in want.items()), to
        else:
            assert stored(tmp_path / f"{to}-back") == stored(own), to


def test_no_pair_is_left_out() -> None:
    """A format that is added is in a row above, or says why it shares nothing."""
    pairs = {pair for formats in SHARED.values() for pair in itertools.permutations(formats, 2)}
    known = {name for pair in pairs for name in pair}
    assert known | OTHERS == set(FORMATS.names())
    apart = set(itertools.permutations(known, 2)) - pairs
    assert {frozenset(pair) for pair in apart} == {
        frozenset(("modelopt", other)) for other in known - {"modelopt", "compressed-tensors", "native"}
    }  # float codes alone beside integers alone
