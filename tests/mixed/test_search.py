"""Searches on tiny models: budgets are kept, plans are carried out, and the same search finds the same plan."""

import json
from collections import Counter

import pytest
import torch

import quantkit
from quantkit import Calibration, Output, Rule, Scoring
from quantkit.errors import FormatError, SpecError
from quantkit.mixed.search import search
from quantkit.nn.sites import read_weight
from quantkit.pipeline.fused import fused_groups
from quantkit.recipe.run import plan_recipe, run_recipe
from quantkit.recipe.schema import recipe_of
from tests import tiny

CHOICES = ["w2a16-asym-g32", "w3a16-asym-g32", "w4a16-asym-g32", "w8a16-g32", "float"]
TEXT = Calibration([tiny.TEXT] * 20, samples=4, length=64)


@pytest.fixture(scope="module")
def found():
    return search(tiny.tiny_llama(seed=3), "4.25 bpw", CHOICES, calibration=TEXT, tokenizer=tiny.tiny_tokenizer())


def test_budgets_are_kept_and_hardly_missed(found):
    for limit in (3.0, 4.25, 6.0, 9.0):
        got = found.at(f"{limit} bpw").point.bits_per_weight
        assert 0.9 * limit < got <= limit  # a tiny model has few groups
    for limit in (190_000, 210_000):
        assert found.at(f"{limit} bytes").point.nbytes <= limit
    for huge in ("1e308 bpw", "1e290 GB", "1e6 bpw"):
        with pytest.raises(SpecError, match="every layer may stay in float"):
            found.at(huge)


def test_layers_that_run_as_one_are_chosen_together(found):
    model = tiny.tiny_llama(seed=3)
    for group in fused_groups(quantkit.hf.structure.describe(model).sites):
        assert len({found.plan.get(site.name) for site in group}) == 1


def test_more_bits_never_expect_more_loss(found):
    points = found.frontier
    assert [p.kl for p in points] == sorted((p.kl for p in points), reverse=True)
    assert [p.bits_per_weight for p in points] == sorted(p.bits_per_weight for p in points)
    for losses, group in zip(found.scores.losses, found.scores.menu.groups, strict=True):
        assert list(losses) == sorted(losses, reverse=True), group.name


def test_the_same_search_finds_the_same_plan_on_any_number_of_threads(found):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        model = tiny.tiny_llama(seed=3)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        wanting = {name: p.requires_grad for name, p in model.named_parameters()}
        again = search(model, "4.25 bpw", CHOICES, calibration=TEXT, tokenizer=tiny.tiny_tokenizer())
    finally:
        torch.set_num_threads(before)
    assert again.plan == found.plan
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters()), "the model is as before"
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanting


def test_a_layer_that_counts_more_gets_more_bits():
    model = tiny.tiny_llama(seed=3)
    loud = "model.layers.1.mlp.down_proj"
    site = next(s for s in quantkit.hf.structure.describe(model).sites if s.name == loud)
    with torch.no_grad():
        read_weight(model, site).mul_(8)
    plan = search(model, "3.6 bpw", CHOICES[:4], calibration=TEXT, tokenizer=tiny.tiny_tokenizer()).plan
    assert plan[loud].weight.bits > min(scheme.weight.bits for scheme in plan.values())


@pytest.mark.parametrize("format", ["compressed-tensors", "native"])
def test_a_plan_is_carried_out_and_its_size_is_what_was_said(found, tmp_path, format):
    plan = search(
        tiny.tiny_llama(seed=3),
        "190000 bytes",
        CHOICES,
        calibration=TEXT,
        output=Output(format=format),
        tokenizer=tiny.tiny_tokenizer(),
    )
    out = tmp_path / "out"
    result = quantkit.quantize(
        tiny.tiny_llama(seed=3), plan, method="rtn", out=out, output=Output(format=format), tokenizer=tiny.tiny_tokenizer()
    )
    assert sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) <= 190_000
    assert result.metadata["search"]["budget"] == "0.19 MB"
    assert {row.name for row in result.coverage if row.kind == "quantized"} == set(plan.plan)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_are_one_choice(family):
    model, output = tiny.build(family), Output(format="native")
    found = search(model, "5 bpw", ["w4a16-g32", "w8a16-g32"], calibration=Calibration(tiny_ids(model)), output=output)
    experts = {name: scheme for name, scheme in found.plan.items() if "experts" in name}
    assert experts
    assert all(loss > 0 for losses in found.scores.losses for loss in losses[:1])


def tiny_ids(model):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, model.config.vocab_size - 1, (2, 48), generator=generator) for _ in range(2)]


