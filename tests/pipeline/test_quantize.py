"""quantize() end to end on tiny models: any architecture, bad input, statistics reused."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from quantkit import checkpoint
from quantkit.calibrate.data import Calibration, from_ids, unpadded
from quantkit.calibrate.statistics import load_statistics, save_statistics
from quantkit.errors import CalibrationError, FormatError, SpecError
from quantkit.hf.structure import describe
from quantkit.nn.linear import QuantLinear
from quantkit.pipeline.plan import make_plan
from quantkit.pipeline.quantize import collect, plan, quantize
from quantkit.pipeline.rules import Rule
from quantkit.pipeline.settings import Output, Run
from quantkit.presets import preset
from quantkit.quantizers.base import QUANTIZERS
from quantkit.system.compute import Compute
from quantkit.system.progress import Progress
from tests.tiny import FAMILIES


def token_ids(rows: int = 2, length: int = 32, count: int = 3) -> list[Tensor]:
    return [torch.randint(3, 190, (rows, length), generator=torch.Generator().manual_seed(i)) for i in range(count)]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(token_ids()[0]).logits


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_quantize_save_load_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    before = logits(model)
    # Readers of compressed-tensors know no stack of experts, no Conv1D, and no layer that is initialised by its weight.
    format = "native" if family in ("gpt_oss", "gpt2", "falcon") else "compressed-tensors"
    result = quantize(
        model,
        "w4a16-asym",
        out=tmp_path / "q",
        method="gptq",
        calibration=Calibration(data=token_ids()),
        output=Output(format=format),
    )
    assert result.path is not None
    after = logits(result.model)
    assert torch.equal(logits(checkpoint.load(result.path)), after)
    assert 0 < (after - before).norm() < 0.5 * before.norm()
    assert {row.kind for row in result.coverage} <= {"quantized", "fell back", "skipped"}
    assert sum(row.parameters for row in result.coverage) == sum(p.numel() for p in FAMILIES[family]().parameters())
    assert all(row.reason for row in result.coverage if row.kind == "skipped")
    assert not (tmp_path / "q" / "incomplete").exists()


@pytest.mark.parametrize("quantizer", QUANTIZERS.names())
def test_every_quantizer_runs_on_a_mixture_of_experts(quantizer: str) -> None:
    result = quantize(FAMILIES["qwen3_moe"](), "w8a16", method=quantizer, calibration=Calibration(data=token_ids()))
    assert {row.module_type for row in result.coverage if row.kind != "skipped"} >= {"Qwen3MoeExperts", "Linear"}
    assert result.metadata["quality"]["kl_mean"] < 1e-2
    assert result.metadata["bits_per_weight"] == pytest.approx(8.5, abs=0.6)


def test_gptq_uses_quantized_inputs_of_earlier_sites() -> None:
    """The walk differs from statistics of the float model, and both differ from plain rounding."""
    walked = quantize(FAMILIES["llama"](), "w3a16", calibration=Calibration(data=token_ids()))
    statistics, _ = collect(FAMILIES["llama"](), calibration=Calibration(data=token_ids()))
    reused = quantize(FAMILIES["llama"](), "w3a16", calibration=Calibration(statistics=statistics))
    rounded = quantize(FAMILIES["llama"](), "w3a16", method="rtn")
    first = next(iter(walked.plan))
    last = list(walked.plan)[-1]

    def codes(result: object, site: str) -> Tensor:
        return result.model.get_submodule(site).qtensor.packed  # type: ignore[attr-defined]

    assert torch.equal(codes(walked, first), codes(reused, first))
    assert not torch.equal(codes(walked, last), codes(reused, last))
    assert not torch.equal(codes(reused, first), codes(rounded, first))


def test_statistics_survive_the_disk(tmp_path: Path) -> None:
    statistics, fingerprint = collect(
        FAMILIES["mixtral"](), ("hessian", "mean_square"), calibration=Calibration(data=token_ids())
    )
    save_statistics(tmp_path / "s.safetensors", statistics, fingerprint)
    loaded, same = load_statistics(tmp_path / "s.safetensors")
    assert same == fingerprint
    assert loaded.keys() == statistics.keys()
    for name, one in statistics.items():
        assert loaded[name].tokens == one.tokens
        for key, value in one.results.items():
            assert torch.equal(loaded[name].results[key], value)
    direct = quantize(FAMILIES["mixtral"](), "w4a16", calibration=Calibration(statistics=statistics))
    again = quantize(FAMILIES["mixtral"](), "w4a16", calibration=Calibration(statistics=tmp_path / "s.safetensors"))
    assert torch.equal(logits(direct.model), logits(again.model))


def test_statistics_of_another_model_than_is_quantized_are_refused() -> None:
    statistics, _ = collect(FAMILIES["llama"](), calibration=Calibration(data=token_ids()))
    for change in ("smoothquant", "rotate"):
        with pytest.raises(CalibrationError, match="which changes them; pass data= instead"):
            quantize(
                FAMILIES["llama"](), "w4a16", steps=[change], calibration=Calibration(data=token_ids(), statistics=statistics)
            )


def test_buffers_that_a_conversion_rounded_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A loaded model has its rotary frequencies in float32, whatever it is loaded in; rounding inputs shows the difference."""
    model = FAMILIES["llama_tied"]().to(torch.bfloat16)
    with pytest.raises(FormatError, match=r"KL .*inv_freq is torch.bfloat16 in memory .*load the model with dtype="):
        quantize(model, "w8a8-static", out=tmp_path / "x", method="rtn", calibration=Calibration(data=token_ids()))
    assert "inv_freq is torch.bfloat16" in caplog.text  # before any work


