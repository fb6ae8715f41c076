"""The native decoder against the program's definition, and what a scheduler relies on: a row's bits are its own."""

import functools
import multiprocessing
import threading

import numpy as np
import pytest
import torch

from quantkit.errors import KernelError
from quantkit.hf.lowering.lower import lower
from quantkit.hf.structure import describe
from quantkit.kernels import build
from quantkit.kernels.cpu.decoder import CHUNK_TOKENS, PAGE_TOKENS, KvPages, NativeDecoder, Rows
from quantkit.kernels.program import reference
from quantkit.nn.install import install
from quantkit.nn.sites import read_weight
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec
from tests.tiny import FAMILIES, VOCAB, tiny_llama

CLAIMED = [name for name in FAMILIES if name not in ("gpt2", "gpt_neox", "opt", "falcon", "gpt_oss")]
"""Families of standard layers; the others are tapes, see test_tape_steps.py."""


def quantize(model, spec: QuantSpec):
    """Round every site of a model to ``spec``, in place."""
    for site in describe(model).sites:
        round_site(model, site, spec)
    return model


def round_site(model, site, spec: QuantSpec) -> None:
    weight = read_weight(model, site).float()
    scale, zero = grid.choose_qparams(weight, spec)
    install(model, site, GridTensor.from_codes(grid.quantize(weight, scale, zero, spec), scale, zero, spec))


@functools.cache
def program_of(family: str, **options):
    return lower(FAMILIES[family](**options))


def some_ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def rows_of(ids: list[int], start: int = 0, slot: int = 0, table=None, logit_rows=None) -> Rows:
    table = np.arange(64)[None] if table is None else table
    count = len(ids)
    return Rows(ids, range(start, start + count), [slot] * count, table, range(count) if logit_rows is None else logit_rows)


def read(decoder: NativeDecoder, ids: list[int], pieces: list[int] | None = None, **options) -> torch.Tensor:
    """Read a sequence in pieces that end at the given lengths; logits of every row."""
    kv = KvPages(decoder.program, 64, dtype=options.pop("kv", "float32"))
    found, start = [], 0
    for end in [*(pieces or []), len(ids)]:
        found.append(decoder.run(rows_of(ids[start:end], start), kv, **options))
        start = end
    return torch.cat(found)


def assert_close(got: torch.Tensor, want: torch.Tensor, relative: float) -> None:
    assert (got - want).abs().max() <= relative * want.abs().max()


@pytest.mark.parametrize("family", CLAIMED)
def test_logits_are_the_definitions(family):
    program, ids = program_of(family), some_ids(40)
    assert_close(read(NativeDecoder(program), ids), reference.logits(program, torch.tensor(ids)), 3e-6)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "olmo2", "mixtral"])
@pytest.mark.parametrize("exact", [True, False], ids=["float", "int8"])
def test_a_row_gives_the_same_bits_in_any_pieces_and_on_any_number_of_threads(family, exact):
    ids, pieces = some_ids(50), [1, 2, 3, 7, 12, 13, 40, 44]
    program = lower(quantize(FAMILIES[family](), QuantSpec("int4", (1, 32)))) if family != "mixtral" else program_of(family)
    for kv in ("float32", "int8"):
        whole = read(NativeDecoder(program, threads=1), ids, exact=exact, kv=kv)
        for threads in (1, 2, 3):
            decoder = NativeDecoder(program, threads=threads)
            assert torch.equal(read(decoder, ids, pieces, exact=exact, kv=kv), whole)
        assert torch.equal(read(NativeDecoder(program, threads=2), ids, list(range(1, 50)), exact=exact, kv=kv), whole)


