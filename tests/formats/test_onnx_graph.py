"""What ONNX Runtime makes of our ONNX files, beside what quantkit makes of them: logits, with and without keys and values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit import Output, QuantSpec, Scheme, reformat
from quantkit.errors import FormatError
from quantkit.formats.base import FORMATS
from quantkit.formats.containers.directory import places_of
from quantkit.formats.onnx.container import STEM
from quantkit.formats.onnx.graph import graph_of
from tests.qtensors import assert_same, random_qtensor
from tests.tiny import FAMILIES, tiny_tokenizer

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

IDS = torch.arange(3, 23)[None]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}


def made(path: Path, family: str = "llama", scheme: Any = "w4a16-g32", format: str = "onnx", **config: Any) -> Path:
    model = FAMILIES[family](**config)
    output = Output(path, format=format)
    quantkit.quantize(model, scheme, method="rtn", output=output, tokenizer=tiny_tokenizer())
    return path


def run(path: Path, steps: list[torch.Tensor]) -> torch.Tensor:
    """Return the logits of ONNX Runtime, keys and values handed on from step to step."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
    config = json.loads((path / "genai_config.json").read_text())["model"]["decoder"]
    shape = (1, config["num_key_value_heads"], 0, config["head_size"])
    names = [one.name for one in session.get_inputs() if one.name.startswith("past")]
    past = {name: torch.zeros(shape).numpy() for name in names}
    found, seen = [], 0
    for ids in steps:
        seen += ids.shape[1]
        mask = torch.ones(1, seen, dtype=torch.int64).numpy()
        logits, *present = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask, **past})
        past = dict(zip(names, present, strict=True))
        found.append(torch.from_numpy(logits))
    return torch.cat(found, 1)


def plain(path: Path) -> Path:
    """Replace the graph by one of ONNX's own operators; return the directory."""
    config = json.loads((path / "config.json").read_text())
    (path / "model.onnx").write_bytes(graph_of(config, places_of(path, STEM), plain=True))
    return path


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("llama", "w4a16-g32"),
        ("llama_tied", "w4a16-asym-g32"),
        ("qwen3", Scheme(QuantSpec("int8", (1, 16), False))),
        ("mistral", "w8a16-g32"),
    ],
)
def test_weights_that_onnx_itself_decodes_are_the_same(tmp_path: Path, family: str, scheme: Any) -> None:
    path = made(tmp_path / "out", family, scheme, "onnx-qdq")
    with torch.no_grad():
        want = quantkit.load(path, compute="exact")(input_ids=IDS).logits
    assert relative(run(path, [IDS[:, :7], *IDS[:, 7:].split(1, 1)]), want) < 1e-5
    import onnx

    kinds = {node.op_type for node in onnx.load(path / "model.onnx", load_external_data=False).graph.node}
    assert "DequantizeLinear" in kinds
    assert "MatMulNBits" not in kinds
    reformat(path, "onnx", tmp_path / "other")
    reformat(tmp_path / "other", "onnx-qdq", tmp_path / "back")
    assert (path / "onnx.safetensors").read_bytes() == (tmp_path / "back" / "onnx.safetensors").read_bytes()


def test_zero_points_of_an_odd_number_of_groups_have_no_padding(tmp_path: Path) -> None:
    spec = QuantSpec("int4", (1, 16), symmetric=False)
    qtensor = random_qtensor(spec, (6, 48))
    tensors = FORMATS.get("onnx-qdq").codec(Scheme(spec)).encode(qtensor)
    assert tensors["zero_points"].shape == (9,)
    low, high = tensors["zero_points"] & 15, tensors["zero_points"] >> 4
    assert qtensor.zero_point is not None
    assert torch.equal(torch.stack([low, high], 1).flatten(), qtensor.zero_point.flatten())
    assert_same(FORMATS.get("onnx-qdq").codec(Scheme(spec)).decode(tensors, spec, (6, 48)), qtensor)


