"""Models with towers and next-token-prediction layers: nothing of the source is lost, and its own readers read the result."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel

from quantkit import checkpoint
from quantkit.checkpoint.card import card
from quantkit.checkpoint.contents import contents_of
from quantkit.errors import FormatError, SpecError
from quantkit.hf.ledger import ledger_of
from quantkit.hf.load import load_float
from quantkit.hf.mend import mend
from quantkit.hf.paged import context_tokens
from quantkit.hf.source import load_config
from quantkit.pipeline.estimate import estimate
from quantkit.pipeline.quantize import plan, quantize
from quantkit.pipeline.result import QuantizeResult
from quantkit.pipeline.rules import Rule
from quantkit.pipeline.settings import Output, Run
from quantkit.quantizers.rtn import RTN
from quantkit.system.progress import Progress
from tests.towers import ABOUT_AN_IMAGE, CONFIGS, EXTRA, IMAGE, PROCESSORS, inputs, write, write_files

SEEDS, WITHIN = 24, 1.25
"""So many texts, each with and without an image of its own, and what their KL divergences may differ by: means of single texts
lie a factor of ten apart."""


@torch.no_grad()
def logits(model: nn.Module, name: str, *, image: bool = False, seed: int = 1) -> Tensor:
    return model(**inputs(name, image=image, seed=seed)).logits


def kl(float_logits: Tensor, other: Tensor) -> float:
    p, q = float_logits.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


Made = tuple[Path, PreTrainedModel, Path, QuantizeResult]


@pytest.fixture(scope="module", params=CONFIGS)
def made(request, tmp_path_factory) -> tuple[str, Made]:
    """Name of a model, its float directory, the float model, the checkpoint's directory, and what quantize returned."""
    path = tmp_path_factory.mktemp(request.param)
    model = write(request.param, path / "m")
    write_files(request.param, path / "m")
    result = quantize(path / "m", "w8a16", method="rtn", out=path / "q")
    return request.param, (path / "m", model, path / "q", result)


def test_the_ledger_adds_up_to_the_source(made) -> None:
    name, (path, _, out, result) = made
    source = load_file(path / "model.safetensors")
    ledger = ledger_of(result.model)
    placed = {one for names in ledger.fills.values() for one in names}
    assert sorted(ledger.carried) == sorted(EXTRA[name])
    assert placed | set(ledger.carried) == source.keys()
    before, after = (sum(getattr(row, part) for row in result.coverage) for part in ("bytes_before", "bytes_after"))
    assert before == sum(tensor.nbytes for tensor in source.values())
    assert {row.name for row in result.coverage if row.kind == "carried over"} == set(EXTRA[name])
    written = load_file(out / "model.safetensors")
    for extra in EXTRA[name]:
        assert torch.equal(written[extra], source[extra])
        assert written[extra].dtype == source[extra].dtype
    found = checkpoint.inspect(out)
    assert found["carried_over"]["tensors"] == len(EXTRA[name])
    assert found["tensor_bytes"] == after == sum(tensor.nbytes for tensor in written.values())


def test_the_sources_own_class_reads_the_result(made) -> None:
    name, (_, model, out, result) = made
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == CONFIGS[name]["architectures"]
    ignored = config["quantization_config"]["ignore"]
    assert {one.removesuffix(".weight") for one in EXTRA[name] if "norm" not in one and "bias" not in one} <= set(ignored)
    loaded = checkpoint.load(out)
    assert torch.equal(logits(loaded, name), logits(result.model, name))
    mend(model)
    old = name == "gemma3" and transformers.__version__.startswith("5.17.")  # unpacks weights in the scales' dtype
    theirs = loaded if old else getattr(transformers, config["architectures"][0]).from_pretrained(out)
    mend(theirs)
    assert kl(logits(theirs, name), logits(loaded, name)) < 1e-5
    if "vision_config" not in config:
        return
    text, about_an_image = (
        sum(kl(logits(model, name, image=image, seed=s), logits(theirs, name, image=image, seed=s)) for s in range(SEEDS))
        for image in (False, True)
    )
    assert about_an_image < WITHIN * text
    assert torch.equal(logits(loaded, name, image=True), logits(result.model, name, image=True))


def test_a_tower_does_not_limit_the_text(made) -> None:
    name, (_, model, _, _) = made
    config = CONFIGS[name]
    assert context_tokens(model) == config.get("text_config", config)["max_position_embeddings"]


def test_towers_stay_float(made) -> None:
    _, (_, model, out, _) = made
    written = checkpoint.load(out).state_dict()
    towers = [one for one in model.state_dict() if "vis" in one or "projector" in one]
    for tower in towers:
        assert torch.equal(written[tower], model.state_dict()[tower])


def test_a_foreign_tensor_is_still_refused(made, tmp_path) -> None:
    name, (_, _, out, _) = made
    config = json.loads((out / "config.json").read_text())
    if not EXTRA[name]:
        return
    config["quantkit"]["carried_over"].pop()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(out / "model.safetensors")
    if name != "qwen3_5":  # whose class says itself that it passes over them
        with pytest.raises(FormatError, match="1 tensors that the config does not account for"):
            checkpoint.load(tmp_path)
    config["quantkit"]["carried_over"] = ["mtp.nowhere"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"mtp\.nowhere, carried over from the source, is missing"):
        checkpoint.load(tmp_path)


