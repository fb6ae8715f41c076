"""A seeded part of the hostile GGUF files of ``python -m tests.formats.fuzz_gguf``, and what the header alone says."""

import struct
from pathlib import Path

import pytest

import quantkit
from quantkit.errors import FormatError, QuantkitError
from quantkit.hf.gguf_header import refuse_hostile
from quantkit.hf.load import load_float
from tests.formats.fuzz_gguf import attack, fields_of, small


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("gguf"), floats=True)


def test_damaged_files_are_refused_or_read() -> None:
    found = attack(60, floats=False, seed="in the tests")
    assert sum(found.values()) == 60
    assert found["refused"] > 30


def changed(file: Path, out: Path, what: str, number: int, value: int) -> Path:
    """Write a file with the ``number``-th field of a kind changed."""
    data = bytearray(file.read_bytes())
    field = [one for one in fields_of(bytes(data)) if one.what == what][number]
    struct.pack_into(f"<{field.form}", data, field.begin, value)
    out.write_bytes(data)
    return out


def with_key(file: Path, out: Path, key: str, value: int) -> Path:
    """Write a file with an integer key changed."""
    data = bytearray(file.read_bytes())
    place = data.index(key.encode()) + len(key) + 4
    struct.pack_into("<I", data, place, value)
    out.write_bytes(data)
    return out


@pytest.mark.parametrize(
    ("key", "value"),
    [("llama.block_count", 2**31 - 1), ("llama.embedding_length", 2**31), ("llama.attention.head_count", 10**6)],
)
def test_sizes_that_the_tensors_do_not_have_are_refused_before_they_are_built(
    file: Path, tmp_path: Path, key: str, value: int
) -> None:
    refuse_hostile(file)
    with pytest.raises(FormatError, match=f"{key} is {value}, and nothing in the file is larger than"):
        load_float(with_key(file, tmp_path / "hostile.gguf", key, value))


def test_a_length_beyond_the_file_allocates_nothing(file: Path, tmp_path: Path) -> None:
    for what, value in (("length of an array", 2**40), ("length of a string", 2**62), ("dimension", 2**63), ("tensors", 2**50)):
        with pytest.raises(QuantkitError):
            load_float(changed(file, tmp_path / "hostile.gguf", what, 0, value))


def test_a_file_of_anybodys_is_described(file: Path, tmp_path: Path) -> None:
    found = quantkit.inspect(file)
    assert (found["format"], found["model"]) == ("gguf", "llama")
    assert {row["describe"]: row["layers"] for row in found["schemes"]} == {"Q8_0": 16}
    assert found["quantized_bits_per_weight"] == 8.5
    assert found["metadata"]["llama.block_count"] == 2
    with pytest.raises(FormatError, match="has no checksums"):
        quantkit.inspect(file, verify=True)
    (tmp_path / "none.gguf").write_bytes(b"GGUX" + bytes(64))
    with pytest.raises(FormatError, match="no GGUF file"):
        quantkit.inspect(tmp_path / "none.gguf")
