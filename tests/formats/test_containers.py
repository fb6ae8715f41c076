"""Containers: tensors in any order, read back, continued, finished; a safetensors file has the library's bytes."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.errors import FormatError
from quantkit.formats.base import FORMATS
from quantkit.formats.containers import directory
from quantkit.formats.containers.base import UNFINISHED, Layout
from quantkit.formats.containers.tensor_file import DTYPES, TensorFile

CONTAINERS = {name: rule.container for name, rule in FORMATS}


def random_tensors(seed: int) -> dict[str, torch.Tensor]:
    """Return tensors of any dtype and shape, empty ones and scalars included, whose names sort in odd ways."""
    chance, found = random.Random(seed), {}
    for number in range(chance.randint(1, 25)):
        dtype = chance.choice(list(DTYPES.values()))
        shape = tuple(chance.randint(0, 5) for _ in range(chance.randint(0, 3)))
        size = torch.Size(shape).numel() * dtype.itemsize
        data = torch.tensor([chance.randrange(2 if dtype == torch.bool else 256) for _ in range(size)], dtype=torch.uint8)
        prefix = chance.choice(["a.", "A_", 'é"', chr(1)])
        found[f"{prefix}{number}"] = data.view(dtype).view(shape)
    return found


def layout_of(tensors: dict[str, torch.Tensor]) -> Layout:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = (x.reshape(-1).view(torch.uint8) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


@pytest.mark.parametrize("seed", range(20))
def test_a_tensor_file_has_the_bytes_of_the_library(seed: int, tmp_path: Path) -> None:
    tensors = random_tensors(seed)
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    names = list(tensors)
    random.Random(seed).shuffle(names)
    for half in (names[::2], names[1::2]):  # the second half by another writer, as after a kill
        file = TensorFile(tmp_path / "ours", layout_of(tensors))
        for name in half:
            file.write(name, tensors[name])
        file.flush()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()
    assert all(same(file.read(name), tensor) for name, tensor in tensors.items())


def test_a_tensor_file_refuses_what_has_no_place(tmp_path: Path) -> None:
    file = TensorFile(tmp_path / "x", {"a": (torch.float16, (2, 3))})
    with pytest.raises(FormatError, match=r"a is torch\.float32 \(2, 3\), its place is for torch\.float16"):
        file.write("a", torch.zeros(2, 3))
    with pytest.raises(FormatError, match=r"a is torch\.complex64; a safetensors file holds"):
        TensorFile(tmp_path / "y", {"a": (torch.complex64, (2,))})
    with pytest.raises(FormatError, match=r"cannot write .*free some space"):
        TensorFile(tmp_path / "nowhere" / "z", {"a": (torch.float32, (2,))})
    other = TensorFile(tmp_path / "x", {"a": (torch.float16, (2, 4))})  # another layout: nothing of the old file is left
    assert not other.read("a").any()
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(FormatError, match="it ends within a"):
        other.read("a")


@pytest.mark.parametrize("limit", [40, 1 << 40], ids=["files", "file"])
@pytest.mark.parametrize(
    "name", sorted(CONTAINERS.keys() - {"gguf", "onnx", "onnx-int8", "onnx-qdq"})
)  # have tests of their own
def test_a_container_gives_back_what_it_was_given(
    name: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "MAX_FILE_BYTES", limit)
    container, tensors = CONTAINERS[name], {f"t{n}.w": torch.rand(n, 3) for n in range(1, 6)}
    parts = [layout_of({key: tensor}) for key, tensor in tensors.items()]
    assert container.config(tmp_path) is None
    first = container.writer(tmp_path, parts)
    first.write({"t3.w": tensors["t3.w"]})
    first.flush()
    second = container.writer(tmp_path, parts)
    assert same(second.read("t3.w"), tensors["t3.w"])
    assert all(file.name.endswith(UNFINISHED) for file in tmp_path.iterdir())
    assert container.config(tmp_path) is None
    second.write({key: tensor for key, tensor in tensors.items() if key != "t3.w"})
    for config in ({"a": 1}, {"b": {"c": [2]}}):
        second.finish(config)
        assert container.config(tmp_path) == config
    assert not any(file.name.endswith(UNFINISHED) for file in tmp_path.iterdir())
    assert all(any(file.match(glob) for glob in container.patterns) for file in tmp_path.iterdir())
    assert (tmp_path / container.key_file).exists()
    with container.reader(tmp_path) as reader:
        assert {key: (h.dtype, h.shape) for key, h in reader.headers.items()} == layout_of(tensors)
        assert all((tmp_path / header.file).exists() for header in reader.headers.values())
        for copy in (True, False):
            assert all(same(reader.read(key, copy=copy), tensor) for key, tensor in tensors.items())
        reader.release()
    third = container.writer(tmp_path, parts)  # a finished checkpoint becomes an unfinished one
    assert container.config(tmp_path) is None
    third.write({"t1.w": torch.zeros(1, 3)})
    third.finish({})
    with container.reader(tmp_path) as reader:
        assert not reader.read("t1.w").any()
        assert same(reader.read("t5.w"), tensors["t5.w"])


def test_an_unknown_tensor_has_no_place(tmp_path: Path) -> None:
    writer = directory.SafetensorsDirectory("x").writer(tmp_path, [{"a": (torch.int8, (1,))}])
    with pytest.raises(FormatError, match="there is no place for b"):
        writer.write({"b": torch.zeros(1, dtype=torch.int8)})
