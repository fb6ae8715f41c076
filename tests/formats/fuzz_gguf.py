"""GGUF files with one field made hostile: an error that says what is wrong, or a file that is read for what it says.

    python -m tests.formats.fuzz_gguf 3000
    python -m tests.formats.fuzz_gguf 300 --float

Every count, length, type, dimension and offset of the header is a target, as are single bits, truncations, and bytes that are
put in or taken out. A case may take neither seconds nor memory: each runs under an alarm, all of them under a limit of address
space. Without ``--float`` a file lies in a checkpoint's directory and is read by quantkit; with it, it is a float model by
itself, which other libraries read behind quantkit's own look at it.
"""

import random
import resource
import signal
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import quantkit
from quantkit import Output
from quantkit.checkpoint.read import open_checkpoint
from quantkit.errors import QuantkitError
from quantkit.hf.load import load_float
from tests.tiny import build, tiny_tokenizer

SECONDS, ROOM = 20, 3 << 30
NUMBERS = (0, 1, 2, 7, 8, 9, 31, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


class Field(NamedTuple):
    """One number of a header: what it is, where, and how it is packed."""

    what: str
    begin: int
    form: str


def fields_of(data: bytes) -> list[Field]:
    """Return every number of a header."""
    found, at = [Field("version", 4, "I"), Field("tensors", 8, "Q"), Field("keys", 16, "Q")], 24
    sizes = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

    def take(what: str, form: str) -> int:
        nonlocal at
        found.append(Field(what, at, form))
        at += struct.calcsize(f"<{form}")
        return int(struct.unpack_from(f"<{form}", data, found[-1].begin)[0])

    def skip(length: int) -> None:
        nonlocal at
        at += length

    def value(kind: int) -> None:
        if kind == 8:
            skip(take("length of a string", "Q"))
        elif kind == 9:
            inner, count = take("type in an array", "I"), take("length of an array", "Q")
            for _ in range(count):
                value(inner)
        else:
            take("value", sizes[kind])

    for _ in range(struct.unpack_from("<Q", data, 16)[0]):
        skip(take("length of a name", "Q"))
        value(take("type of a key", "I"))
    for _ in range(struct.unpack_from("<Q", data, 8)[0]):
        skip(take("length of a name", "Q"))
        for _ in range(take("dimensions", "I")):
            take("dimension", "Q")
        take("type of a tensor", "I")
        take("offset", "Q")
    return [*found, Field("end of the header", at, "B")]


def damaged(data: bytes, fields: list[Field], draw: random.Random) -> tuple[str, bytes]:
    """Return what was done, and the bytes."""
    changed, end = bytearray(data), fields[-1].begin
    kind = draw.choice(("field", "field", "field", "field", "flip", "cut", "insert", "remove", "utf8", "twice"))
    if kind == "field":
        groups = sorted({one.what for one in fields})
        field = draw.choice([one for one in fields if one.what == draw.choice(groups)] or fields)
        size = struct.calcsize(f"<{field.form}")
        old = int.from_bytes(data[field.begin : field.begin + size], "little")
        new = draw.choice((*NUMBERS, old + 1, old - 1, draw.getrandbits(8 * size))) % (1 << 8 * size)
        changed[field.begin : field.begin + size] = new.to_bytes(size, "little")
        return f"{field.what} {old} -> {new}", bytes(changed)
    place = draw.randrange(end)
    if kind == "flip":
        changed[place] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        place = draw.choice((place, draw.randrange(len(data))))
        del changed[place:]
    elif kind == "insert":
        changed[place:place] = draw.randbytes(draw.choice((1, 4, 8, 32)))
    elif kind == "remove":
        del changed[place : place + draw.choice((1, 4, 8, 32))]
    else:
        names = [one for one in fields if one.what == "length of a name"]
        spots = [one.begin + 8 for one in names]
        place, other = draw.choice(spots), draw.choice(spots)
        length = struct.unpack_from("<Q", data, place - 8)[0]
        changed[place : place + length] = b"\xff" * length if kind == "utf8" else data[other : other + length]
    return f"{kind} at {place}", bytes(changed)


def small(path: Path, *, floats: bool) -> Path:
    """Write a GGUF file of two layers in a directory."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = build("llama", head_dim=64, **sizes)
    scheme = "Q8_0" if floats else "Q4_K_M"
    quantkit.quantize(model, scheme, method="rtn", output=Output(path, format="gguf"), tokenizer=tiny_tokenizer())
    return path / "model.gguf"


@contextmanager
def in_time() -> Iterator[None]:
    """Raise a TimeoutError inside when it takes too long."""

    def stop(*args: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def look(file: Path, *, floats: bool) -> None:
    """Read everything that a file holds."""
    if floats:
        quantkit.inspect(file)
        load_float(file)
        return
    with open_checkpoint(file.parent) as opened:
        for name in opened.schemes:
            opened.qtensor(opened.contents.sites[name]).dequantize()
        for name in opened.reader.headers:
            opened.reader.read(name)


def attack(count: int, *, floats: bool, seed: str = "gguf") -> Counter[str]:
    """Damage a file ``count`` times; return how often it was refused and read.

    Raises:
        AssertionError: something else happened than one QuantkitError of one line, or a file that is read.
    """
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, patch("quantkit.hf.gguf._place", return_value=None):  # nothing is kept
        file = small(Path(folder), floats=floats)
        data, draw = file.read_bytes(), random.Random(seed)
        fields = fields_of(data)
        look(file, floats=floats)
        for index in range(count):
            what, content = damaged(data, fields, draw)
            file.write_bytes(content)
            try:
                with in_time():
                    look(file, floats=floats)
                found["read"] += 1
            except QuantkitError as error:
                if not 0 < len(str(error).strip()) < 2000:
                    raise AssertionError(f"case {index}: {what}: {str(error)[:2000]!r}") from error
                found["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"case {index}: {what}: {type(error).__name__}: {error}") from error
    return found


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    used = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    print(dict(attack(count, floats="--float" in sys.argv)))


if __name__ == "__main__":
    main()
