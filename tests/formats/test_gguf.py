"""Format gguf: what is written is read alike by quantkit and by transformers, what cannot be said is refused before work."""

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import nn

import quantkit
from quantkit import checkpoint
from quantkit.errors import FormatError, QuantkitError, SpecError
from quantkit.formats.base import FORMATS
from quantkit.formats.gguf.architectures import turned
from quantkit.formats.gguf.container import FILE
from quantkit.formats.gguf.file import GgufHeader
from quantkit.formats.gguf.mixes import mix_plan
from quantkit.formats.gguf.tokenizer import pre_tokenizer
from quantkit.hf.load import load_float
from quantkit.hf.structure import describe
from quantkit.kernels import KERNELS
from quantkit.kernels.select import Problem
from quantkit.pipeline.imatrix import save_imatrix
from quantkit.spec import block_spec
from tests.tiny import FAMILIES, TEXT, tiny_llama, tiny_tokenizer

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def write(out: Path, model: nn.Module, scheme: Any = "Q4_K_M", **options: Any) -> Any:
    output = quantkit.Output(format="gguf")
    return quantkit.quantize(model, scheme, method="rtn", out=out, output=output, tokenizer=tiny_tokenizer(), **options)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([tiny_tokenizer()(TEXT)["input_ids"][:20]])).logits
    return found


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
        ("qwen2", {"head_dim": None}),
        ("qwen3", {"head_dim": 128}),
    ],
)
def test_transformers_reads_what_we_wrote(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    result = write(tmp_path / "x", FAMILIES[family](**WIDE | config))
    assert {"Q4_K", "Q6_K"} <= {scheme.describe() for scheme in result.plan.values()}
    wanted = logits(result.model)
    assert torch.equal(logits(quantkit.load(tmp_path / "x")), wanted)
    theirs, tokenizer = load_float(tmp_path / "x" / FILE, torch.float32)
    assert torch.allclose(logits(theirs), wanted, atol=1e-4)
    assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]


@pytest.mark.parametrize("family", ["llama_tied", "mixtral", "qwen3_moe"])
def test_biases_and_experts_come_back(family: str, tmp_path: Path) -> None:
    result = write(tmp_path / "x", FAMILIES[family](), "Q5_0")
    assert torch.equal(logits(quantkit.load(tmp_path / "x", verify=True)), logits(result.model))
    stored = GgufHeader(tmp_path / "x" / FILE).tensors
    if family != "llama_tied":
        assert stored["blk.1.ffn_gate_exps.weight"].shape == (4, 96, 64)
        assert stored["blk.1.ffn_gate_inp.weight"].type == "F32"
        assert not [name for name in stored if "experts" in name]


def test_other_dtypes_and_layers_in_float(tmp_path: Path) -> None:
    model = tiny_llama(**WIDE)
    for parameter in model.parameters():  # and not the rotary frequencies
        parameter.data = parameter.data.bfloat16()
    rules = [quantkit.Rule("model.layers.0.*", skip=True), quantkit.Rule("embedding", skip=True)]
    result = write(tmp_path / "x", model, rules=rules)
    stored = GgufHeader(tmp_path / "x" / FILE).tensors
    assert stored["blk.0.attn_q.weight"].type == stored["token_embd.weight"].type == "BF16"
    assert stored["blk.1.attn_q.weight"].type == "Q4_K"
    assert stored["blk.0.attn_norm.weight"].type == "F32"
    assert torch.equal(logits(quantkit.load(tmp_path / "x")), logits(result.model))


def test_rows_are_turned_and_turned_back(tmp_path: Path) -> None:
    assert turned(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    model = tiny_llama()
    before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    write(tmp_path / "x", model, "Q8_0", rules=[quantkit.Rule("*layers.0.self_attn.q_proj", skip=True)])
    tensor = next(one for one in gguf.GGUFReader(tmp_path / "x" / FILE).tensors if one.name == "blk.0.attn_q.weight")
    assert torch.equal(torch.from_numpy(tensor.data.copy()), before[turned(64, 4)])


def test_the_file_says_what_the_model_is(tmp_path: Path) -> None:
    write(tmp_path / "x", tiny_llama(), "Q8_0")
    keys = GgufHeader(tmp_path / "x" / FILE).keys
    wanted = {"general.architecture": "llama", "llama.block_count": 2, "llama.attention.head_count_kv": 2}
    wanted |= {"llama.rope.dimension_count": 16, "llama.vocab_size": 192, "tokenizer.ggml.pre": "gpt-2"}
    assert {key: keys[key] for key in wanted} == wanted
    assert checkpoint.inspect(tmp_path / "x")["format"] == "gguf"


def test_a_mix_has_llama_cpps_types() -> None:
    """Layers, heads and rows of SmolLM2, whose types llama-quantize was asked for (without blocks of 256 in rows of 576)."""
    sizes = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "head_dim": 64}
    sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    with torch.device("meta"):
        model = FAMILIES["llama"](**sizes)
    plan = {name: scheme.describe() for name, scheme in mix_plan(describe(model), "Q4_K_M").items()}
    back = [plan[f"model.layers.{index}.mlp.down_proj"] for index in range(30)]
    values = [plan[f"model.layers.{index}.self_attn.v_proj"] for index in range(30)]
    more = {*range(3), *range(26, 30), 5, 8, 11, 14, 17, 20, 23}
    assert back == ["Q6_K" if index in more else "Q4_K" for index in range(30)]
    assert values == ["Q8_0" if index in more else "Q5_0" for index in range(30)]
    assert plan["model.embed_tokens"] == "Q8_0"
    assert {plan[name] for name in plan if "gate" in name or "o_proj" in name} == {"Q5_0"}
    third = {name: scheme.describe() for name, scheme in mix_plan(describe(model), "Q3_K_M").items()}
    assert third["model.layers.0.mlp.down_proj"] == "Q5_K"
    assert third["model.layers.9.mlp.down_proj"] == "Q4_K"
    assert third["model.layers.1.self_attn.v_proj"] == "Q5_1"
    assert third["model.layers.9.self_attn.q_proj"] == "Q4_0"