def test_damaged_statistics_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"\x00" * 100)
    for path in (tmp_path / "bad", tmp_path / "missing"):
        with pytest.raises(FormatError, match="cannot be read as calibration statistics"):
            load_statistics(path)


def test_padding_never_enters_a_statistic() -> None:
    """Padded rows give the statistics of the same rows run alone; what hides under the mask does not matter."""
    rows = [torch.randint(3, 190, (n,), generator=torch.Generator().manual_seed(n)) for n in (20, 31, 20, 9)]
    for family in ("llama", "mixtral", "gemma3"):
        alone, _ = collect(FAMILIES[family](), calibration=Calibration(data=[row[None] for row in rows]))
        padded, _ = collect(FAMILIES[family](), calibration=Calibration(data=from_ids(rows, batch_size=4, pad_id=7)))
        for name, one in alone.items():
            assert one.tokens == padded[name].tokens
            torch.testing.assert_close(one.results["hessian"], padded[name].results["hessian"], rtol=1e-4, atol=1e-6)
    assert [tuple(ids.shape) for ids in unpadded(from_ids(rows, batch_size=4))] == [(2, 20), (1, 31), (1, 9)]


def test_progress_counts_every_site_once() -> None:
    events: list[Progress] = []
    result = quantize(FAMILIES["llama"](), calibration=Calibration(data=token_ids()), run=Run(progress=events.append))
    losses = [e for e in events if e.loss is not None]
    assert [e.detail for e in losses] == list(result.plan)
    assert [e.done for e in losses] == list(range(1, len(result.plan) + 1))
    assert {e.detail: e.loss for e in losses} == result.losses


