"""Numbers in a config that would fill the memory are refused before anything is made of them."""

import json
import resource
from pathlib import Path

import pytest

import quantkit
from quantkit.errors import QuantkitError
from quantkit.hf.load import load_float
from quantkit.hf.sizes import check_sizes
from quantkit.hf.source import load_config
from tests.tiny import FAMILIES, tiny_llama

HUGE = [
    ("num_labels", 10**9),
    ("num_labels", 1e9),
    ("num_hidden_layers", 10**9),
    ("vocab_size", 10**13),
    ("hidden_size", 2**40),
    ("head_dim", 10**12),
    ("max_position_embeddings", 10**12),
    ("num_attention_heads", 10**10),
    ("num_local_experts", 10**9),
    ("text_config", {"encoder_layers": 10**9}),
    ("layer_kinds", {"depths": [2, 10**9]}),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("float")
    tiny_llama().save_pretrained(path)
    return path


@pytest.mark.parametrize(("name", "value"), HUGE)
@pytest.mark.parametrize("read", [load_config, load_float])
def test_a_config_that_would_fill_the_memory_is_refused_at_once(directory, tmp_path, read, name, value):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(QuantkitError, match="than any model has"):
        read(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_so_is_that_of_a_quantized_checkpoint(tmp_path):
    quantkit.quantize(tiny_llama(), "w8a16", method="rtn", out=str(tmp_path / "q"))
    path = tmp_path / "q" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_labels": 10**9}))
    with pytest.raises(QuantkitError, match="num_labels is 1e"):
        quantkit.load(tmp_path / "q")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_real_config_is_refused(family):
    check_sizes(FAMILIES[family]().config.to_dict(), family)
    check_sizes(
        {"max_position_embeddings": 10_485_760, "rope_theta": 10**10, "vocab_size": 2**20, "eos_token_id": 2**30}, "here"
    )
