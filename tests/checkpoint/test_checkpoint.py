"""Checkpoints: saved, verified, loaded by us and by transformers, and refused when anything is wrong with them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, PreTrainedModel

from quantkit import checkpoint
from quantkit.errors import FormatError, SpecError
from quantkit.formats.containers import directory
from quantkit.hf.experts import enable_experts
from quantkit.hf.structure import describe
from quantkit.nn.install import install
from quantkit.nn.linear import QuantLinear, QuantWeight
from quantkit.nn.sites import read_weight
from quantkit.numerics import grid
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.settings import Output
from quantkit.qtensor import GridTensor
from quantkit.spec import TOKEN_INT8, QuantSpec, Scheme
from tests.tiny import FAMILIES, MOE_FAMILIES, tiny_llama, tiny_tokenizer

IDS = torch.randint(3, 190, (2, 9), generator=torch.Generator().manual_seed(0))
W4 = QuantSpec("int4", (1, 32), scale_dtype="float32")
W4_ASYM = QuantSpec("int4", (1, 32), symmetric=False, scale_dtype="float32")


def round_to_nearest(model: PreTrainedModel, spec: QuantSpec = W4, *, outside: bool = False) -> dict[str, GridTensor]:
    """Quantize every site of ``model`` in place."""
    structure = describe(model)
    enable_experts(model)
    done = {}
    for site in (*structure.sites, *(structure.outside if outside else ())):
        weight = read_weight(model, site)
        scale, zero = grid.choose_qparams(weight, spec)
        done[site.name] = GridTensor.from_codes(grid.quantize(weight, scale, zero, spec), scale, zero, spec)
        install(model, site, done[site.name])
    return done


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A tiny llama at int4 asymmetric and its checkpoint; tests copy the directory before they damage it."""
    model = tiny_llama()
    round_to_nearest(model, W4_ASYM)
    return model, checkpoint.save(model, tmp_path_factory.mktemp("saved") / "model")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", ["native", "compressed-tensors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_logits_after_save_and_load(family: str, name: str, tmp_path) -> None:
    model = FAMILIES[family]()
    done = round_to_nearest(model, W4_ASYM, outside=family != "llama_tied")
    # Experts as 3-D tensors, Conv1D, layers that are initialised by their weight: other readers know none of them.
    if family in ("gpt_oss", "gpt2", "falcon") and name == "compressed-tensors":
        with pytest.raises(FormatError, match=r"(mlp\.experts|Conv1D|initialised by a weight).*native"):
            checkpoint.save(model, tmp_path / "m", format=name)
        return
    path = checkpoint.save(model, tmp_path / "m", format=name)
    loaded = checkpoint.load(path)
    shutil.rmtree(path)  # nothing may still look at the files
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    for site, qtensor in done.items():
        module = loaded.get_submodule(site)
        assert torch.equal(module.qtensor.packed, qtensor.packed)
        assert module.spec == qtensor.spec