def test_inputs_that_are_rounded_cost_more():
    model, tokenizer = tiny.tiny_llama(seed=3), tiny.tiny_tokenizer()
    found = search(
        model, "8.5 bpw", ["w8a8", "w8a16-channel", "w4a16-g32"], method="rtn", calibration=TEXT, tokenizer=tokenizer
    )
    for group, losses in zip(found.scores.menu.groups, found.scores.losses, strict=True):
        loss = {one.choice: value for one, value in zip(group.candidates, losses, strict=True)}
        assert loss["w8a8"] > loss["w8a16-channel"]


def test_the_ends_can_be_searched_and_rules_decide():
    model = tiny.tiny_llama(seed=3)
    found = search(
        model,
        "5 bpw",
        ["w4a16-g32", "w8a16-g32"],
        method="rtn",
        rules=[Rule("*.o_proj", "w8a16-g32"), Rule("*.layers.0.*", skip=True)],
        include=("head",),
        calibration=TEXT,
        output=Output(format="native"),
        tokenizer=tiny.tiny_tokenizer(),
    )
    assert {scheme.weight.bits for name, scheme in found.plan.items() if name.endswith("o_proj")} == {8}
    assert not any(".layers.0." in name for name in found.plan)
    assert any(name in ("lm_head", "model.embed_tokens") for name in found.plan)


def test_measuring_one_group_at_a_time_agrees_about_what_counts():
    model = tiny.tiny_llama(seed=3)
    scoring = Scoring(kind="measured", windows=2)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = search(
        model, "3.5 bpw", CHOICES[:3], method="rtn", calibration=TEXT, scoring=scoring, tokenizer=tiny.tiny_tokenizer()
    )
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert sum(losses[0] for losses in found.scores.losses) > 2 * sum(losses[-1] for losses in found.scores.losses)


def test_a_budget_in_time_is_measured_and_one_in_kl_too():
    model, tokenizer = tiny.tiny_llama(seed=3), tiny.tiny_tokenizer()
    scoring = Scoring(windows=2, decoding=quantkit.Decoding(context=8, new_tokens=4, rounds=2))
    slow = search(model, "10 s", CHOICES[2:4], method="rtn", calibration=TEXT, scoring=scoring, tokenizer=tokenizer)
    assert 0 < slow.measured["ms"] <= 10_000
    assert {scheme.weight.bits for scheme in slow.plan.values()} == {8}, "there is time for everything"
    near = search(model, "0.1 kl", CHOICES[:4], method="rtn", calibration=TEXT, scoring=scoring, tokenizer=tokenizer)
    assert near.measured["kl"] <= 0.1


@pytest.mark.parametrize(
    ("budget", "choices", "says"),
    [
        ("1 bpw", CHOICES, r"out of reach; the choices reach from 2\.\d+ bpw to 32 bpw"),
        ("1 kB", CHOICES, "out of reach; the choices reach from .* MB to .* by what is not searched .* include embedding"),
        ("4 bpw", ["w4a16"], "want at least two"),
        ("4 bpw", "w4a16", "want at least two"),
        ("4 bpw", ["w4a16-g32", "w4a16-g32"], "given twice"),
        ("4 bpw", ["w4a16-g40", "w8a16-g32"], "no layer can have 'w4a16-g40'.*leave it out"),
        ("4 bpw", ["nf4", "w8a16-g32"], "no layer can have 'nf4'"),
        ("4 bpw", ["w4a61", "w8a16-g32"], "w4a61"),
        ("4 apples", CHOICES, "unknown unit"),
    ],
)
def test_bad_input_is_one_error_before_any_text_is_read(budget, choices, says):
    with pytest.raises(SpecError, match=says):
        search(tiny.tiny_llama(), budget, choices, calibration=Calibration("no such file"), tokenizer=tiny.tiny_tokenizer())


def test_a_recipe_keeps_the_plan_it_has_found(tiny_float, tiny_text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    data = {
        "model": str(tiny_float),
        "scheme": {"budget": "4.5 bpw", "choices": ("w3a16-asym-g32", "w4a16-asym-g32", "w8a16-g32")},
        "method": "rtn",
        "calibration": {"data": str(tiny_text), "samples": 4, "length": 32},
        "output": {"path": str(out)},
    }
    recipe = recipe_of(data)
    assert plan_recipe(recipe).estimate.bits_per_weight <= 4.5
    first = run_recipe(recipe)
    assert first.result.metadata["bits_per_weight"] <= 4.5
    record = json.loads((out / "search.json").read_text())
    assert set(record["plan"]) == set(first.result.plan)
    assert quantkit.load_plan(out / "search.json").plan == first.result.plan

    def not_again(*_arguments, **_settings):
        raise AssertionError("the plan is known")

    monkeypatch.setattr("quantkit.recipe.searched.search", not_again)
    assert run_recipe(recipe).result.already_done
    before = (out / "search.json").read_bytes()
    other = {**data, "scheme": {**data["scheme"], "budget": "4.6 bpw"}}
    with pytest.raises(FormatError, match="already holds a model, of another search: search; choose another"):
        run_recipe(recipe_of(other))
    assert (out / "search.json").read_bytes() == before
    (out / "search.json").write_text('{"key": 1, "plan": []}')
    with pytest.raises(FormatError, match="no plan of a search"):
        quantkit.load_plan(out / "search.json")


class Stopped(BaseException):
    """Nothing catches it, as nothing catches a signal that kills."""


@pytest.mark.parametrize("format", ["compressed-tensors", "native"])
def test_a_budget_in_bytes_holds_for_all_that_a_recipe_leaves(tiny_float, tiny_text, tmp_path, format):
    out = tmp_path / "out"
    data = {
        "model": str(tiny_float),
        "scheme": {"budget": "250000 bytes", "choices": ("w2a16-asym-g32", "w4a16-asym-g32", "w8a16-g32")},
        "method": "rtn",
        "calibration": {"data": str(tiny_text), "samples": 4, "length": 32},
        "output": {"path": str(out), "format": format},
    }
    run_recipe(recipe_of(data))
    assert (out / "search.json").exists()
    assert sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) <= 250_000


