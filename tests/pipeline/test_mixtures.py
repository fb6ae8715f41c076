"""Mixtures of experts in a run: what each expert has seen, and layers that engines run as one keep one scheme."""

import io
import logging

import pytest
import torch
from rich.console import Console
from transformers.models.llama.modeling_llama import LlamaMLP

from quantkit.calibrate.data import Calibration
from quantkit.errors import SpecError
from quantkit.evaluation.coverage import CoverageRow, shortfall, summarise
from quantkit.hf.experts import enable_experts
from quantkit.hf.structure import describe
from quantkit.nn.probes import all_experts_shown, attach_probe
from quantkit.pipeline.fused import fused_groups, refuse_parted
from quantkit.pipeline.plan import make_plan
from quantkit.pipeline.quantize import collect, quantize
from quantkit.pipeline.rules import Rule
from quantkit.pipeline.settings import Output
from quantkit.report import coverage_table
from tests.tiny import FAMILIES, build

IDS = [torch.randint(3, 190, (1, 12), generator=torch.Generator().manual_seed(0))]


def never_last(model):
    gate = model.model.layers[0].mlp.gate
    plain = gate.forward

    def forward(x):
        logits, scores, index = plain(x)
        return logits, scores, torch.where(index == 3, 0, index)

    gate.forward = forward
    return model


def test_the_table_counts_tokens_per_expert_and_names_one_that_saw_none() -> None:
    result = quantize(never_last(FAMILIES["mixtral"]()), "w4a16", method="gptq", calibration=Calibration(data=IDS))
    row = next(row for row in result.coverage if row.name == "model.layers.0.mlp.experts.gate_up_proj")
    assert len(row.tokens) == 4
    assert row.tokens[3] == 0
    assert sum(row.tokens) == 2 * IDS[0].numel()
    assert row.kind == "fell back"
    assert row.reason == "expert 3: no calibration input: rounded to nearest"
    dense = next(row for row in result.coverage if row.name == "model.layers.0.self_attn.q_proj")
    assert dense.tokens == (IDS[0].numel(),)
    fallen = next(group for group in summarise(result.coverage) if group.kind == "fell back")
    assert fallen.tokens[0] == 0


def test_every_expert_sees_every_token_if_that_is_asked_for_and_the_model_computes_the_same() -> None:
    shown = Calibration(data=IDS, all_experts=True)
    result = quantize(never_last(FAMILIES["mixtral"]()), "w4a16", method="gptq", calibration=shown)
    experts = [row for row in result.coverage if ".experts." in row.name]
    assert {row.tokens for row in experts} == {(IDS[0].numel(),) * 4}
    assert {row.kind for row in experts} == {"quantized"}
    statistics, _ = collect(never_last(FAMILIES["mixtral"]()), calibration=shown)
    assert statistics["model.layers.1.mlp.experts.down_proj"].tokens == (IDS[0].numel(),) * 4


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_outputs_are_what_they_were_while_all_experts_are_shown(family: str) -> None:
    model = FAMILIES[family]()
    enable_experts(model)
    want, seen = model(IDS[0]).logits, []
    module = next(part for part in model.modules() if hasattr(part, "has_gate"))
    detach = attach_probe(module, lambda name, x, ids: seen.append(torch.bincount(ids, minlength=4).tolist()))
    with all_experts_shown(model):
        torch.testing.assert_close(model(IDS[0]).logits, want, rtol=1e-5, atol=1e-5)
    assert seen == [[IDS[0].numel()] * 4] * 2
    with all_experts_shown(model, False):
        model(IDS[0])
    assert sum(seen[-1]) == 2 * IDS[0].numel()
    detach()
    assert torch.equal(model(IDS[0]).logits, want)