def test_ragged_sequences_of_a_batch_equal_each_alone():
    program = program_of("mistral")
    decoder = NativeDecoder(program, threads=2)
    prompts = [some_ids(length, seed=length) for length in (1, 37, 8, 33, 64, 5)]
    alone = [read(decoder, prompt) for prompt in prompts]
    pages = torch.randperm(40, generator=torch.Generator().manual_seed(3)).tolist()
    table = np.full((8, 4), -1)  # slots 6 and 7 are nobody's
    slots = [5, 0, 3, 1, 4, 2]
    for slot, prompt in zip(slots, prompts, strict=True):
        for page in range(-(-len(prompt) // PAGE_TOKENS)):
            table[slot, page] = pages.pop()
    kv = KvPages(program, 40)
    done = [0] * len(prompts)
    while any(d < len(p) for d, p in zip(done, prompts, strict=True)):
        tokens, positions, where, owners = [], [], [], []
        for i, prompt in enumerate(prompts):
            count = min(1 + 2 * i, len(prompt) - done[i])
            tokens += prompt[done[i] : done[i] + count]
            positions += range(done[i], done[i] + count)
            where += [slots[i]] * count
            owners += [(i, done[i] + j) for j in range(count)]
            done[i] += count
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(len(tokens))).tolist()
        logits = decoder.run(Rows(tokens, positions, where, table, order), kv)
        for row, line in zip(order, logits, strict=True):
            i, position = owners[row]
            assert torch.equal(line, alone[i][position])


def test_contexts_longer_than_chunks_and_windows():
    length = 2 * CHUNK_TOKENS + 40
    for window in (None, CHUNK_TOKENS + 9):
        model = FAMILIES["mistral"](sliding_window=window, max_position_embeddings=512)
        program, ids = lower(model), some_ids(length)
        want = reference.logits(program, torch.tensor(ids))
        for pieces in ([], [length - 3, length - 2, length - 1], [100, 200]):
            assert_close(read(NativeDecoder(program, threads=2), ids, pieces), want, 3e-6)


@pytest.mark.parametrize(("kv", "limit"), [("float32", 3e-6), ("bfloat16", 1e-2), ("int8", 3e-2)])
def test_keys_and_values_can_be_stored_smaller(kv, limit):
    program, ids = program_of("llama"), some_ids(60)
    want = reference.logits(program, torch.tensor(ids))
    got = read(NativeDecoder(program), ids, kv=kv)
    assert_close(got, want, limit)
    if kv != "float32":
        assert not torch.equal(got, read(NativeDecoder(program), ids))
    sizes = {"float32": 4 * 16, "bfloat16": 2 * 16, "int8": 16 + 4}  # a head of 16 channels; int8 has a scale
    assert KvPages(program, 3, dtype=kv).nbytes == 3 * PAGE_TOKENS * 2 * 2 * 2 * sizes[kv]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_weights(bits, symmetric):
    model = quantize(tiny_llama(), QuantSpec(f"int{bits}", (1, 32), symmetric))
    program, ids = lower(model), some_ids(40)
    want = reference.logits(program, torch.tensor(ids))
    assert_close(read(NativeDecoder(program), ids), want, 3e-6)
    rounded = read(NativeDecoder(program), ids, exact=False)
    assert 1e-5 * want.abs().max() < (rounded - want).abs().max() < 0.05 * want.abs().max()


def test_layers_of_mixed_grids_share_their_input():
    model = tiny_llama()
    specs = {"q_proj": QuantSpec("int4", (1, 32)), "k_proj": QuantSpec("int8", (1, 64)), "up_proj": QuantSpec("int8", (1, -1))}
    for site in describe(model).sites:
        if spec := specs.get(site.name.rpartition(".")[2]):
            round_site(model, site, spec)
    program, ids = lower(model), some_ids(30)
    want = reference.logits(program, torch.tensor(ids))
    assert_close(read(NativeDecoder(program), ids), want, 3e-6)
    assert_close(read(NativeDecoder(program), ids, exact=False), want, 0.02)


def test_bfloat16_weights_meet_float_activations():
    model = tiny_llama().to(torch.bfloat16)
    program, ids = lower(model), some_ids(30)
    want = reference.logits(program, torch.tensor(ids))
    assert_close(read(NativeDecoder(program), ids), want, 3e-6)
    assert torch.equal(read(NativeDecoder(program), ids, exact=False), read(NativeDecoder(program), ids))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_activations_are_rounded_to_bfloat16_where_that_is_faster(family, monkeypatch):
    model = FAMILIES[family]().to(torch.bfloat16)
    program, ids, decoder = lower(model), some_ids(50), NativeDecoder(lower(model))
    exact, rounded = read(decoder, ids), read(decoder, ids, bfloat16=True)
    if not build.library().qk_multiplies_bfloat16():
        assert torch.equal(rounded, exact)
        pytest.skip("this CPU multiplies bfloat16 numbers no faster than floats")
    plain = reference.linear
    monkeypatch.setattr(reference, "linear", lambda x, weight: plain(x.bfloat16().float(), weight))
    want = reference.logits(program, torch.tensor(ids))
    off, far = ((got - want).abs().mean(1) for got in (rounded, exact))
    assert off[0] < 1e-4 * far[0]  # later rows' sums, in another order, are now and then rounded the other way
    assert off.mean() < 0.5 * far.mean()
    for threads in (1, 2, 3):
        for pieces in ([1, 2, 3, 7, 12, 13, 40], list(range(1, 50))):
            assert torch.equal(read(NativeDecoder(program, threads=threads), ids, pieces, bfloat16=True), rounded)


def test_float32_weights_keep_their_activations():
    program, ids = program_of("llama"), some_ids(30)
    assert torch.equal(read(NativeDecoder(program), ids, bfloat16=True), read(NativeDecoder(program), ids))
    model = tiny_llama().to(torch.bfloat16)
    for site in describe(model).sites:  # one input for weights of two kinds
        if site.name.endswith("k_proj"):
            round_site(model, site, QuantSpec("int4", (1, 32)))
    program = lower(model)
    want = reference.logits(program, torch.tensor(ids))
    for exact in (True, False):
        for bfloat16 in (True, False):
            assert_close(read(NativeDecoder(program), ids, exact=exact, bfloat16=bfloat16), want, 0.02)


def test_argmax_and_selected_rows():
    program, ids = program_of("gemma2"), some_ids(21)
    decoder = NativeDecoder(program, threads=2)
    logits = read(decoder, ids)
    for selected in ([20], [3, 0, 17], [], list(range(21))):
        kv = KvPages(program, 64)
        assert torch.equal(decoder.run(rows_of(ids, logit_rows=selected), kv), logits[selected])
        best = decoder.run(rows_of(ids, logit_rows=selected), kv, argmax=True)
        picked = logits[selected]
        assert torch.equal(picked.gather(1, best[:, None].long())[:, 0], picked.max(1).values if selected else picked[:, 0])


def test_a_position_may_be_written_again():
    """What verification of drafts does: rejected tokens are overwritten."""
    program = program_of("llama")
    decoder, kv = NativeDecoder(program), KvPages(program, 64)
    ids, wrong = some_ids(40), some_ids(12, seed=9)
    decoder.run(rows_of(ids[:20]), kv)
    decoder.run(rows_of(wrong, 20), kv)
    assert torch.equal(decoder.run(rows_of(ids[20:], 20), kv), read(decoder, ids)[20:])


def test_pages_keep_their_contents_when_they_grow():
    program, ids = program_of("llama"), some_ids(60)
    for dtype in ("float32", "int8"):
        decoder, kv = NativeDecoder(program), KvPages(program, 1, dtype=dtype)
        decoder.run(rows_of(ids[:30]), kv)
        kv.grow(2)
        assert torch.equal(decoder.run(rows_of(ids[30:], 30), kv), read(decoder, ids, kv=dtype)[30:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [VOCAB]}, "tokens from 192 to 192; want 0 to 191"),
        ({"tokens": [-1]}, "tokens from -1"),
        ({"positions": [2048]}, "positions from 2048"),
        ({"slots": [1]}, "slots from 1"),
        ({"logit_rows": [1]}, "logit rows from 1"),
        ({"tokens": []}, "at least one token"),
        ({"block_table": np.full((1, 64), 64)}, "has pages outside 0 to 63"),
        ({"block_table": np.full((1, 64), -1)}, "has pages outside 0 to 63"),
        ({"block_table": np.zeros(4)}, "table of two axes"),
    ],
)
def test_misuse_is_named(change, message):
    program = program_of("llama")
    rows = {"tokens": [5], "positions": [0], "slots": [0], "block_table": np.arange(64)[None], "logit_rows": [0], **change}
    with pytest.raises(KernelError, match=message):
        NativeDecoder(program).run(Rows(**rows), KvPages(program, 64))