def test_what_a_gguf_file_cannot_say_is_refused_before_work(tmp_path: Path) -> None:
    def refused(match: str, model: nn.Module, scheme: Any = "Q8_0", kind: type[QuantkitError] = FormatError) -> None:
        with pytest.raises(kind, match=match):
            write(tmp_path / "x", model, scheme)
        assert not (tmp_path / "x" / FILE).exists()

    refused("a GGUF of a gemma2 model is not written, only of llama", FAMILIES["gemma2"]())
    refused("sliding_window is 8, and llama.cpp computes a mistral model as if it were None", FAMILIES["mistral"]())
    refused("a GGUF file holds blocks .* not int4 g32", tiny_llama(), "w4a16-g32", SpecError)
    odd = tiny_llama()
    odd.config.logit_scale = 3.0
    refused("nothing is known here of logit_scale=3.0", odd)
    refused("hidden_act is 'gelu'", tiny_llama(hidden_act="gelu"))


def test_other_formats_refuse_blocks(tmp_path: Path) -> None:
    for name in ("native", "compressed-tensors"):
        with pytest.raises(SpecError, match="use format gguf"):
            quantkit.quantize(tiny_llama(), "Q8_0", method="rtn", out=tmp_path, output=quantkit.Output(format=name))
    with pytest.raises(SpecError, match="use quantizer gptq"):
        quantkit.quantize(tiny_llama(), "Q8_0", method="hqq", out=tmp_path, output=quantkit.Output(format="gguf"))


def test_a_way_of_splitting_that_llama_cpp_has_no_name_for_is_refused() -> None:
    said = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    assert pre_tokenizer(said) == "gpt-2"
    digits = {"type": "Digits", "individual_digits": True}
    assert (
        pre_tokenizer(said | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, said["pre_tokenizer"]]}})
        == "smollm"
    )
    for step in (None, {"type": "Whitespace"}, digits, said["pre_tokenizer"] | {"add_prefix_space": True}):
        with pytest.raises(FormatError, match=r"tokenizer\.json: text is split by"):
            pre_tokenizer(said | {"pre_tokenizer": step})
    with pytest.raises(FormatError, match="only byte-level BPE"):
        pre_tokenizer(said | {"model": {"type": "Unigram"}})


