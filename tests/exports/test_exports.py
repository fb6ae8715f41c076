"""Programs of other compilers, and files for servers: run, or parsed, and refused where they cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import quantkit
from quantkit import Output, Scheme
from quantkit.cli import app
from quantkit.errors import FormatError
from quantkit.exports import base
from quantkit.exports.serving import SERVERS
from quantkit.spec import TOKEN_INT8, QuantSpec
from tests.tiny import FAMILIES, tiny_tokenizer

IDS = torch.arange(3, 23)[None]


def made(path: Path, scheme: Any = "w4a16-asym-g32", family: str = "llama", format: str = "compressed-tensors") -> Path:
    output = Output(path, format=format)
    quantkit.quantize(FAMILIES[family](), scheme, method="rtn", output=output, tokenizer=tiny_tokenizer())
    return path


def test_a_program_of_torch_export_runs_with_torch_alone_and_keeps_codes_packed(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    facts = quantkit.export(source, "torch-export", tmp_path / "out")
    assert facts["difference"] < 1e-5
    program = torch.export.load(tmp_path / "out" / "model.pt2")
    with torch.no_grad():
        want = quantkit.load(source, compute="exact")(input_ids=IDS).logits
        assert torch.allclose(program.module()(IDS), want, atol=1e-5)
        assert torch.allclose(program.module()(IDS[:, :5]), want[:, :5], atol=1e-5)
    assert not [node for node in program.graph.nodes if "quantkit" in str(node.target)]
    weights = [tensor for name, tensor in program.state_dict.items() if name.endswith("up_proj.packed")]
    assert [(one.dtype, tuple(one.shape)) for one in weights] == 2 * [(torch.int32, (96, 8))]


@pytest.mark.slow
def test_aotinductor_compiles_the_program(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    quantkit.export(source, "torch-export", tmp_path / "out")
    program = torch.export.load(tmp_path / "out" / "model.pt2")
    compiled = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
    with torch.no_grad():
        want = quantkit.load(source, compute="exact")(input_ids=IDS).logits
        assert torch.allclose(torch._inductor.aoti_load_package(compiled)(IDS), want, atol=1e-5)


def test_what_cannot_be_exported_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = made(tmp_path / "rounded", Scheme(QuantSpec("int8"), TOKEN_INT8))
    with pytest.raises(FormatError, match="QuantLinear int8 channel is not exported"):
        quantkit.export(rounded, "torch-export", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FormatError, match="unknown target 'openvinoo'; did you mean 'openvino'"):
        quantkit.export(rounded, "openvinoo", tmp_path / "out")
    with pytest.raises(FormatError, match="is not empty"):
        quantkit.export(rounded, "torch-export", rounded)
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(FormatError, match="pip install openvino"):
        quantkit.export(rounded, "openvino", tmp_path / "out")
    with pytest.raises(FormatError, match=r"differ from quantkit's by 0\.5"):
        base.compare(0.5, tmp_path, "something")


def test_openvino_computes_what_quantkit_does(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    openvino = pytest.importorskip("openvino")
    source = made(tmp_path / "source", "w4a16-g32")
    facts = quantkit.export(source, "openvino", tmp_path / "out")
    assert facts["difference"] < 1e-4
    model = openvino.Core().read_model(tmp_path / "out" / "openvino_model.xml")
    kinds = [one.get_element_type() for one in model.get_ops() if one.get_type_name() == "Constant"]
    assert kinds.count(openvino.Type.u4) >= 14
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("server", sorted(SERVERS))
def test_files_for_servers(tmp_path: Path, server: str) -> None:
    format = SERVERS[server].formats[0]
    source = made(tmp_path / 'Tiny "model": 1', "Q8_0" if format == "gguf" else "w4a16-g32", format=format)
    done = CliRunner().invoke(app, ["package", str(source), "--for", server, "--json"])
    assert done.exit_code == 0, done.output
    files = [Path(name) for name in json.loads(done.stdout)]
    assert all(file.is_relative_to(source) for file in files)
    texts = {file.name: file.read_text() for file in files}
    for name, text in texts.items():
        if name.endswith(".yaml"):
            assert list(yaml.safe_load_all(text))
    if server == "vllm":
        assert yaml.safe_load(texts["vllm.yaml"])["model"] == str(source)
        deployment, service = yaml.safe_load_all(texts["deployment.yaml"])
        assert (
            service["spec"]["selector"]["app"] == deployment["spec"]["template"]["metadata"]["labels"]["app"] == "tiny-model-1"
        )
    elif server == "ray":
        config = yaml.safe_load(texts["serve.yaml"])["applications"][0]["args"]["llm_configs"][0]
        assert config["model_loading_config"]["model_source"] == str(source)
    elif server == "triton":
        assert json.loads(texts["model.json"])["model"] == str(source)
        assert 'backend: "vllm"' in texts["config.pbtxt"]
    else:
        assert "FROM ./model.gguf\n" in texts["Modelfile"]
        assert 'PARAMETER stop "<eos>"' in texts["Modelfile"]
    quantkit.load(source)
    with pytest.raises(FormatError, match="is there already"):
        quantkit.package(source, server)
    assert quantkit.package(source, server, overwrite=True) == files


def test_a_server_that_does_not_read_the_format_is_refused(tmp_path: Path) -> None:
    source = made(tmp_path / "source", "w4a16-g32")
    with pytest.raises(FormatError, match=r"ollama does not read format compressed-tensors; it reads gguf: quantkit convert"):
        quantkit.package(source, "ollama")
    with pytest.raises(FormatError, match="unknown server 'olama'; did you mean 'ollama'"):
        quantkit.package(source, "olama")