@pytest.mark.parametrize("spec", [
    QuantSpec("int3", (1, 32), scale_dtype="float32"),
    QuantSpec("int8", (1, -1), scale_dtype="bfloat16"),
    QuantSpec("int8", (-1, -1), symmetric=False, scale_dtype="float32"),
    QuantSpec("int5", (8, 16), symmetric=False),
], ids=QuantSpec.describe)  # fmt: skip
@pytest.mark.parametrize("name", ["native", "compressed-tensors"])
def test_other_grids(spec: QuantSpec, name: str, tmp_path) -> None:
    model = tiny_llama(num_hidden_layers=1)
    round_to_nearest(model, spec)
    if name == "compressed-tensors" and spec.strategy == "block":
        with pytest.raises(FormatError, match="blocks of 8 rows"):
            checkpoint.save(model, tmp_path, format=name)
        return
    assert torch.equal(logits(checkpoint.load(checkpoint.save(model, tmp_path, format=name))), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tmp_path) -> None:
    model = tiny_llama()
    for parameter in model.parameters():  # not model.to: that would round the rotary frequencies as well
        parameter.data = parameter.data.to(dtype)
    name = str(dtype).removeprefix("torch.")
    round_to_nearest(model, QuantSpec("int4", (1, 32), scale_dtype=name))
    path = checkpoint.save(model, tmp_path)
    assert read_json(path / "config.json")["dtype"] == name
    loaded = checkpoint.load(path)
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    assert checkpoint.load(path, dtype=torch.float32).model.norm.weight.dtype == torch.float32
    other = "float16" if dtype == torch.bfloat16 else "bfloat16"
    plan = {site.name: Scheme(QuantSpec("int4", (1, 32), scale_dtype=other)) for site in describe(tiny_llama()).sites}
    refused = checkpoint.rejections(tiny_llama().to(dtype), plan)
    assert refused.keys() == plan.keys()
    assert f"use scale_dtype {name}" in next(iter(refused.values()))


LLAMAS = [
    "llama",
    "llama_tied",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt_neox",
    "opt",
    "olmo2",
    "starcoder2",
]
GRIDS = [("int4", 32), ("int3", 32), ("int8", -1), ("int8", 32)]


def transformers_logits(path: Path, **options) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(path, **options))


@pytest.mark.parametrize("family", [*LLAMAS, "mixtral", "qwen3_moe"])
def test_transformers_gives_the_same_logits(family: str, tmp_path) -> None:
    model = FAMILIES[family]()
    round_to_nearest(model, W4)
    path = checkpoint.save(model, tmp_path)
    torch.testing.assert_close(transformers_logits(path), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(("dtype", "group"), GRIDS)
def test_transformers_reads_every_grid(dtype: str, group: int, symmetric: bool, tmp_path) -> None:
    model = tiny_llama(num_hidden_layers=1)
    round_to_nearest(model, QuantSpec(dtype, (1, group), symmetric, "float32"))
    path = checkpoint.save(model, tmp_path)
    found = transformers_logits(path, quantization_config=CompressedTensorsConfig(dequantize=True))
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)
    if symmetric:  # compressed-tensors 0.20 prepares unpacked zero points when weights stay compressed
        torch.testing.assert_close(transformers_logits(path), logits(model), rtol=1e-5, atol=1e-5)


def test_transformers_refuses_native_files(tmp_path) -> None:
    model = tiny_llama(num_hidden_layers=1)
    round_to_nearest(model)
    path = checkpoint.save(model, tmp_path, format="native")
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(path)


