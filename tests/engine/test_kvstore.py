"""Keys and values that come back from pages, and attention over them, against plain tensors."""

import itertools
import math

import pytest
import torch

from quantkit.engine.attention import Layout, attend, by_length
from quantkit.engine.backend import Copy, Memory, Span
from quantkit.engine.kvstore import FloatPool, QuantizedPool, Reading, RowPlacement, make_pool, pool_bytes
from quantkit.engine.request import Limits
from quantkit.errors import SpecError
from quantkit.evaluation.through_cache import ThroughCache
from quantkit.generation.engine import Engine
from quantkit.generation.generate import generate
from quantkit.numerics.grid import choose_qparams, dequantize, quantize
from quantkit.spec import KV_PRESETS, KVScheme, QuantSpec, kv_preset
from tests.tiny import VOCAB, tiny_llama

CPU = torch.device("cpu")
SIZE, HEADS, DIM = 4, 2, 16
MEMORY = Memory(12, SIZE, 3)
TOKEN8 = QuantSpec("int8")
GROUP4 = QuantSpec("int4", block=(1, 8), symmetric=False)
CHANNEL4 = QuantSpec("int4", block=(-1, 1), symmetric=False)


def quantized(spec, recent=0, rotate=False) -> QuantizedPool:
    return QuantizedPool(MEMORY, HEADS, DIM, torch.float32, CPU, spec=spec, recent=recent, rotate=rotate)


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, HEADS, DIM, generator=torch.Generator().manual_seed(seed))


def write(pool, table, slot, start, values, fresh=False) -> None:
    span = Span(slot, start, [0] * len(values), table, 0, fresh)
    pool.write(RowPlacement.of([span], SIZE, CPU), values)


def read(pool, table, slot, tokens) -> torch.Tensor:
    reading = Reading(torch.tensor([list(table)]), torch.tensor([0]), torch.tensor([slot]), None)
    return pool.read(reading)[0, :tokens]


TABLE = [7, 2, 9, 4, 0]