def test_ignored_sites_stay_float_and_are_counted() -> None:
    result = quantize(
        FAMILIES["llama"](), method="rtn", rules=[Rule("down_proj", skip=True), Rule("model.layers.0.self_attn.*", skip=True)]
    )
    left = [row.name for row in result.coverage if (row.reason or "").startswith("skipped by rule")]
    assert len(left) == 2 + 4
    assert not any(isinstance(result.model.get_submodule(name), QuantLinear) for name in left)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scheme": "w4a61"}, SpecError, "unknown scheme 'w4a61'; did you mean 'w4a16'"),
        ({"method": "gtpq"}, SpecError, "did you mean 'gptq'"),
        ({"scheme": "w4a16-g48"}, SpecError, r"in=64 is not a multiple of group_size 48; use 32 or channel \(and \d+ more"),
        ({"scheme": "w4a16-g32", "rules": [Rule("down_proj", group_size=64)]}, SpecError, "disagree"),
        ({"rules": [Rule("dwon_proj", skip=True)]}, SpecError, r"'dwon_proj' matches no layer; closest: .*down_proj"),
        ({"rules": [Rule("*", skip=True)]}, SpecError, "nothing to quantize"),
        ({"calibration": Calibration("some text")}, CalibrationError, "needs a tokenizer"),
        ({"run": Run(strict=True), "method": "rtn", "scheme": {}}, SpecError, "nothing to quantize"),
        ({"scheme": {"model.layer.0": preset("w4a16", [64])}}, SpecError, "which is no layer of the model"),
    ],
)
def test_bad_arguments_fail_before_any_work(arguments: dict[str, object], error: type, message: str, tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    before = logits(model)
    with pytest.raises(error, match=message):
        quantize(model, **{"calibration": Calibration(token_ids()), "out": tmp_path / "q", **arguments})  # type: ignore[arg-type]
    assert torch.equal(logits(model), before)
    assert not list(tmp_path.iterdir())


def test_bad_weights_and_activations_are_named() -> None:
    broken = FAMILIES["llama"]()
    broken.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.inf
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: the weight holds NaN or infinity"):
        quantize(broken, method="rtn")
    overflowing = FAMILIES["llama"]()
    overflowing.model.embed_tokens.weight.data[:] = torch.nan
    with pytest.raises(CalibrationError, match=r"embed_tokens\.weight: the weight holds NaN"):
        quantize(overflowing, calibration=Calibration(data=token_ids()))


def test_an_output_that_holds_another_model_is_left_alone(tmp_path: Path) -> None:
    first = quantize(FAMILIES["llama"](), out=tmp_path / "q", method="rtn")
    before = {p.name: p.read_bytes() for p in (tmp_path / "q").iterdir()}
    with pytest.raises(FormatError, match="overwrite"):
        quantize(FAMILIES["qwen3"](), out=tmp_path / "q", method="rtn")
    assert {p.name: p.read_bytes() for p in (tmp_path / "q").iterdir()} == before
    quantize(FAMILIES["qwen3"](), out=tmp_path / "q", method="rtn", output=Output(overwrite=True))
    assert checkpoint.load(tmp_path / "q").config.model_type == "qwen3"
    assert first.model.config.model_type == "llama"


def test_layers_that_other_readers_would_load_as_garbage_are_refused() -> None:
    model = FAMILIES["gpt2"]()
    plan = make_plan(describe(model), "w4a16").plan
    reasons = checkpoint.rejections(model, plan, "compressed-tensors")
    assert reasons.keys() == plan.keys()
    assert all("Conv1D" in reason and "use native" in reason for reason in reasons.values())
    assert not checkpoint.rejections(model, plan, "native")


def test_strict_looks_at_every_layer_whatever_a_rule_skips() -> None:
    model = FAMILIES["llama"]()
    skipped = Rule("down_proj", skip=True)
    quantize(model, method="rtn", rules=[skipped], run=Run(strict=True))
    partial = dict(list(plan(FAMILIES["llama"](), "w4a16", rules=[skipped]).plan.items())[:3])
    with pytest.raises(SpecError, match=r"would stay in float; strict=True wants a rule with skip"):
        quantize(FAMILIES["llama"](), partial, method="rtn", run=Run(strict=True))


class ReadsAWeight(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (x @ self.up_proj.weight.T))


def test_strict_names_linear_layers_that_cannot_be_replaced() -> None:
    model = FAMILIES["llama"]()
    model.model.layers[0].mlp.__class__ = ReadsAWeight
    reason = r"layers\.0\.mlp\.up_proj\.weight \(ReadsAWeight\.forward reads its weight\) would stay"
    with pytest.raises(SpecError, match=reason):
        quantize(model, method="rtn", run=Run(strict=True))
    quantize(model, method="rtn", rules=[Rule("model.layers.0.mlp.up_proj", skip=True)], run=Run(strict=True))


def test_a_plan_is_made_before_and_carried_out_as_it_is() -> None:
    made = plan(FAMILIES["llama"](), "w4a16", rules=[Rule("v_proj", "w8a16"), Rule("head", "w8a16-g32")])
    assert "layers int8 g64" in repr(made)
    result = quantize(FAMILIES["llama"](), made, method="rtn")
    assert result.plan == made.plan
    with pytest.raises(SpecError, match="rules beside a plan"):
        quantize(FAMILIES["llama"](), made, rules=[Rule("v_proj", skip=True)])


def test_an_odd_layer_is_named_in_the_coverage_table() -> None:
    odd = FAMILIES["llama"](intermediate_size=100)
    result = quantize(odd, "w4a16", method="rtn")
    reasons = {row.name.rsplit(".", 1)[-1]: row.reason for row in result.coverage if row.kind == "quantized"}
    assert reasons["down_proj"] == "one scale per channel, because 64 does not divide its input size 100"
    assert reasons["up_proj"] is None


def test_a_result_shows_itself(tmp_path: Path) -> None:
    result = quantize(FAMILIES["llama"](), method="rtn", out=tmp_path / "<b>")
    for text in (repr(result), result._repr_html_()):
        assert all(word in text for word in ("bits per weight", "KL to the float model", "int4 g32", "14 quantized"))
    assert "<b>" not in result._repr_html_()
    assert result._repr_html_().startswith("<table>")


def test_strict_refuses_a_fallback() -> None:
    model = FAMILIES["qwen3_moe"]()
    one = [torch.full((1, 2), 5)]  # two equal tokens reach at most two of four experts
    seen: list[Progress] = []
    with pytest.raises(CalibrationError, match=r"layers\.0.*no calibration input.*strict=True forbids that"):
        quantize(model, calibration=Calibration(data=one), run=Run(strict=True, progress=seen.append))
    assert not any(event.detail.startswith("model.layers.1") for event in seen)  # it came when it happened, not at the end
    relaxed = quantize(FAMILIES["qwen3_moe"](), calibration=Calibration(data=one))
    fallen = [row for row in relaxed.coverage if row.kind == "fell back"]
    assert fallen
    assert all("no calibration input" in (row.reason or "") for row in fallen)


def test_a_narrower_compute_dtype_leaves_no_trace_in_what_stays_float() -> None:
    model, ids = FAMILIES["llama"](), [torch.randint(3, 190, (2, 32), generator=torch.Generator().manual_seed(0))]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    quantize(model, "w4a16", calibration=Calibration(data=ids), run=Run(compute=Compute(torch.device("cpu"), torch.bfloat16)))
    kept = {name: parameter for name, parameter in model.named_parameters() if "layers" in name}
    assert len(kept) == 4
    for name, parameter in kept.items():
        assert torch.equal(parameter, before[name])


def test_a_model_is_quantized_once_and_copies_of_it_as_often_as_wanted() -> None:
    model, settings = FAMILIES["llama"](), {"method": "rtn", "calibration": Calibration(token_ids())}
    before = logits(model)
    first, second = (quantize(copy.deepcopy(model), scheme, **settings) for scheme in ("w8a16", "w4a16"))  # type: ignore[arg-type]
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(first.model), logits(second.model))
    with pytest.raises(SpecError, match=r"quantized already.*load the float model again, or quantize a copy"):
        quantize(first.model, "w4a16", **settings)  # type: ignore[arg-type]