def test_two_bits_and_half_bytes_of_zero_points_are_refused_by_name() -> None:
    dialect = FORMATS.get("onnx-qdq").dialect
    assert "use format onnx" in str(dialect.rejects(Scheme(QuantSpec("int2", (1, 16), False)), (8, 64)))
    assert "do not fill whole bytes" in str(dialect.rejects(Scheme(QuantSpec("int4", (1, 16), False)), (3, 48)))


@pytest.mark.parametrize(
    ("family", "scheme", "config"),
    [
        ("llama", "w4a16-g32", {"num_hidden_layers": 3}),
        ("llama_tied", "w4a16-asym-g32", {"rope_parameters": LLAMA3}),
        ("mistral", "w8a16-g32", {}),
        ("qwen2", Scheme(QuantSpec("int2", (1, 16), False)), {}),
        ("qwen3", Scheme(QuantSpec("int8", (1, 16), False)), {"num_key_value_heads": 1}),
    ],
)
def test_onnx_runtime_computes_what_quantkit_does(tmp_path: Path, family: str, scheme: Any, config: dict[str, Any]) -> None:
    path = made(tmp_path / "out", family, scheme, **config)
    with torch.no_grad():
        want = quantkit.load(path, compute="exact")(input_ids=IDS).logits
    assert relative(run(path, [IDS]), want) < 1e-5
    steps = [IDS[:, :7], IDS[:, 7:9], *IDS[:, 9:].split(1, 1)]
    assert relative(run(path, steps), want) < 1e-5
    assert relative(run(plain(path), steps), want) < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened(tmp_path: Path, dtype: str) -> None:
    model = FAMILIES["llama"]().to(getattr(torch, dtype))
    quantkit.quantize(model, "w4a16-g32", method="rtn", out=tmp_path, output=Output(format="onnx"))
    with torch.no_grad():
        want = quantkit.load(tmp_path, dtype=torch.float32)(input_ids=IDS).logits
    assert relative(run(tmp_path, [IDS]), want) < 1e-4


def test_int8_activations_are_another_name_for_the_same_weights(tmp_path: Path) -> None:
    exact = made(tmp_path / "exact")
    reformat(exact, "onnx-int8", tmp_path / "rounded")
    assert (exact / "onnx.safetensors").read_bytes() == (tmp_path / "rounded" / "onnx.safetensors").read_bytes()
    want, got = run(exact, [IDS]), run(tmp_path / "rounded", [IDS])
    assert 1e-5 < relative(got, want) < 0.05
    assert quantkit.inspect(tmp_path / "rounded")["format"] == "onnx-int8"


def test_rules_heads_and_big_files_go_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.formats.containers.directory.MAX_FILE_BYTES", 40_000)
    rules = [quantkit.Rule(match="*.down_proj", skip=True), quantkit.Rule(match="head", scheme="w8a16-g32")]
    model = FAMILIES["qwen2"]()
    quantkit.quantize(model, "w4a16-g32", method="rtn", rules=rules, out=tmp_path, output=Output(format="onnx"))
    assert len(list(tmp_path.glob("onnx-*-of-*.safetensors"))) > 1
    with torch.no_grad():
        want = quantkit.load(tmp_path)(input_ids=IDS).logits
    assert relative(run(tmp_path, [IDS]), want) < 1e-5


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_points_of_odd_numbers_of_blocks_go_there_and_back(bits: int, symmetric: bool) -> None:
    spec, shape = QuantSpec(f"int{bits}", (1, 16), symmetric, "bfloat16"), (5, 16 * 13)
    codec = FORMATS.get("onnx").codec(Scheme(spec))
    qtensor = random_qtensor(spec, shape)
    tensors = codec.encode(qtensor)
    assert {name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()} == codec.layout(spec, shape)
    assert_same(codec.decode(tensors, spec, shape), qtensor)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("gemma3", {}, "an ONNX graph of a gemma3_text model is not written, only of llama"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"head_dim": 8}, "heads of 8 channels"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "rotary embeddings"),
    ],
)
def test_models_that_the_graph_does_not_say_are_refused(tmp_path: Path, family: str, config: Any, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        made(tmp_path, family, **config)
    assert not (tmp_path / "config.json").exists()


def test_without_the_package_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(FormatError, match=r"pip install 'quantkit\[onnx\]'"):
        made(tmp_path)