def test_reads_what_compressed_tensors_itself_compressed(tmp_path) -> None:
    """A checkpoint made by the other package from the same model: a foreign file."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config

    model = tiny_llama(num_hidden_layers=1)
    reference = tiny_llama(num_hidden_layers=1)
    done = round_to_nearest(reference, W4)
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": args}
    config = {"config_groups": {"group_0": group}, "ignore": ["lm_head"], "format": "pack-quantized"}
    quantization = QuantizationConfig.model_validate(config)
    apply_quantization_config(model, quantization, show_progress=False)
    for name, qtensor in done.items():
        model.get_submodule(name).weight_scale.data.copy_(qtensor.scale)
        model.get_submodule(name).weight.data.copy_(qtensor.dequantize())  # on the grid: nothing is left to round
    for module in model.modules():
        if hasattr(module, "quantization_status"):
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors", {"format": "pt"})
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    found = read_json(tmp_path / "config.json")["quantization_config"]
    assert found["quantization_status"] == "compressed"
    assert "quantkit" not in read_json(tmp_path / "config.json")
    loaded = checkpoint.load(tmp_path)
    for name, qtensor in done.items():
        assert torch.equal(loaded.get_submodule(name).qtensor.scale, qtensor.scale)
        assert torch.equal(loaded.get_submodule(name).qtensor.packed, qtensor.packed)
    assert torch.equal(logits(loaded), logits(reference))


def test_w8a8_rounds_activations_as_other_readers_do(tmp_path) -> None:
    model, plain = tiny_llama(), tiny_llama()
    path = tmp_path / "w8a8"
    quantize(model, "w8a8", out=path, method="rtn")
    quantize(plain, "w8a16-channel", method="rtn")
    assert load_file(path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert read_json(path / "config.json")["quantization_config"]["format"] == "int-quantized"
    assert "inputs int8 channel" in repr(model)
    assert torch.equal(logits(checkpoint.load(path)), logits(model))
    assert torch.equal(logits(checkpoint.load(path, ignore_activations=True)), logits(plain))
    rounding = (logits(model) - logits(plain)).abs().max()
    assert rounding > 1e-3
    difference = (transformers_logits(path) - logits(model)).abs().amax(-1)
    assert (difference < 1e-5).float().mean() > 0.5  # the other tokens hold a tie that float32 sums decided differently
    assert difference.max() < 0.5 * rounding
    again = checkpoint.save(model, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("scheme", ["fp8", "fp8-tensor", "fp8-dynamic"])
def test_fp8_reads_the_same_elsewhere(tmp_path, scheme: str) -> None:
    model = tiny_llama()
    path = tmp_path / "q"
    quantize(model, scheme, out=path, method="rtn")
    assert load_file(path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert read_json(path / "config.json")["quantization_config"]["format"] == "float-quantized"
    assert torch.equal(logits(checkpoint.load(path)), logits(model))
    difference = (transformers_logits(path) - logits(model)).abs().amax(-1)
    assert (difference < 1e-5).float().mean() > (0.5 if scheme == "fp8-dynamic" else 0.99)


@pytest.mark.parametrize("format", ["native", "compressed-tensors"])
def test_8_bit_activations_survive_both_formats(tmp_path, format: str) -> None:
    model = FAMILIES["qwen3_moe"]()
    quantize(model, "w8a8", out=tmp_path / "q", method="rtn", output=Output(format=format))
    loaded = checkpoint.load(tmp_path / "q")
    assert {m.activation for m in loaded.modules() if isinstance(m, QuantLinear | QuantWeight)} == {TOKEN_INT8}
    assert torch.equal(logits(loaded), logits(model))


def test_mixed_schemes_and_untouched_sites(tmp_path) -> None:
    model = tiny_llama()
    sites = describe(model).sites
    for site in sites:
        if "o_proj" in site.name:
            continue
        spec = QuantSpec("int8", (1, -1), scale_dtype="float32") if "down" in site.name else W4
        weight = read_weight(model, site)
        scale, zero = grid.choose_qparams(weight, spec)
        install(model, site, GridTensor.from_codes(grid.quantize(weight, scale, zero, spec), scale, zero, spec))
    path = checkpoint.save(model, tmp_path)
    config = read_json(path / "config.json")["quantization_config"]
    assert len(config["config_groups"]) == 2
    assert config["ignore"] == ["lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    assert torch.equal(logits(checkpoint.load(path)), logits(model))
    torch.testing.assert_close(transformers_logits(path), logits(model), rtol=1e-5, atol=1e-5)


def test_names_in_the_config_are_checkpoint_names(tmp_path) -> None:
    model = FAMILIES["mixtral"]()
    round_to_nearest(model)
    path = checkpoint.save(model, tmp_path)
    assert "model.layers.0.block_sparse_moe.gate" in read_json(path / "config.json")["quantization_config"]["ignore"]
    tensors = load_file(path / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight_packed" in tensors
    assert "model.layers.0.block_sparse_moe.gate.weight" in tensors
    assert not any("gate_up_proj" in name for name in tensors)


def test_tied_head_is_stored_once_and_tokenizer_travels(tmp_path) -> None:
    model, tokenizer = FAMILIES["llama_tied"](), tiny_tokenizer()
    model.generation_config.max_new_tokens = 17
    round_to_nearest(model)
    path = checkpoint.save(model, tmp_path, tokenizer=tokenizer, metadata={"quantizer": "rtn", "calibration": "none"})
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    assert "lm_head" in read_json(path / "config.json")["quantization_config"]["ignore"]
    assert read_json(path / "config.json")["quantkit"]["quantizer"] == "rtn"
    loaded = checkpoint.load(path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.generation_config.max_new_tokens == 17
    text = "the cat sat on a mat"
    assert AutoTokenizer.from_pretrained(path)(text)["input_ids"] == tokenizer(text)["input_ids"]


def directory_bytes(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_shards_are_deterministic_and_complete(family: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "MAX_FILE_BYTES", 30_000)
    model = FAMILIES[family]()
    round_to_nearest(model)
    first, second = (checkpoint.save(model, tmp_path / name) for name in ("a", "b"))
    assert directory_bytes(first) == directory_bytes(second)
    shards = sorted(file.name for file in first.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = read_json(first / "model.safetensors.index.json")
    assert set(index["weight_map"].values()) == set(shards)
    sizes = sum(t.nbytes for shard in shards for t in load_file(first / shard).values())
    assert index["metadata"]["total_size"] == sizes
    assert torch.equal(logits(checkpoint.load(first)), logits(model))
    torch.testing.assert_close(transformers_logits(first), logits(model), rtol=1e-5, atol=1e-5)


def test_writer_streams_blocks_in_any_order_to_the_same_bytes(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "MAX_FILE_BYTES", 30_000)
    model, reference = tiny_llama(), tiny_llama()
    done = round_to_nearest(reference)
    whole = checkpoint.save(reference, tmp_path / "whole")
    blocks = describe(model).blocks
    writer = checkpoint.CheckpointWriter(tmp_path / "blocks", model, plan={name: Scheme(W4) for name in done})
    for i in reversed(range(len(blocks))):  # the model itself is still float: only its other tensors are read
        writer.write_block(i, {site.name: done[site.name] for site in blocks[i].sites})
        assert not (tmp_path / "blocks" / "config.json").exists()
        with pytest.raises(FormatError, match="incomplete"):
            checkpoint.load(tmp_path / "blocks")
    assert directory_bytes(writer.finish()) == directory_bytes(whole)


def test_writer_refuses_gaps_and_strangers(tmp_path) -> None:
    model, reference = tiny_llama(), tiny_llama()
    done = round_to_nearest(reference)
    block = describe(model).blocks[0]
    parts = {site.name: done[site.name] for site in block.sites}
    writer = checkpoint.CheckpointWriter(tmp_path, model, plan={name: Scheme(W4) for name in done})
    with pytest.raises(FormatError, match="the plan wants"):
        writer.write_block(0, dict(list(parts.items())[1:]))
    with pytest.raises(FormatError, match="the plan says"):
        writer.write_block(0, {**parts, block.sites[0].name: parts[block.sites[-1].name]})
    with pytest.raises(FormatError, match="have not been written"):
        writer.finish()
    with pytest.raises(SpecError, match="no layer"):
        checkpoint.CheckpointWriter(tmp_path, model, plan={"model.layers.0.mlp.up": Scheme(W4)})


def test_inspect_counts_what_the_disk_shows(saved: tuple[PreTrainedModel, Path]) -> None:
    model, path = saved
    facts = json.loads(json.dumps(checkpoint.inspect(path)))
    tensors = load_file(path / "model.safetensors")
    sites = describe(tiny_llama()).sites
    assert facts["bytes"] == (path / "model.safetensors").stat().st_size
    assert facts["parameters"] == sum(p.numel() for p in tiny_llama().parameters())
    assert facts["quantized_parameters"] == sum(site.numel for site in sites)
    assert facts["quantized_bytes"] == sum(t.nbytes for n, t in tensors.items() if ".weight_" in n)
    assert facts["modules"]["model.layers.0.mlp.up_proj"] == "int4 g32 asym"
    assert facts["schemes"][0]["layers"] == len(sites)
    exact = sum(m.qtensor.nbytes for m in model.modules() if isinstance(m, QuantLinear)) + 16 * len(sites)  # weight_shape
    assert facts["quantized_bytes"] == exact
    assert facts["quantized_bits_per_weight"] == pytest.approx(exact * 8 / facts["quantized_parameters"])


@pytest.mark.parametrize("what", ["code", "scale", "zero", "norm"])
def test_verify_finds_one_wrong_bit(what: str, tmp_path) -> None:
    model = tiny_llama(num_hidden_layers=1)
    round_to_nearest(model, W4_ASYM)
    path = checkpoint.save(model, tmp_path)
    checkpoint.verify(path, model)
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        if what == "code":
            layer.qtensor.packed[3, 2] ^= 1 << 9
        elif what == "scale":
            layer.qtensor.scale[1, 1] = torch.nextafter(layer.qtensor.scale[1, 1], torch.tensor(9.0))
        elif what == "zero":
            layer.qtensor.zero_point[1, 0] ^= 1
        else:
            model.model.norm.weight[0] *= -1
    with pytest.raises(FormatError, match="norm" if what == "norm" else "up_proj"):
        checkpoint.verify(path, model)
    with pytest.raises(FormatError, match="verification failed"):
        checkpoint.load(path)
    checkpoint.save(model, path)  # a directory marked incomplete is ours to write again
    assert torch.equal(logits(checkpoint.load(path)), logits(model))


def test_failed_check_leaves_the_directory_incomplete(tmp_path) -> None:
    model = tiny_llama(num_hidden_layers=1)
    round_to_nearest(model)

    def check(stage: Path) -> dict:
        assert torch.equal(logits(checkpoint.load(stage)), logits(model))
        raise FormatError("not good enough")

    with pytest.raises(FormatError, match="not good enough"):
        checkpoint.save(model, tmp_path, check=check)
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(FormatError, match="incomplete"):
        checkpoint.load(tmp_path)
    checkpoint.save(model, tmp_path, check=lambda stage: {"kl": 0.25})
    assert read_json(tmp_path / "config.json")["quantkit"]["quality"] == {"kl": 0.25}
    written = ["README.md", "config.json", "generation_config.json", "model.safetensors", "quantkit.json"]
    assert sorted(f.name for f in tmp_path.iterdir()) == written


def test_another_model_is_only_replaced_when_asked_and_only_by_a_whole_one(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(seed=1).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    before = directory_bytes(tmp_path)
    model = tiny_llama()
    done = round_to_nearest(model)
    plan = {name: Scheme(W4) for name in done}
    with pytest.raises(FormatError, match="already holds a model"):
        checkpoint.check_output(tmp_path, model, plan)
    with pytest.raises(FormatError, match="overwrite=True"):
        checkpoint.save(model, tmp_path)
    assert directory_bytes(tmp_path) == before

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("quantkit.formats.containers.tensor_file.os.fsync", full)
        with pytest.raises(FormatError, match="No space left"):
            checkpoint.save(model, tmp_path, overwrite=True)
    assert {k: v for k, v in directory_bytes(tmp_path).items() if not k.startswith("incomplete/")} == before
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(tiny_llama(seed=1)))
    checkpoint.save(model, tmp_path, overwrite=True)
    assert torch.equal(logits(checkpoint.load(tmp_path)), logits(model))
    assert (tmp_path / "README.md").read_text() == "mine"
    assert not (tmp_path / "incomplete").exists()


def test_full_disk_in_a_fresh_directory(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(num_hidden_layers=1)
    plan = {name: Scheme(W4) for name in round_to_nearest(model)}
    size = checkpoint.check_output(tmp_path / "a", model, plan)
    assert size == sum(t.nbytes for t in load_file(checkpoint.save(model, tmp_path / "a") / "model.safetensors").values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    with pytest.raises(FormatError, match="GB are free"):
        checkpoint.check_output(tmp_path / "b", model, plan)
    assert list((tmp_path / "b").iterdir()) == []


def test_unwritable_output(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(num_hidden_layers=1)
    plan = {name: Scheme(W4) for name in round_to_nearest(model)}
    (tmp_path / "file").write_text("not a directory")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FormatError, match="file"):
            checkpoint.check_output(path, model, plan)

    def read_only(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)  # root may write anywhere, so the system call refuses
    with pytest.raises(FormatError, match="Read-only file system"):
        checkpoint.check_output(tmp_path / "new", model, plan)


# Hostile and damaged directories: each is refused with a FormatError that names the culprit, before a model is built.


@pytest.fixture
def victim(saved: tuple[PreTrainedModel, Path], tmp_path) -> Path:
    shutil.copytree(saved[1], tmp_path / "victim")
    return tmp_path / "victim"


def rewrite_header(path: Path, change) -> None:
    """Apply ``change`` to the JSON header of a safetensors file without touching its data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def overlap(header: dict) -> None:
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def beyond(header: dict) -> None:
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"][1] += 1 << 40


