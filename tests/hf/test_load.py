"""Float models from directories and objects, and empty ones from configs."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from quantkit.errors import QuantkitError
from quantkit.hf import gguf as gguf_cache
from quantkit.hf.load import empty_model, load_float
from quantkit.hf.source import load_config
from quantkit.pipeline.quantize import quantize
from tests.tiny import FAMILIES, tiny_llama, tiny_tokenizer


def test_directory_with_and_without_tokenizer(tmp_path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    loaded, tokenizer = load_float(tmp_path)
    assert tokenizer is None
    assert not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    tiny_tokenizer().save_pretrained(tmp_path)
    half, tokenizer = load_float(tmp_path, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("the cat sat")["input_ids"]) == "the cat sat"


def test_a_hub_id_is_the_directory_in_the_cache(tiny_float, tmp_path, monkeypatch) -> None:
    repository = tmp_path / "cache" / "models--some--model"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    for index, file in enumerate([*tiny_float.iterdir()]):
        (repository / "blobs" / str(index)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{index}")
    (snapshot / "NOTICE").symlink_to(tiny_float / "config.json")  # leads out of the repository
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    quantize("some/model", method="rtn", out=tmp_path / "q")
    assert (tmp_path / "q" / "tokenizer.json").read_bytes() == (tiny_float / "tokenizer.json").read_bytes()
    assert not (tmp_path / "q" / "NOTICE").exists()
    assert "base_model: some/model" in (tmp_path / "q" / "README.md").read_text()
    with pytest.raises(QuantkitError, match="some/other"):
        load_float("some/other")


def test_a_model_is_returned_as_it_is() -> None:
    model = tiny_llama().train()
    loaded, tokenizer = load_float(model)
    assert loaded is model
    assert not loaded.training
    assert tokenizer is None
    with pytest.raises(QuantkitError, match=r"float32.*bfloat16"):
        load_float(model, torch.bfloat16)


@pytest.mark.parametrize("name", ["nothing/here-at-all", "nothing.gguf"])
def test_missing_sources(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(QuantkitError, match=r"here-at-all|no such file"):
        load_float(tmp_path / name)


def test_quantized_and_foreign_configs_are_refused(tmp_path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(QuantkitError, match="already quantized"):
        load_float(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "no_such_type"}))
    with pytest.raises(QuantkitError, match="no_such_type"):
        load_float(tmp_path)


@pytest.mark.parametrize("family", ["llama_tied", "gemma3", "gpt2", "mixtral"])
def test_empty_model_has_meta_parameters_and_real_buffers(family: str) -> None:
    model = FAMILIES[family]()
    empty = empty_model(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    theirs = dict(model.named_buffers())
    for name, buffer in empty.named_buffers():
        assert torch.equal(buffer, theirs[name]), name
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {name for name, _ in model.named_parameters()}
    assert tied == {n for n, _ in empty.named_parameters(remove_duplicate=False)} - {n for n, _ in empty.named_parameters()}


def test_architectures_cannot_name_anything_but_a_model() -> None:
    config = tiny_llama().config
    config.architectures = ["pipeline"]
    assert type(empty_model(config)).__name__ == "LlamaForCausalLM"


def write_gguf(
    path,
    hidden: int = 32,
    vocab: int = 20,
    without: str = "",
    more: Mapping[str, torch.Tensor] = MappingProxyType({}),
    scaling: Mapping[str, object] = MappingProxyType({}),
) -> dict[str, torch.Tensor]:
    """Write a one-layer llama with a toy vocabulary as GGUF, except one tensor, and with more; return them by GGUF name.

    ``scaling`` is what the file says of its rotary embeddings below ``llama.rope.scaling``.
    """
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", *(chr(ord("a") + i) for i in range(vocab - 4)), "ab", "abc"])
    writer.add_token_types([3, 3] + [1] * (vocab - 2))
    writer.add_token_merges(["a b", "ab c"])  # older transformers take a list of one for a text
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (vocab, hidden),
        "output_norm": (hidden,),
        "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,),
    }
    shapes |= {f"blk.0.attn_{x}": (hidden, hidden) for x in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (64, hidden), "blk.0.ffn_up": (64, hidden), "blk.0.ffn_down": (hidden, 64)}
    generator = torch.Generator().manual_seed(0)
    shapes.pop(without, None)
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": tensor for name, tensor in more.items()}
    for key, value in scaling.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}[type(value)]
        add(f"llama.rope.scaling.{key}", value)
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor.numpy())
            continue
        packed = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
        tensors[name] = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.usefixtures("own_cache")
def test_gguf_becomes_a_plain_model(tmp_path) -> None:
    tensors = write_gguf(tmp_path / "toy.gguf")
    model, tokenizer = load_float(tmp_path / "toy.gguf", torch.float32)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, tensors["blk.0.ffn_down.weight"])
    assert torch.equal(model.model.norm.weight, tensors["output_norm.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer is not None
    assert tokenizer("cab", add_special_tokens=False)["input_ids"] == [4, 18]
    model.save_pretrained(tmp_path / "plain")  # a model still marked as GGUF would refuse
    again, _ = load_float(tmp_path / "plain")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", ["blk.0.ffn_up", "output_norm", "token_embd"])
def test_a_gguf_without_a_tensor(name: str, tmp_path) -> None:
    write_gguf(tmp_path / "toy.gguf", without=name)
    with pytest.raises(QuantkitError, match="1 missing: "):
        load_float(tmp_path / "toy.gguf")


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", ["blk.1.nextn.eh_proj", "blk.0.attn_sinks"])
def test_a_gguf_with_a_tensor_that_its_reader_would_leave_out(name: str, tmp_path) -> None:
    write_gguf(tmp_path / "toy.gguf", more={name: torch.ones(8)})
    with pytest.raises(QuantkitError, match=rf"1 of its tensors are unknown to transformers.*: {name}\.weight; give the model"):
        load_float(tmp_path / "toy.gguf")


def llama3_factors(head_size: int) -> torch.Tensor:
    """Return what Llama 3.1 divides its rotary frequencies by, as its converter to GGUF counts it."""
    factors = []
    for index in range(0, head_size, 2):
        length = 2 * math.pi * 10000.0 ** (index / head_size)
        smooth = (8192 / length - 1.0) / (4.0 - 1.0)
        between = 1 / ((1 - smooth) / 8.0 + smooth)
        factors.append(1.0 if length < 8192 / 4 else 8.0 if length > 8192 else between)
    return torch.tensor(factors)


ROTARY = {
    "llama3": ({"rope_freqs": llama3_factors(16)}, {}, {"factor": 8.0, "original_max_position_embeddings": 8192}),
    "linear": ({}, {"type": "linear", "factor": 4.0}, {"factor": 4.0}),
    "yarn": (
        {},
        {"type": "yarn", "factor": 4.0, "original_context_length": 32, "finetuned": True},
        {"factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "longrope": (
        {"rope_factors_short": torch.linspace(1, 2, 8), "rope_factors_long": torch.linspace(2, 9, 8)},
        {"original_context_length": 32, "attn_factor": 1.25},
        {"attention_factor": 1.25, "original_max_position_embeddings": 32},
    ),
}


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("kind", ROTARY)
def test_a_gguf_with_stretched_rotary_embeddings(kind: str, tmp_path) -> None:
    """Factors in tensors and in metadata reach the model: its logits are those of a directory whose config says the same."""
    more, scaling, wanted = ROTARY[kind]
    write_gguf(tmp_path / "plain.gguf")
    write_gguf(tmp_path / "toy.gguf", more=more, scaling=scaling)
    plain, _ = load_float(tmp_path / "plain.gguf", torch.float32)
    for _ in range(2):  # the second time from the cache
        model, _ = load_float(tmp_path / "toy.gguf", torch.float32)
    found = dict(model.config.rope_parameters)
    assert {"rope_type": kind, **wanted}.items() <= found.items()
    plain.save_pretrained(tmp_path / "directory")
    config = json.loads((tmp_path / "directory" / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": kind, **wanted}
    if kind == "llama3":
        config["rope_parameters"] |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        config["rope_parameters"] |= {f"{x}_factor": more[f"rope_factors_{x}"].tolist() for x in ("short", "long")}
        config["original_max_position_embeddings"] = 32
    (tmp_path / "directory" / "config.json").write_text(json.dumps(config))
    same, _ = load_float(tmp_path / "directory", torch.float32)
    ids = torch.arange(48).remainder(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, same(ids).logits)
        assert not torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-4)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("more", "scaling", "message"),
    [
        ({"rope_freqs": torch.linspace(1, 8, 8)}, {}, "factors that are not those of Llama 3.1"),
        ({}, {"type": "yarn", "factor": 4.0}, "not known here .rope.scaling.type yarn, rope.scaling.factor 4.0"),
        ({}, {"type": "su", "factor": 4.0}, "not known here"),
        ({"rope_freqs": llama3_factors(16)}, {"type": "linear", "factor": 2.0}, "not known here"),
        ({"rope_factors_long": torch.ones(8)}, {"original_context_length": 32}, "rope_factors_long.weight"),
    ],
)
def test_a_gguf_whose_rotary_embeddings_no_config_describes(more, scaling, message: str, tmp_path) -> None:
    write_gguf(tmp_path / "toy.gguf", more=more, scaling=scaling)
    with pytest.raises(QuantkitError, match=rf"toy\.gguf: .*{message}"):
        load_float(tmp_path / "toy.gguf")


@pytest.mark.parametrize("source", ["./typo", "/no/such/place", "a/b/c", "~/model", "bad name", "model.gguf", Path("typo"), ""])
def test_a_path_that_is_not_there_is_said_without_asking_the_hub(source, monkeypatch) -> None:
    monkeypatch.setattr("quantkit.hf.source.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    for read in (load_float, load_config):
        with pytest.raises(QuantkitError, match=r"no such file or directory; want a directory, a \.gguf file|no such file: "):
            read(source)


def test_a_hub_that_cannot_be_reached(monkeypatch) -> None:
    def offline(*_, **__):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("quantkit.hf.source.snapshot_download", offline)
    with pytest.raises(
        QuantkitError, match=r"owner/name is no directory here, not in the cache of the hub, and the hub cannot"
    ):
        load_float("owner/name")


def test_damaged_gguf(tmp_path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(QuantkitError, match=r"bad\.gguf"):
        load_float(tmp_path / "bad.gguf")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantkit" / "gguf"


def refuse(*_args, **_kwargs):
    raise AssertionError("the GGUF file is read again")


def test_a_gguf_file_is_read_once_while_it_stays_what_it_is(tmp_path, monkeypatch, own_cache) -> None:
    write_gguf(tmp_path / "toy.gguf")
    config = load_config(tmp_path / "toy.gguf")
    model, tokenizer = load_float(tmp_path / "toy.gguf", torch.float32)
    assert tokenizer is not None
    config.hidden_size = 8  # whoever changes what is one's own changes nobody else's
    tokenizer.add_tokens(["never seen"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.model.norm.weight.data.zero_()
    with monkeypatch.context() as patch:
        patch.setattr("gguf.GGUFReader", refuse)
        again, other = load_float(tmp_path / "toy.gguf", torch.float32)
        assert load_config(tmp_path / "toy.gguf").hidden_size == 32
        assert len(other.get_vocab()) == len(tokenizer.get_vocab()) - 1
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in before.items())
    assert again.config.to_dict() == model.config.to_dict()
    write_gguf(tmp_path / "toy.gguf", hidden=64)
    assert load_config(tmp_path / "toy.gguf").hidden_size == 64
    assert load_float(tmp_path / "toy.gguf")[0].config.hidden_size == 64
    assert gguf_cache.clear() > 0
    assert not own_cache.exists()


def test_damaged_weights_from_a_gguf_file_are_not_used(tmp_path, own_cache) -> None:
    tensors = write_gguf(tmp_path / "toy.gguf")
    load_float(tmp_path / "toy.gguf")
    kept = next(own_cache.rglob("*-*.safetensors"))
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    model, _ = load_float(tmp_path / "toy.gguf")
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, tensors["blk.0.ffn_down.weight"])
    assert [path.stat().st_size for path in own_cache.rglob("*-*.safetensors")] == [len(content)]


@pytest.mark.parametrize("obstacle", ["off", "file", "large"])
def test_a_gguf_file_is_read_where_nothing_can_be_kept(obstacle, tmp_path, monkeypatch, own_cache) -> None:
    tensors = write_gguf(tmp_path / "toy.gguf")
    own_cache.parent.mkdir(parents=True)
    if obstacle == "off":
        (own_cache.parent / "prepacked.off").touch()
    elif obstacle == "file":
        own_cache.write_text("in the way")
    else:
        monkeypatch.setattr(gguf_cache, "LIMIT_BYTES", 10)
    for _ in range(2):
        model, tokenizer = load_float(tmp_path / "toy.gguf")
        assert torch.equal(model.model.norm.weight, tensors["output_norm.weight"])
        assert tokenizer("cab", add_special_tokens=False)["input_ids"] == [4, 18]
    assert not list(own_cache.rglob("*.safetensors"))