@pytest.mark.parametrize(
    ("family", "rule", "parted"),
    [
        ("llama", Rule("v_proj", "w8a16"), "v_proj"),
        ("llama", Rule("k_proj", skip=True), "k_proj"),
        ("llama", Rule("up_proj", "w4a16-g16"), "up_proj"),
        ("mixtral", Rule("*.experts.down_proj", "w8a16"), "experts"),
        ("llama", Rule("down_proj", "w8a16"), None),
        ("llama", Rule("*.layers.0.self_attn.*", "w8a16"), None),
        ("llama", Rule("re:.*\\.(q|k|v)_proj", skip=True), None),
        ("phi3", Rule("qkv_proj", "w8a16"), None),
    ],
)
def test_rules_that_part_layers_which_engines_run_as_one_are_an_error(family: str, rule: Rule, parted: str | None) -> None:
    structure = describe(FAMILIES[family]())
    made = make_plan(structure, "w4a16-g32" if family != "mixtral" else "w4a16", [rule])
    if parted is None:
        refuse_parted(structure, made.plan, made.skipped)
        return
    with pytest.raises(SpecError, match=rf"{parted}.*as one layer with one scheme; .*fused=False"):
        refuse_parted(structure, made.plan, made.skipped)


def test_parted_layers_can_be_written_where_nobody_joins_them(tmp_path) -> None:
    rules = [Rule("v_proj", "w8a16")]
    with pytest.raises(SpecError, match=r"serving engines run q_proj, k_proj, v_proj as one layer"):
        quantize(FAMILIES["llama"](), "w4a16", method="rtn", rules=rules, out=tmp_path / "no")
    quantize(FAMILIES["llama"](), "w4a16", method="rtn", rules=rules, out=tmp_path / "a", output=Output(fused=False))
    quantize(FAMILIES["llama"](), "w4a16", method="rtn", rules=rules, out=tmp_path / "b", output=Output(format="native"))
    quantize(FAMILIES["llama"](), "w4a16", method="rtn", rules=rules)


def test_group_sizes_chosen_by_themselves_do_not_part_experts() -> None:
    structure = describe(
        build("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, intermediate_size=100)
    )
    odd = describe(build("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=100))
    for found in (structure, odd):
        made = make_plan(found, "w4a16")
        refuse_parted(found, made.plan, made.skipped)
    groups = {site.name.rpartition(".")[2] for group in fused_groups(odd.sites) for site in group}
    assert groups == {"q_proj", "k_proj", "v_proj", "gate_up_proj", "down_proj"}
    assert "layers that run with it need that" in str(make_plan(odd, "w4a16").remarks)


def row(name: str, kind: str, count: int, reason: str | None = None, missed: bool = False) -> CoverageRow:
    return CoverageRow(kind, name, "Linear", count, count, count, None, reason, missed=missed)


def test_a_model_left_in_float_for_the_most_part_is_said_first() -> None:
    few = [
        row("a", "quantized", 20),
        row("b", "skipped", 80, "Odd reads its weight", missed=True),
        row("n", "skipped", 900, "norm"),
    ]
    warning = (
        "only 20% of the weights of linear layers and experts are quantized; the rest stays in float, 80% because: Odd reads"
    )
    assert shortfall(few).startswith(warning)
    assert shortfall([*few, row("c", "quantized", 60)]) is None
    assert shortfall([row("a", "skipped", 80, "skipped by rule 1"), row("b", "quantized", 1)]) is None
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(coverage_table(few))
    assert warning in " ".join(console.export_text().split())


class ReadsAll(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act_fn(x @ self.gate_proj.weight.T) * (x @ self.up_proj.weight.T)
        return hidden @ self.down_proj.weight.T


def test_a_run_warns_of_it_and_its_result_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = FAMILIES["llama"](intermediate_size=256)
    for layer in model.model.layers:
        layer.mlp.__class__ = ReadsAll
    with caplog.at_level(logging.WARNING):
        result = quantize(model, "w4a16", method="rtn")
    assert result.facts()["WARNING"].startswith("only 20% of the weights of linear layers and experts are quantized")
    assert any(record.message.startswith("only 20%") for record in caplog.records)
    assert "WARNING" not in quantize(FAMILIES["llama"](), "w4a16", method="rtn").facts()