@pytest.mark.parametrize(
    "damage", ["truncated", "half a header", "huge header", "empty", "overlap", "beyond", "not safetensors"]
)
def test_damaged_safetensors(damage: str, victim: Path) -> None:
    file = victim / "model.safetensors"
    raw = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(raw[:-1])
    elif damage == "half a header":
        file.write_bytes(raw[:100])
    elif damage == "huge header":
        file.write_bytes((1 << 62).to_bytes(8, "little") + raw[8:])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "not safetensors":
        file.write_bytes(b"\x80\x04\x95 a pickle would be run by other loaders" * 9)
    else:
        rewrite_header(file, overlap if damage == "overlap" else beyond)
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        checkpoint.load(victim)


@pytest.mark.parametrize("target", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", 7, "weights.bin"])
def test_index_that_points_outside(target: object, victim: Path) -> None:
    names = load_file(victim / "model.safetensors")
    shutil.copy(victim / "model.safetensors", victim.parent / "model.safetensors")
    index = {"weight_map": {**dict.fromkeys(names, "model.safetensors"), "model.norm.weight": target}}
    (victim / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="beside the index"):
        checkpoint.load(victim)


def test_missing_shard_and_lying_index(victim: Path) -> None:
    tensors = load_file(victim / "model.safetensors")
    names = sorted(tensors)
    half = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, members in half.items():
        save_file({name: tensors[name] for name in members}, victim / file)
    weight_map = {name: file for file, members in half.items() for name in members}
    index = victim / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    checkpoint.load(victim)
    index.write_text(json.dumps({"weight_map": {**weight_map, names[0]: "b.safetensors"}}))
    with pytest.raises(FormatError, match="should be in b"):
        checkpoint.load(victim)
    save_file(tensors, victim / "b.safetensors")
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FormatError, match="is also in"):
        checkpoint.load(victim)
    (victim / "b.safetensors").unlink()
    with pytest.raises(FormatError, match=r"b\.safetensors: the file is missing"):
        checkpoint.load(victim)
    for text in ("{}", "[]", "{", '{"weight_map": {}}'):
        index.write_text(text)
        with pytest.raises(FormatError, match="index"):
            checkpoint.load(victim)


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{UP}.weight_packed", lambda t: t.to(torch.int64), "int64.*promises.*int32"),
        (f"{UP}.weight_packed", lambda t: t[:-1], "promises"),
        (f"{UP}.weight_scale", lambda t: t.half(), "the config promises"),
        (f"{UP}.weight_scale", lambda t: t[:, :1], "promises"),
        (f"{UP}.weight_shape", lambda t: t.flip(0), "weight_shape says"),
        ("model.norm.weight", lambda t: t.to(torch.int32), "promises.*float16"),
        ("model.norm.weight", lambda t: t[1:], "promises"),
        ("model.norm.weight", lambda t: None, "missing"),
        (f"{UP}.weight_zero_point", lambda t: None, "missing"),
    ],
)
def test_tensors_that_contradict_the_config(name: str, change, message: str, victim: Path) -> None:
    tensors = load_file(victim / "model.safetensors")
    value = change(tensors.pop(name))
    if value is not None:
        tensors[name] = value.contiguous()
    save_file(tensors, victim / "model.safetensors")
    with pytest.raises(FormatError, match=message):
        checkpoint.load(victim)


