"""Quantized embeddings and heads: the module, the plan, the checkpoint, the engine."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from quantkit import Engine, load, quantize
from quantkit.errors import FormatError, SpecError
from quantkit.hf.native import native_decoder
from quantkit.hf.structure import describe
from quantkit.kernels.cpu.decoder import NativeDecoder
from quantkit.nn.embedding import QuantEmbedding
from quantkit.nn.linear import QuantLinear
from quantkit.numerics import grid
from quantkit.pipeline.plan import make_plan
from quantkit.pipeline.rules import Rule
from quantkit.pipeline.settings import Output
from quantkit.presets import preset
from quantkit.quantizers.rtn import nearest
from quantkit.recipe.schema import Recipe
from quantkit.spec import QuantSpec
from tests import tiny

SPECS = [QuantSpec("int8", (1, 32)), QuantSpec("int4", (1, 16), symmetric=False), QuantSpec("fp8_e4m3"), QuantSpec("int3")]
IDS = torch.randint(3, tiny.VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spec", SPECS, ids=QuantSpec.describe)
def test_rows_are_those_of_the_dequantized_table(spec: QuantSpec) -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    table = QuantEmbedding(nearest(weight, grid.choose_qparams(weight, spec), spec), torch.bfloat16)
    ids = torch.tensor([[0, 39, 7], [7, 7, 1]])
    assert torch.equal(table(ids), table.dequantize(torch.bfloat16)[ids])
    assert torch.equal(table.float()(ids), table.dequantize()[ids])
    assert table.qtensor.scale.dtype == torch.float16
    assert table(torch.zeros(0, dtype=torch.int64)).shape == (0, 64)
    assert torch.equal(table.weight, table.dequantize())


def test_scales_shared_by_rows_are_refused() -> None:
    weight, spec = torch.randn(8, 16), QuantSpec("int8", (-1, -1))
    with pytest.raises(SpecError, match="scale per group or row"):
        QuantEmbedding(nearest(weight, grid.choose_qparams(weight, spec), spec))


ENDS = [
    ("llama", {"embedding": "w8a16-g32", "head": "w4a16-g32"}),
    ("llama_tied", {"embedding": "w8a16-g32"}),
    ("llama_tied", {"head": "w4a16-asym-g16"}),
    ("gpt2", {"head": "w8a16-g32"}),
]


@pytest.mark.parametrize(("family", "wanted"), ENDS)
def test_ends_survive_their_checkpoint_and_run_natively(family: str, wanted: dict[str, str], tmp_path: Path) -> None:
    model = tiny.FAMILIES[family]()
    structure, float_logits = describe(model), model(IDS).logits
    rules = [Rule(*one) for one in wanted.items()]
    result = quantize(model, "w8a16-g32", out=tmp_path / "x", method="rtn", output=Output(format="native"), rules=rules)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    assert isinstance(model.get_output_embeddings(), QuantLinear)
    rows = {row.name: row for row in result.coverage}
    assert rows[structure.embedding.name].kind == "quantized"
    assert sum(row.parameters for row in result.coverage) == tiny.FAMILIES[family]().num_parameters()
    loaded = load(tmp_path / "x")
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (model(IDS).logits - float_logits).norm() / float_logits.norm() < 0.3
    with safe_open(tmp_path / "x" / "quantkit.safetensors", "pt") as file:
        stored = [name for name in file.keys() if name.endswith(".packed") and "layers" not in name and ".h." not in name]  # noqa: SIM118
    assert len(stored) == (1 if structure.tied else 2)
    if family == "llama" or "embedding" in wanted:
        decoder = native_decoder(loaded)
        assert isinstance(decoder, NativeDecoder), decoder
        engine = Engine(loaded, engine="native")
        request = engine.submit(IDS[0].tolist(), max_new_tokens=4)
        tokens = [event.token for event in engine.run() if event.request is request and event.token is not None]
        assert tokens[0] == int(loaded(IDS[:1]).logits[0, -1].argmax())


def test_what_cannot_be_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"embedding table.*use native"):
        quantize(tiny.FAMILIES["llama"](), "w8a16", out=tmp_path / "x", method="rtn", rules=[Rule("embedding", "w8a16")])
    with pytest.raises(SpecError, match="one tied table"):
        quantize(
            tiny.FAMILIES["llama_tied"](), "w8a16", method="rtn", rules=[Rule("embedding", "w8a16"), Rule("head", "w4a16")]
        )
    with pytest.raises(SpecError, match="embedding table wants float activations"):
        quantize(tiny.FAMILIES["llama"](), "w8a16", method="rtn", rules=[Rule("embedding", "w8a8")])
    with pytest.raises(SpecError, match="lm_head: it stands outside the blocks, where no inputs are calibrated"):
        quantize(tiny.FAMILIES["llama"](), "w8a16", method="rtn", rules=[Rule("head", "w8a8-static")])
    with pytest.raises(SpecError, match="rule 'embedding': the model has no input embedding that is a plain table"):
        quantize(tiny.FAMILIES["gemma3"](), "w8a16", method="rtn", rules=[Rule("embedding", "w8a16")])  # its rows are scaled


def test_an_untied_head_goes_to_compressed_tensors(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny.FAMILIES["llama"]()
    quantize(model, "w8a16-g32", out=tmp_path / "x", method="rtn", rules=[Rule("head", "w8a16-g32")])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_recipes_and_plans_name_the_ends() -> None:
    table, head = {"match": "embedding", "scheme": "w8a16-g32"}, {"match": "head", "scheme": {"bits": 6, "group_size": 32}}
    text = {"model": "demo", "scheme": "w4a16", "output": {"path": "x", "format": "native"}}
    structure = describe(tiny.FAMILIES["llama"]())
    resolution = Recipe.model_validate({**text, "rules": [table, head]}).resolve(structure)
    assert resolution.plan["model.embed_tokens"] == preset("w8a16-g32", ())
    assert resolution.plan["lm_head"].weight.describe() == "int6 g32"
    assert "lm_head" not in resolution.skipped
    alone = Recipe.model_validate({**text, "rules": [table]}).resolve(structure)
    assert "lm_head" in alone.skipped
    tied = make_plan(describe(tiny.FAMILIES["llama_tied"]()), "w4a16", [Rule("head", "w8a16")])
    assert tied.plan["model.embed_tokens"] == preset("w8a16", [64])


def test_a_quantized_table_is_not_made_whole_to_learn_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.FAMILIES["llama"]()
    quantize(model, "w8a16-g32", method="rtn", rules=[Rule("embedding", "w8a16-g32")])
    monkeypatch.setattr(QuantEmbedding, "dequantize", None)
    for engine in ("native", "modules"):
        request = Engine(model, engine=engine).submit(IDS[0].tolist(), max_new_tokens=1)
        assert request.remaining == 1


def test_a_table_looks_up_in_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    quantize(
        tiny.FAMILIES["gpt2"](),
        "w8a16-g32",
        out=tmp_path / "x",
        method="rtn",
        rules=[Rule("embedding", "w8a16-g32")],
        output=Output(format="native"),
    )
    loaded = load(tmp_path / "x", dtype=torch.bfloat16)
    assert loaded.get_input_embeddings()(IDS).dtype == loaded.transformer.h[0].ln_1.weight.dtype == torch.bfloat16
    assert loaded(IDS).logits.dtype == torch.bfloat16