def test_pages_of_another_program_and_unknown_storage_are_refused():
    program = program_of("llama")
    with pytest.raises(KernelError, match="pages have 3 layers"):
        NativeDecoder(program).run(rows_of([5]), KvPages(program_of("gemma2"), 64))
    with pytest.raises(KernelError, match="float32, bfloat16, int8"):
        KvPages(program, 1, dtype="int4")


def test_many_short_calls_on_many_threads():
    """The team at its limits: more threads than cores, than heads and than blocks of rows."""
    program, ids = program_of("llama"), some_ids(24)
    want = read(NativeDecoder(program, threads=1), ids)
    for threads in (2, 3, 5, 16):
        decoder = NativeDecoder(program, threads=threads)
        for _ in range(6):
            assert torch.equal(read(decoder, ids, list(range(1, 24))), want)


def test_python_threads_share_a_decoder_and_use_their_own():
    program, ids = program_of("llama"), some_ids(20)
    shared = NativeDecoder(program, threads=2)
    want, wrong = read(shared, ids), []

    def call(own: bool) -> None:
        decoder = NativeDecoder(program, threads=2) if own else shared
        for _ in range(10):
            if not torch.equal(read(decoder, ids, list(range(1, 20))), want):
                wrong.append(own)

    pool = [threading.Thread(target=call, args=(i % 2 == 0,)) for i in range(4)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in pool)
    assert wrong == []


def _child(queue, decoder, ids) -> None:
    queue.put(read(decoder, ids, [3, 4, 5]).tolist())


def test_a_forked_child_decodes_on_threads_of_its_own():
    program, ids = program_of("llama"), some_ids(12)
    decoder = NativeDecoder(program, threads=2)
    want = read(decoder, ids)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue, decoder, ids))
    child.start()
    assert queue.get(timeout=60) == want.tolist()
    child.join(timeout=60)
    assert child.exitcode == 0


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_every_instruction_set_decodes(isa, monkeypatch):
    features = {"avx512": ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"), "avx2": ("avx2", "fma3", "f16c"), "portable": ()}
    if not all(torch.cpu.get_capabilities().get(feature, False) for feature in features[isa]):
        pytest.skip(f"this CPU has no {isa}")
    library = build.load(isa)
    monkeypatch.setattr(build, "library", lambda: library)
    ids = some_ids(40)
    for family in ("gemma3", "qwen3"):
        program = lower(quantize(FAMILIES[family](), QuantSpec("int4", (1, 32), False)))
        want = reference.logits(program, torch.tensor(ids))
        for kv, limit in (("float32", 1e-5), ("bfloat16", 2e-2), ("int8", 5e-2)):
            whole = read(NativeDecoder(program, threads=2), ids, kv=kv)
            assert_close(whole, want, limit)
            assert torch.equal(read(NativeDecoder(program, threads=2), ids, [1, 2, 30], kv=kv), whole)