def test_unknown_tensor(victim: Path) -> None:
    tensors = load_file(victim / "model.safetensors")
    save_file({**tensors, f"{UP}.weight_g_idx": torch.zeros(64, dtype=torch.int32)}, victim / "model.safetensors")
    with pytest.raises(FormatError, match="g_idx"):
        checkpoint.load(victim)


def weights_of(config: dict) -> dict:
    return config["quantization_config"]["config_groups"]["group_0"]["weights"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: weights_of(c).update(group_size=48), "not a multiple of group_size 48"),
        (lambda c: weights_of(c).update(group_size=16), "promises"),
        (lambda c: weights_of(c).update(num_bits=8), "promises"),
        (lambda c: weights_of(c).update(num_bits=64), "int64"),
        (lambda c: weights_of(c).update(symmetric=True), "not account for"),
        (lambda c: c["quantization_config"].update(ignore=[]), "lm_head.*missing"),
        (lambda c: c["quantization_config"].update(ignore=["re:.*"]), "names no weight"),
        (lambda c: c["quantization_config"].update(quant_method="gptq"), "gptq"),
        (lambda c: c.pop("quantization_config"), "float model"),
        (lambda c: c.update(hidden_size=32), "promises|cannot"),
        (lambda c: c.update(num_hidden_layers=3), r"layers\.2.*missing"),
        (lambda c: c.update(num_hidden_layers=1), "not account for"),
        (lambda c: c.update(model_type="nonsense"), "transformers cannot read"),
        (lambda c: c.update(hidden_size="big"), "transformers cannot read"),
        (lambda c: c.update(vocab_size=10**12), r"weights, but the files can hold|than any model has"),
        (lambda c: c.update(vocab_size=10**7), "weights, but the files can hold at most"),
        (lambda c: c.update(num_hidden_layers=10**9), "layers, but the files hold only|than any model has"),
        (lambda c: c.update(num_attention_heads=0), "config.json"),
        (lambda c: c.update(hidden_size=-64), "config.json"),
    ],
)
def test_configs_that_contradict_the_tensors(change, message: str, victim: Path) -> None:
    config = read_json(victim / "config.json")
    change(config)
    (victim / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message):
        checkpoint.load(victim)


def test_directories_that_are_no_checkpoints(victim: Path, tmp_path) -> None:
    with pytest.raises(FormatError, match="not a directory"):
        checkpoint.load(tmp_path / "nowhere")
    (victim / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config\.json: cannot be read"):
        checkpoint.load(victim)
    (victim / "config.json").unlink()
    with pytest.raises(FormatError, match=r"config\.json"):
        checkpoint.inspect(victim)


def test_moe_families_go_through_the_quantkit_experts(tmp_path) -> None:
    for family in MOE_FAMILIES:
        model = FAMILIES[family]()
        round_to_nearest(model)
        loaded = checkpoint.load(checkpoint.save(model, tmp_path / family, format="native"))
        stacks = [m for m in loaded.modules() if type(m).__name__ == "QuantWeight"]
        assert len(stacks) == 2 * loaded.config.num_hidden_layers
