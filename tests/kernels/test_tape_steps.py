"""The native steps of a tape against their definition, and how stages are arranged."""

import numpy as np
import pytest
import torch

from quantkit.kernels.cpu.decoder import KvPages, NativeDecoder, Rows
from quantkit.kernels.cpu.stages import plan
from quantkit.kernels.program import run_tape
from quantkit.kernels.program.definition import Cache, Linear
from quantkit.kernels.program.run_tape import MAPS, ROWS
from quantkit.kernels.program.tape import (
    POSITION,
    TOKEN,
    Attend,
    Compute,
    Join,
    Load,
    Lookup,
    Place,
    Product,
    Read,
    Steps,
    Store,
    Tape,
)

TOKENS, WIDTH = 20, 60


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(value: int, size: int, offset: int = 0) -> Read:
    return Read(value, offset, (size,), (1,))


def tape_of(steps: list, widths: dict[int, int], result: int, caches=(), states=()) -> Tape:
    """A tape whose value 2 is a row of a random table, and whose head reads all of ``result``."""
    table = random(TOKENS, WIDTH)
    first = Lookup(table, (whole(TOKEN, 1),), 2)
    widths = {TOKEN: 1, POSITION: 1, 2: WIDTH, **widths}
    body = Steps((first, *steps), widths, whole(result, widths[result]))
    head = Linear(random(7, widths[result], seed=1), (7, widths[result]))
    return Tape("made", body, head, tuple(caches), tuple(states), TOKENS)


def native(tape: Tape, ids: list[int], pieces: tuple[int, ...] = (), threads: int = 1) -> torch.Tensor:
    decoder, kv, found, start = NativeDecoder(tape, threads=threads), KvPages(tape, 8), [], 0
    for end in (*pieces, len(ids)):
        count = end - start
        rows = Rows(ids[start:end], range(start, end), [0] * count, np.arange(8)[None], range(count))
        found.append(decoder.run(rows, kv))
        start = end
    return torch.cat(found)


def check(tape: Tape, limit: float = 3e-6) -> None:
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    want = run_tape.logits(tape, torch.tensor(ids))
    for pieces, threads in (((), 1), ((), 3), ((1, 2, 6), 2)):
        got = native(tape, ids, pieces, threads)
        assert (got - want).abs().max() <= limit * want.abs().max()
    assert torch.equal(native(tape, ids, (1, 2, 6), 2), native(tape, ids))


_TWO = "add sub mul div pow max min lt le gt ge eq ne"
OPERANDS = {"where": 3} | dict.fromkeys(_TWO.split(), 2)
POSITIVE = ("log", "sqrt", "rsqrt", "pow", "log1p", "reciprocal", "div")


def strided(op: str, operands: int) -> list[Read]:
    """Operands of shape (3, 5), each read in another order, one of them a constant."""
    constant = random(15, seed=3)
    sources = [Read(3, 2, (3, 5), (16, 3)), Read(constant, 0, (3, 5), (1, 3)), Read(2, 7, (3, 5), (0, 1))]
    if op in ("div", "pow"):
        sources[1] = Read(constant.abs() + 0.5, 0, (3, 5), (1, 3))
    if op in ("eq", "ne"):
        sources[1] = Read(3, 2, (3, 5), (16, 3))
    return sources[:operands]


@pytest.mark.parametrize("op", MAPS)
def test_maps(op):
    before = [Compute("abs" if op in POSITIVE else "copy", (whole(2, WIDTH),), 3)]
    steps = [*before, Compute(op, tuple(strided(op, OPERANDS.get(op, 1))), 4), Compute(op, tuple(_long(op)), 5)]
    steps.append(Join((whole(4, 15), whole(5, 40)), (Place(0, (1,)), Place(15, (1,))), 6))
    check(tape_of(steps, {3: WIDTH, 4: 15, 5: 40, 6: 55}, 6), 1e-5)


def _long(op: str) -> list[Read]:
    return [whole(3, 40, 4), whole(3, 40, 1), whole(3, 40)][: OPERANDS.get(op, 1)]


