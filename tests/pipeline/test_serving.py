"""What fits a machine: the formulas against what models and engines really take."""

import pytest
import torch

import quantkit
from quantkit.checkpoint.contents import contents_of
from quantkit.checkpoint.read import open_checkpoint
from quantkit.engine.backend import Memory
from quantkit.errors import SpecError
from quantkit.hf.backend import make_backend
from quantkit.pipeline.memory import RUNTIME_BYTES
from quantkit.pipeline.serving import Machine, Weights, kv_bytes, serving_table, weights_of
from tests.tiny import FAMILIES, tiny_llama

FAST = Machine("cpu", 1 << 40, {1 << 20: 1e9})


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "qwen3"])
@pytest.mark.parametrize(("kv", "number"), [("float", 4), ("int8", None)])
def test_keys_and_values_are_what_the_engine_allocates(family, kv, number):
    """Of whole pages; a window does not free pages in the engine, so contexts here are shorter than it."""
    model = FAMILIES[family]()
    config = model.config.get_text_config(decoder=True)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = min(64, getattr(config, "sliding_window", None) or 64)
    pages = Memory(-(-tokens // 32), 32, 1)
    want = make_backend(model, kv, engine="native").bytes_for(pages)
    assert kv_bytes(model.config, pages.pages * 32, number or 1 + 4 / head) <= want
    if tokens % 32 == 0:
        assert kv_bytes(model.config, tokens, number or 1 + 4 / head) == pytest.approx(want)


def test_a_window_bounds_what_a_long_context_takes():
    config = FAMILIES["gemma2"]().config
    text = config.get_text_config(decoder=True)
    sliding = sum(kind == "sliding_attention" for kind in text.layer_types)
    short, long = kv_bytes(config, text.sliding_window, 2), kv_bytes(config, 10 * text.sliding_window, 2)
    assert 0 < sliding < len(text.layer_types)
    assert long == pytest.approx(short * (sliding + 10 * (len(text.layer_types) - sliding)) / len(text.layer_types))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_the_checkpoint(tied, tmp_path):
    result = quantkit.quantize(tiny_llama(tie_word_embeddings=tied), "w4a16", method="rtn", out=tmp_path / "q")
    with open_checkpoint(result.path) as opened:
        found = weights_of(opened.contents, opened.schemes, opened.format_name, "q")
        assert found.total == sum(header.nbytes for header in opened.reader.headers.values())
    table = result.model.get_input_embeddings().weight.nbytes
    assert found.total - found.dense == (0 if tied else table)
    assert found.read(1) == found.read(9) == found.dense


def test_experts_are_read_as_tokens_take_them():
    contents = contents_of(FAMILIES["mixtral"]().config)
    found = weights_of(contents, {}, "native", "float")
    config = contents.model.config
    assert found.share == config.num_experts_per_tok / config.num_local_experts
    assert found.read(1) == pytest.approx(found.dense + found.share * found.experts)
    assert found.read(1) < found.read(2) < found.read(50) <= found.dense + found.experts


def test_the_table_adds_up_and_says_what_does_not_fit():
    contents = contents_of(tiny_llama().config)
    one = Weights("x", 10**6, 9 * 10**5, 0)
    small = Machine("cpu", RUNTIME_BYTES + 10**6, {1 << 20: 1e9})
    rows = serving_table(contents, [one], small, contexts=[64, 128], users=[1, 4])
    assert [(row.context, row.users) for row in rows] == [(64, 1), (64, 4), (128, 1), (128, 4)]
    for row in rows:
        assert row.kv_bytes == row.users * kv_bytes(contents.model.config, row.context, 4)
        assert row.memory_bytes == one.total + row.kv_bytes + RUNTIME_BYTES
        assert row.fits is False
        assert row.ms == pytest.approx(1e3 * (one.dense + row.kv_bytes) / 1e9)
        assert row.tokens_per_s == pytest.approx(row.users / row.ms * 1e3)
    assert all(row.fits for row in serving_table(contents, [one], FAST, contexts=[64], users=[1]))
    int8 = serving_table(contents, [one], FAST, contexts=[64], users=[1], kv="int8")[0]
    assert int8.kv_bytes < rows[0].kv_bytes / 2
    for wrong in (
        {"contexts": [0], "users": [1]},
        {"contexts": [1], "users": [-1]},
        {"contexts": [1], "users": [1], "kv": "int3"},
    ):
        with pytest.raises(SpecError, match="want float or int8"):
            serving_table(contents, [one], FAST, **wrong)


def test_the_bandwidth_is_measured_and_looked_up():
    found = Machine.measure([1, 2, 20 << 20], "cpu")
    assert len(found.bandwidths) == 2
    assert all(1e7 < speed < 1e13 for speed in found.bandwidths.values())
    assert found.bandwidth(1) == found.bandwidths[min(found.bandwidths)]
    assert found.available is None or found.available > 0
    assert torch.device(found.device).type == "cpu"