def on_grid(values: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """What a whole page (or token) becomes, by the numerics that weights use."""
    if spec.block[0] != -1:
        return dequantize(quantize(values, *choose_qparams(values, spec), spec), *choose_qparams(values, spec), spec)
    pages = values.unflatten(0, (-1, SIZE)).transpose(1, 2)
    return (
        dequantize(quantize(pages, *choose_qparams(pages, spec), spec), *choose_qparams(pages, spec), spec)
        .transpose(1, 2)
        .flatten(0, 1)
    )


@pytest.mark.parametrize("cuts", [(17,), (1,) * 17, (3, 9, 5), (4, 4, 4, 4, 1), (16, 1)])
@pytest.mark.parametrize(
    ("spec", "recent"), [(TOKEN8, 0), (TOKEN8, 5), (GROUP4, 0), (GROUP4, 3), (CHANNEL4, 8), (CHANNEL4, 11)]
)
def test_what_comes_back_is_on_the_grid_and_the_newest_is_exact(cuts, spec, recent):
    pool, values = quantized(spec, recent), vectors(17)
    for start, end in itertools.pairwise([0, *itertools.accumulate(cuts)]):
        write(pool, TABLE, 1, start, values[start:end], fresh=start == 0)
        found, old = read(pool, TABLE, 1, end), max(end - recent, 0)
        assert torch.equal(found[old:], values[old:end])
        whole = old if spec is not CHANNEL4 else old // SIZE * SIZE
        assert torch.equal(found[:whole], on_grid(values[: (end // SIZE * SIZE if spec is CHANNEL4 else end)], spec)[:whole])
    assert (found - values).abs().max() < 0.7


def test_float_pages_come_back_as_they_were_and_runs_are_views():
    pool, values = FloatPool(MEMORY, HEADS, DIM, torch.float32, CPU), vectors(17)
    write(pool, TABLE, 0, 0, values)
    assert torch.equal(read(pool, TABLE, 0, 17), values)
    write(pool, [5, 6], 1, 0, values[:8])
    reading = Reading(torch.tensor([[5, 6]]), torch.tensor([0]), torch.tensor([1]), 5)
    run = pool.read(reading)
    assert torch.equal(run[0], values[:8])
    assert run.data_ptr() == pool.read(reading).data_ptr()  # views of the same memory


@pytest.mark.parametrize("make", [lambda: FloatPool(MEMORY, HEADS, DIM, torch.float32, CPU), lambda: quantized(TOKEN8)])
def test_a_copied_page_holds_what_it_was_copied_for_and_nothing_else(make):
    pool, values = make(), vectors(4)
    write(pool, [3], 0, 0, values)
    pool.copy([Copy(3, 8, 3)])
    assert torch.equal(read(pool, [8], 1, 3), read(pool, [3], 0, 3))
    write(pool, [8], 1, 3, vectors(1, seed=5), fresh=True)
    assert not torch.equal(read(pool, [3], 0, 4), read(pool, [8], 0, 4))
    assert torch.equal(read(pool, [3], 0, 3), read(pool, [8], 0, 3))


def test_a_page_never_shows_numbers_that_are_not_finite_to_its_next_owner():
    pool = FloatPool(MEMORY, HEADS, DIM, torch.float32, CPU)
    write(pool, [3], 0, 0, vectors(4) * math.nan)
    write(pool, [3], 0, 0, vectors(1), fresh=True)
    assert torch.isfinite(read(pool, [3], 0, 4)).all()


@pytest.mark.parametrize(("spec", "recent"), [(TOKEN8, 4), (CHANNEL4, 8)])
def test_wrong_drafts_leave_no_trace(spec, recent):
    values, wrong = vectors(20), vectors(40, seed=9) * 5
    clean, dirty = quantized(spec, recent), quantized(spec, recent)
    position = 0
    for i in range(20):
        write(clean, TABLE, 0, i, values[i : i + 1], fresh=i == 0)
    while position < 20:
        right, bad = min(1 + position % 3, 20 - position), position % 4
        bad = min(bad, 20 - position - right)
        write(dirty, TABLE, 0, position, torch.cat([values[position : position + right], wrong[:bad]]), fresh=position == 0)
        position += right
    assert torch.equal(read(clean, TABLE, 0, 20 - recent), read(dirty, TABLE, 0, 20 - recent))


def test_a_shared_page_is_read_from_its_codes_and_a_slot_forgets_its_last_owner():
    pool, values = quantized(CHANNEL4, 8), vectors(12)
    write(pool, TABLE, 0, 0, values, fresh=True)
    shared = read(pool, TABLE, 2, 8)
    write(pool, [7, 2, 1], 1, 8, values[8:10], fresh=True)
    assert torch.equal(read(pool, [7, 2, 1], 1, 8), shared)
    assert torch.equal(read(pool, [7, 2, 1], 1, 10)[8:], values[8:10])
    write(pool, [11], 0, 0, values[5:6], fresh=True)  # slot 0 gets another sequence, on other pages
    assert torch.equal(read(pool, [11, 5, 5], 0, 12)[1:], read(pool, [11, 5, 5], 2, 12)[1:])


def test_a_page_that_was_copied_in_part_is_coded_again_when_it_is_full():
    pool, values = quantized(CHANNEL4, 8), vectors(8)
    write(pool, [1], 0, 0, values[:4], fresh=True)
    copied = read(pool, [1], 2, 3)
    pool.copy([Copy(1, 6, 3)])
    write(pool, [6, 3], 1, 3, values[4:6], fresh=True)
    expected = on_grid(torch.cat([copied, values[4:5]]), CHANNEL4)
    assert torch.equal(read(pool, [6], 2, 4), expected)


@pytest.mark.parametrize("scheme", [*KV_PRESETS.values(), KVScheme(CHANNEL4, TOKEN8, 40), KVScheme(None, GROUP4, 3, True)])
@pytest.mark.parametrize("memory", [Memory(12, 16, 3), Memory(5, 8, 1)])
def test_bytes_are_as_predicted(scheme, memory):
    for spec in (scheme.key, scheme.value):
        pool = make_pool(memory, (3, 32), torch.bfloat16, CPU, spec, scheme)
        assert pool.nbytes == pool_bytes(memory, (3, 32), torch.bfloat16, spec, scheme.recent)


def test_bytes_of_a_model():
    engine = Engine(tiny_llama(), kv="int8", engine="modules", limits=Limits(running=2, kv_tokens=64))
    per_token = 2 * 2 * 2 * (16 + 2)  # layers, keys and values, heads; codes and a float16 scale
    assert engine.backend.nbytes == engine.backend.bytes_for(engine.memory) == 64 * per_token
    for engine in ("modules", "native"):
        found = Engine(tiny_llama(), engine=engine, limits=Limits(running=2, kv_tokens=64))
        assert found.backend.nbytes == found.backend.bytes_for(found.memory) == 64 * 2 * 2 * 2 * 16 * 4
    native = Engine(tiny_llama(), kv="int8", engine="native", limits=Limits(kv_tokens=64))
    assert native.backend.nbytes == native.backend.bytes_for(native.memory) == 64 * 2 * 2 * 2 * (16 + 4)


def plain_attention(query, key, value, scale, window, softcap, sinks):
    """One sequence, all positions, no tricks: query (T, heads, dim)."""
    length, heads, stacked = len(key), query.shape[1], query.shape[1] // key.shape[1]
    out = torch.zeros(length, heads, value.shape[2])
    for position in range(length):
        first = 0 if window is None else max(position - window + 1, 0)
        for head in range(heads):
            scores = key[first : position + 1, head // stacked] @ query[position, head] * scale
            scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
            scores = scores if sinks is None else torch.cat([scores, sinks[head][None]])
            weights = scores.softmax(0)[: position + 1 - first]
            out[position, head] = weights @ value[first : position + 1, head // stacked]
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(None, False), (2.0, False), (None, True)])
@pytest.mark.parametrize("rotate", [False, True])
def test_attention_over_pages_equals_attention(window, softcap, with_sinks, rotate):
    lengths, heads = (13, 6, 17), 6
    generator = torch.Generator().manual_seed(1)
    sinks = torch.randn(heads, generator=generator) if with_sinks else None
    queries, keys = ([torch.randn(n, h, DIM, generator=generator) for n in lengths] for h in (heads, HEADS))
    values = [torch.randn(n, HEADS, 8, generator=generator) for n in lengths]
    scheme = KVScheme(QuantSpec("int8"), QuantSpec("int8"), 20, rotate)  # the ring holds everything: exact
    spec = scheme.key if rotate else None
    pools = [make_pool(MEMORY, (HEADS, dim), torch.float32, CPU, spec, scheme) for dim in (DIM, 8)]
    tables = [[3, 0, 11, 6], [2, 5], [8, 9, 10, 1, 4]]
    done, found = [0, 0, 0], [[], [], []]
    for cuts in ((5, 1, 5), (1, 2, 2), (1, 1, 1), (3, 1, 7), (3, 1, 2)):
        spans = [Span(i, done[i], [0] * n, tables[i], 0, done[i] == 0) for i, n in enumerate(cuts)]
        order = by_length(spans)
        layout = Layout([spans[i] for i in order], SIZE, CPU)
        cut = lambda tensors: torch.cat([tensors[i][done[i] : done[i] + cuts[i]] for i in order])  # noqa: E731, B023
        pools[0].write(layout.rows, cut(keys))
        pools[1].write(layout.rows, cut(values))
        out = attend(cut(queries), *pools, layout, scale=0.3, window=window, softcap=softcap, sinks=sinks)
        for i, rows in zip(order, out.split([cuts[i] for i in order]), strict=True):
            found[i].append(rows)
        done = [a + b for a, b in zip(done, cuts, strict=True)]
    for i in range(3):
        want = plain_attention(queries[i], keys[i], values[i], 0.3, window, softcap, sinks)
        torch.testing.assert_close(torch.cat(found[i]), want, atol=3e-5, rtol=1e-4)


def test_answers_with_quantized_memory_do_not_depend_on_batches_or_pressure():
    model = tiny_llama()
    prompts = [torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 20, 33, 8)]
    alone = [generate(model, prompt, kv="int8", engine="modules", max_new_tokens=16).ids for prompt in prompts]
    assert [one.ids for one in generate(model, prompts, kv="int8", engine="modules", max_new_tokens=16)] == alone
    engine = Engine(model, kv="int8", engine="modules", limits=Limits(kv_tokens=64, page_tokens=4, step_tokens=8, running=3))
    requests = [engine.submit(prompt, max_new_tokens=16) for prompt in prompts]
    list(engine.run())
    assert engine.scheduler.preemptions > 0
    assert [request.ids for request in requests] == alone


@pytest.mark.parametrize(
    ("scheme", "low", "high"),
    [(kv_preset("float"), 0, 1e-5), (kv_preset("int8"), 1e-5, 0.01), (KVScheme(CHANNEL4, GROUP4, 64), 0.003, 0.15)],
)
def test_more_bits_are_nearer_to_the_float_logits(scheme, low, high):
    model, ids = tiny_llama(), torch.randint(3, VOCAB, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids).logits
    error = (ThroughCache(model, scheme)(ids) - want).norm() / want.norm()
    assert low <= error < high
    if scheme.recent:  # within the recent window nothing is rounded
        assert (ThroughCache(model, scheme)(ids[:, :60]) - want[:, :60]).norm() / want.norm() < 1e-5


def test_schemes_that_do_not_fit_are_named():
    with pytest.raises(SpecError, match=r"recent=7: .*want at least 8"):
        quantized(CHANNEL4, 7)
    with pytest.raises(SpecError, match="in=16 is not a multiple of group_size 32"):
        quantized(QuantSpec("int4", block=(1, 32)))
    with pytest.raises(SpecError, match="Hadamard matrix for 24 channels"):
        QuantizedPool(MEMORY, HEADS, 24, torch.float32, CPU, spec=TOKEN8, rotate=True)
    with pytest.raises(SpecError, match="recent=4"):
        KVScheme(recent=4)
    with pytest.raises(SpecError, match="want \\(1, n\\)"):
        KVScheme(key=QuantSpec("int4", block=(2, 2)))
    with pytest.raises(SpecError, match="did you mean 'int8'"):
        kv_preset("int9")
    assert kv_preset("int4").describe() == "keys int4 block asym, values int4 g32 asym, 64 recent in float"