def test_a_finished_file_goes_on_and_is_the_same_again(tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    result = quantkit.quantize(model, "Q4_0", method="rtn", tokenizer=tokenizer)
    for name in ("a", "b"):
        quantkit.save(result.model, tmp_path / name, format="gguf", tokenizer=tokenizer)
    first = (tmp_path / "a" / FILE).read_bytes()
    assert (tmp_path / "b" / FILE).read_bytes() == first
    config = FORMATS.get("gguf").container.config(tmp_path / "a")
    assert config is not None
    container = FORMATS.get("gguf").container
    with container.reader(tmp_path / "a") as reader:
        tensors = {name: reader.read(name) for name in reader.headers}
    writer = container.writer(tmp_path / "a", [{n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}])
    assert container.config(tmp_path / "a") is None
    assert all(torch.equal(writer.read(name), tensor) for name, tensor in tensors.items())
    writer.finish(config)
    assert (tmp_path / "a" / FILE).read_bytes() == first


def test_hostile_files_are_one_error(tmp_path: Path) -> None:
    write(tmp_path / "x", tiny_llama(num_hidden_layers=1), "Q4_0")
    file = tmp_path / "x" / FILE
    whole, chance = file.read_bytes(), random.Random(0)
    for trial in range(300):
        damaged = bytearray(whole[: chance.randrange(len(whole))] if trial % 3 == 0 else whole)
        for _ in range(chance.randint(1, 6) if damaged else 0):
            damaged[chance.randrange(min(len(damaged), 3000))] = chance.randrange(256)
        (tmp_path / "damaged").write_bytes(damaged)
        with contextlib.suppress(FormatError):  # damage may also be in a name, which is then another
            GgufHeader(tmp_path / "damaged")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    for change in ({"num_hidden_layers": 10**9}, {"num_attention_heads": 0}, {"num_key_value_heads": 3}, {"hidden_size": "x"}):
        (tmp_path / "x" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(QuantkitError, match=r"config|heads"):
            quantkit.load(tmp_path / "x")
    names = {"tensors": {"model.layers.{}.{0.__class__}.weight": ["blk.{}.attn_q.weight", "float32"]}}
    for broken in (names, {"tensors": 3}, {"tensors": {}}, {"types": 3}, {"types": {"Q9": ["a"]}}, {"version": 9}):
        damaged_config = config | {"quantization_config": config["quantization_config"] | broken}
        (tmp_path / "x" / "config.json").write_text(json.dumps(damaged_config))
        with pytest.raises(QuantkitError):
            quantkit.load(tmp_path / "x")
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    file.write_bytes(whole[:-100])
    with pytest.raises(FormatError, match="outside the file"):
        quantkit.load(tmp_path / "x")


def test_the_kernel_of_blocks_multiplies_what_they_stand_for() -> None:
    kernel, spec = KERNELS.get("blocks"), block_spec("Q4_K")
    qtensor = quantkit.RTN().quantize(torch.randn(24, 256), spec, None)[0]
    assert kernel.rejects(Problem(spec, (24, 256), "cpu", torch.float32)) is None
    state = kernel.prepack(qtensor)
    assert kernel.unpack(state, spec) is qtensor
    x, bias = torch.randn(5, 256), torch.randn(24)
    assert torch.allclose(kernel.matmul(x, state, bias), x @ qtensor.dequantize().T + bias, atol=1e-5)
    assert kernel.matmul(x.bfloat16(), state, None).dtype == torch.bfloat16


def test_an_importance_matrix_has_every_weight_and_every_expert(tmp_path: Path) -> None:
    model = FAMILIES["qwen3_moe"]()
    calibration = quantkit.Calibration([TEXT], samples=4, length=32, all_experts=True)
    statistics, _ = quantkit.collect(model, ("mean_square",), calibration=calibration, tokenizer=tiny_tokenizer())
    save_imatrix(tmp_path / "x.gguf", model, statistics, length=32)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == 4
    layer = statistics["model.layers.1.mlp.experts.gate_up_proj"]
    for name in ("gate", "up"):
        total, count = tensors[f"blk.1.ffn_{name}_exps.weight.in_sum2"], tensors[f"blk.1.ffn_{name}_exps.weight.counts"]
        assert total.shape == (4, 64)
        assert count[:, 0].tolist() == list(layer.tokens) == [128] * 4
        assert torch.allclose(torch.from_numpy(total / count), layer.results["mean_square"].float(), rtol=1e-5)
    assert tensors["blk.0.attn_q.weight.in_sum2"].shape == (1, 64)
    assert len(tensors) == 2 * 2 * 7


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_mxfp4_is_read_by_the_gguf_package_and_comes_from_compressed_tensors(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    outputs = [quantkit.Output(tmp_path / "x", format="gguf"), quantkit.Output(tmp_path / "native", format="native")]
    result = quantkit.quantize(model, "mxfp4", method="rtn", output=outputs, tokenizer=tiny_tokenizer())
    loaded = checkpoint.load(tmp_path / "x", dtype=torch.float32, compute="exact")
    assert torch.equal(logits(loaded), logits(checkpoint.load(tmp_path / "native", dtype=torch.float32, compute="exact")))
    name = "blk.0.ffn_down.weight" if family == "llama" else "blk.0.ffn_down_exps.weight"
    stored = next(one for one in gguf.GGUFReader(tmp_path / "x" / FILE).tensors if one.name == name)
    assert stored.tensor_type == gguf.GGMLQuantizationType.MXFP4
    theirs = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
    layers = [layer for where, layer in result.model.named_modules() if ".0." in where and where.endswith(("down_proj", "w2"))]
    ours = torch.stack([layer.dequantize() for layer in layers]) if family == "mixtral" else layers[0].dequantize()
    assert torch.equal(theirs.view_as(ours), ours)


def test_a_file_is_loaded_as_floats(tmp_path: Path) -> None:
    result = write(tmp_path / "x", tiny_llama(num_hidden_layers=1), "Q8_0")
    assert torch.allclose(logits(quantkit.load(tmp_path / "x" / FILE)), logits(result.model), atol=1e-4)