def test_a_run_that_is_stopped_searches_once_and_makes_the_same_bytes(tiny_float, tiny_text, tmp_path):
    def go(out, stop=None):
        data = {"data": str(tiny_text), "samples": 4, "length": 32}
        scheme = {"budget": "4.4 bpw", "choices": ("w3a16-asym-g32", "w4a16-asym-g32", "w8a16-g32")}
        output = {"path": str(out), "overwrite": out.name == "new"}
        recipe = recipe_of({"model": str(tiny_float), "scheme": scheme, "calibration": data, "output": output})
        seen = Counter()

        def progress(event):
            seen[event.stage] += 1
            if (event.stage, seen[event.stage]) == stop:
                raise Stopped

        if stop is None:
            run_recipe(recipe, progress)
            return seen["search"]
        with pytest.raises(Stopped):
            run_recipe(recipe, progress)
        return None

    def files(out):
        return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "search.json"}

    assert go(tmp_path / "once") > 0
    again, new = tmp_path / "again", tmp_path / "new"
    go(again, ("search", 2))
    assert not (again / "search.next.json").exists()
    go(again, ("quantize", 3))
    plan = json.loads((again / "search.next.json").read_text())
    assert go(again) == 0, "the plan was found before"
    assert files(again) == files(tmp_path / "once")
    assert json.loads((again / "search.json").read_text()) == plan
    quantkit.quantize(tiny_float, "w8a16-g32", method="rtn", out=new)
    (new / "search.json").write_text('{"key": {"search": "of the model that is there"}}')
    go(new, ("quantize", 3))
    assert "of the model" in (new / "search.json").read_text(), "a model keeps its plan until another has taken its place"
    assert go(new) == 0
    assert files(new) == files(tmp_path / "once")
    assert json.loads((new / "search.json").read_text())["plan"] == plan["plan"]


def test_results_show_themselves(found, tmp_path):
    assert len(repr(found).splitlines()) <= 12
    assert "<table>" in found._repr_html_()
    assert sum(found.by_kind()["self_attn.{q_proj,k_proj,v_proj}"]) == pytest.approx(1)
    assert found.nearby(0.01, 1.0, 100.0).keys() == {"9900% larger"}
    moved = found.moved(found.at("4.5 bpw"))
    assert moved
    assert sum(row["kl"] for row in moved) < 0
    assert list(found.uniform()) == CHOICES
    found.plot().savefig(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5000
    found.save(tmp_path / "plan.json")
    assert quantkit.load_plan(tmp_path / "plan.json").plan == found.plan
    quantkit.write_html(tmp_path / "now.html", [], search=found)
    quantkit.write_html(tmp_path / "later.html", [], search=tmp_path / "plan.json")
    page = (tmp_path / "now.html").read_text()
    assert page == (tmp_path / "later.html").read_text()
    assert "mathdefault" not in page
    assert all(text in page for text in ("What a bit more would buy first", "model.layers.1.self_attn.o_proj", "5% larger"))
    (tmp_path / "plan.json").write_text('{"shown": {"rows": 3}}')
    with pytest.raises(FormatError, match=r"plan\.json: no record of a search"):
        quantkit.write_html(tmp_path / "later.html", [], search=tmp_path / "plan.json")


def test_a_time_that_nothing_reaches_is_refused_before_text_runs(monkeypatch):
    def runs(*_arguments):
        raise AssertionError("text has run")

    monkeypatch.setattr("quantkit.calibrate.backward.Backward.run", runs)
    scoring = Scoring(decoding=quantkit.Decoding(context=8, new_tokens=2, rounds=1))
    settings = {"method": "rtn", "calibration": TEXT, "scoring": scoring, "tokenizer": tiny.tiny_tokenizer()}
    with pytest.raises(SpecError, match="out of reach"):
        search(tiny.tiny_llama(), "0.0001 ms", CHOICES[2:4], **settings)