def test_strict_wants_a_word_about_what_is_carried_over(tmp_path) -> None:
    write("qwen3_5", tmp_path / "m")
    strict = Run(strict=True)
    with pytest.raises(SpecError, match=r"mtp\.fc\.weight .*does not know it"):
        quantize(tmp_path / "m", method="rtn", run=strict)
    rules = [Rule("mtp.*", skip=True)]
    done = quantize(tmp_path / "m", plan(tmp_path / "m", rules=rules), method="rtn", run=strict, out=tmp_path / "q")
    assert done.path is not None


def test_a_source_that_changes_meanwhile(tmp_path, monkeypatch) -> None:
    write("deepseek_v3", tmp_path / "m")
    model, _ = load_float(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(FormatError):
        quantize(model, method="rtn", out=tmp_path / "q")
    assert not (tmp_path / "q" / "config.json").exists()


def test_an_interrupted_run_goes_on_and_the_estimate_is_exact(tmp_path, caplog) -> None:
    class Stop(Exception):
        pass

    def stop(event: Progress) -> None:
        if event.stage == "quantize" and event.done > 9:
            raise Stop

    write("deepseek_v3", tmp_path / "m")
    native = Output(format="native")
    with pytest.raises(Stop):
        quantize(tmp_path / "m", method="rtn", out=tmp_path / "b", output=native, run=Run(progress=stop))
    for out in ("a", "b"):
        quantize(tmp_path / "m", method="rtn", out=tmp_path / out, output=native)
    a, b = ({file.name: file.read_bytes() for file in (tmp_path / out).iterdir()} for out in ("a", "b"))
    assert a == b
    contents = contents_of(load_config(tmp_path / "m"), weights=tmp_path / "m")
    predicted = estimate(contents, plan(tmp_path / "m").plan, RTN(), format="native")
    assert predicted.total_bytes == checkpoint.inspect(tmp_path / "a")["tensor_bytes"]
    assert predicted.float_bytes == sum(tensor.nbytes for tensor in load_file(tmp_path / "m" / "model.safetensors").values())
    caplog.clear()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    quantize(theirs, method="rtn")
    assert f"holds {len(EXTRA['deepseek_v3'])} tensors that a DeepseekV3ForCausalLM does not know" in caplog.text


def test_files_beside_the_weights(made) -> None:
    name, (path, _, out, result) = made
    same = {"LICENSE.txt", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    same |= {file.name for file in path.iterdir() if "processor" in file.name or file.suffix == ".jinja"} - {".hidden.jinja"}
    assert PROCESSORS.get(name, {}).keys() <= same
    for file in same:
        assert (out / file).read_bytes() == (path / file).read_bytes(), file
    names = {file.name for file in out.iterdir()}
    assert not names & {"modeling_evil.py", ".hidden.jinja", "consolidated.safetensors", "NOTICE"}
    if name not in ABOUT_AN_IMAGE:
        text = "the cat sat"
        assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(path)(text)
        return
    if name in PROCESSORS:
        pytest.importorskip("torchvision", exc_type=ImportError)
    processor = AutoProcessor.from_pretrained(out)
    assert type(processor) is type(AutoProcessor.from_pretrained(path))
    batch = processor(images=Image.new("RGB", (40, 40), (200, 10, 10)), text=ABOUT_AN_IMAGE[name], return_tensors="pt")
    batch = batch.to(torch.float32)  # one processor makes bfloat16
    assert int((batch["input_ids"] == IMAGE).sum()) >= 4
    with torch.no_grad():
        found = checkpoint.load(out)(**batch).logits
        assert torch.equal(found, result.model(**batch).logits)


def test_a_tokenizer_of_ones_own_is_written_instead(tmp_path, tiny_float) -> None:
    from quantkit.hf.load import load_tokenizer

    changed = load_tokenizer(tiny_float)
    assert changed is not None
    changed.chat_template = "{{ messages[0].content }}"
    quantize(tiny_float, method="rtn", out=tmp_path / "q", tokenizer=changed, output=Output(format="native"))
    again = load_tokenizer(tmp_path / "q")
    assert again is not None
    assert again.chat_template == changed.chat_template


def test_the_model_card(made, tmp_path) -> None:
    name, (path, _, out, result) = made
    text = (out / "README.md").read_text()
    kind = CONFIGS[name]["architectures"][0]
    for part in (kind, "int8", "KL to the float model", "quantkit.load(", f"{kind}.from_pretrained(", "vllm serve"):
        assert part in text
    assert str(path) not in text
    assert ("carried over unchanged" in text) == bool(EXTRA[name])
    if name == "deepseek_v3":
        (tmp_path / "README.md").write_text("mine")
        checkpoint.save(result.model, tmp_path)
        assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([True], 'LlamaForCausalLM.from_pretrained("path/to/this/directory")'),
        ([True, True], 'LlamaForCausalLM.from_pretrained("path/to/this/directory")'),
        ([False], 'directory", quantization_config=CompressedTensorsConfig(dequantize=True))'),
        ([True, False], "does not read models in which layers differ and some have zero points"),
    ],
)
def test_the_card_says_how_transformers_reads_it(groups, says) -> None:
    stored = {str(i): {"format": "pack-quantized", "weights": {"symmetric": one}} for i, one in enumerate(groups)}
    config = {"architectures": ["LlamaForCausalLM"], "quantkit": {"format": "compressed-tensors", "version": "1"}}
    quantization = {"quant_method": "compressed-tensors", "config_groups": stored}
    assert says in card({**config, "quantization_config": quantization}, {}, "base")