ALONG = {
    "sum": ((Read(3, 0, (4, 15), (15, 1)),), 4, ()),
    "amax": ((Read(3, 0, (15, 4), (1, 15)),), 15, ()),
    "amin": ((Read(3, 0, (4, 15), (15, 1)),), 4, ()),
    "softmax": ((Read(3, 0, (15, 4), (1, 15)),), 60, ()),
    "cumsum": ((Read(3, 0, (4, 15), (15, 1)),), 60, ()),
    "topk": ((Read(3, 0, (4, 15), (15, 1)),), 24, (3.0,)),
    "gather": ((Read(3, 0, (4, 15), (15, 1)), Read(torch.tensor([3.0, 14.0, 0.0]), 0, (4, 3), (0, 1))), 12, ()),
    "scatter": (
        (Read(3, 0, (4, 15), (15, 1)), Read(torch.tensor([3.0, 14.0]), 0, (4, 2), (0, 1)), Read(3, 9, (4, 2), (2, 1))),
        60,
        (1.0,),
    ),
    "contract": ((Read(3, 0, (2, 3, 10), (30, 10, 1)), Read(3, 5, (2, 4, 10), (7, 1, 4))), 24, ()),
    "norm": (
        (Read(3, 0, (4, 15), (15, 1)), Read(random(15, seed=5), 0, (15,), (1,)), Read(random(15, seed=6), 0, (15,), (1,))),
        60,
        (1e-5, 1.0),
    ),
}


@pytest.mark.parametrize("op", ROWS)
def test_operations_along_rows(op):
    reads, width, numbers = ALONG[op]
    steps = [Compute("copy", (whole(2, WIDTH),), 3), Compute(op, reads, 4, numbers)]
    check(tape_of(steps, {3: WIDTH, 4: width}, 4), 1e-5)
    if op == "contract":  # along the other axis, and without any order
        for strides in ((40, 10, 1), (0, 3, 5)):
            again = Compute(op, (reads[0], Read(3, 0, (2, 2, 10), strides)), 4)
            check(tape_of([steps[0], again], {3: WIDTH, 4: 12}, 4), 1e-5)


def attention(**options) -> Tape:
    qkv = Linear(random(2 * 12 + 12 + 8, WIDTH, seed=2) * 0.3, (44, WIDTH))
    reads = (whole(3, 24), whole(3, 12, 24), whole(3, 8, 36))
    step = Attend(reads, 4, heads=2, kv_heads=1, key_dim=12, value_dim=8, cache=0, append=True, scale=0.4, **options)
    return tape_of([Product(qkv, (whole(2, WIDTH),), 3), step], {3: 44, 4: 16}, 4, caches=[Cache(1, 12, 8)])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3},
        {"chunk": 4},
        {"softcap": 0.8},
        {"sinks": torch.tensor([0.5, -1.0])},
        {"slopes": torch.tensor([0.25, -0.1]), "window": 6},
    ],
    ids=str,
)
def test_attention(options):
    """Keys and values of different sizes; all that scores may go through."""
    tape = attention(**options)
    check(tape, 1e-5)
    if options:
        plain, ids = attention(), torch.arange(10)
        assert (run_tape.logits(tape, ids) - run_tape.logits(plain, ids)).abs().max() > 1e-3


def stateful(*, across: bool) -> Tape:
    """``s = 0.5 * f(s) + x``; f is a product if ``across``."""
    weight = Linear(random(WIDTH, WIDTH, seed=4) * 0.1, (WIDTH, WIDTH))
    steps = [Load(0, 3)]
    steps.append(Product(weight, (whole(3, WIDTH),), 4) if across else Compute("tanh", (whole(3, WIDTH),), 4))
    half = Read(torch.tensor([0.5]), 0, (WIDTH,), (0,))
    steps += [Compute("mul", (whole(4, WIDTH), half), 5), Compute("add", (whole(5, WIDTH), whole(2, WIDTH)), 6)]
    steps.append(Store(0, (whole(6, WIDTH),)))
    return tape_of(steps, dict.fromkeys((3, 4, 5, 6), WIDTH), 6, states=[WIDTH])


@pytest.mark.parametrize("across", [False, True])
def test_states_are_handed_from_token_to_token(across):
    tape = stateful(across=across)
    assert plan(tape).one_by_one == across
    check(tape)


def test_states_belong_to_slots_and_are_cleared_for_a_new_sequence():
    tape = stateful(across=False)
    decoder, kv = NativeDecoder(tape), KvPages(tape, 8, slots=3)
    rows = Rows([1, 2, 1, 2, 3], [0, 0, 1, 1, 2], [0, 1, 0, 1, 0], np.arange(8).reshape(2, 4), range(5), [2, 0])
    together = decoder.run(rows, kv)
    assert torch.equal(together[[0, 2, 4]], native(tape, [1, 1, 3]))
    assert torch.equal(together[[1, 3]], native(tape, [2, 2]))
    assert kv.states[0].abs().sum(1).bool().tolist() == [True, False, True]
    kv.clear(2)
    again = decoder.run(Rows([1], [0], [0], np.arange(8)[None], [0], [2]), kv)
    assert torch.equal(again, together[:1])
