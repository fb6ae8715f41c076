"""Recipes: what is accepted, what is refused and how the refusal reads, and how rules decide for every site."""

from dataclasses import replace
from pathlib import Path

import pytest

import quantkit
from quantkit.errors import QuantkitError, RecipeError, SpecError
from quantkit.nn.sites import Block, Site, Structure
from quantkit.pipeline.plan import make_plan
from quantkit.quantizers.gptq import GPTQ
from quantkit.recipe.schema import Recipe, load_recipe
from quantkit.spec import QuantSpec, Scheme
from quantkit.transforms.awq import AWQ
from quantkit.transforms.distill import Distill
from quantkit.transforms.smoothquant import SmoothQuant

MINIMAL = "model: some/model\noutput: {path: out}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def refusal(tmp_path: Path, text: str, overrides: dict | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text), overrides)
    return str(caught.value).replace(str(tmp_path), "")


def structure(hidden: int = 576, inner: int = 1536, layers: int = 2, head: bool = True) -> Structure:
    def block(index: int) -> Block:
        shapes = {"self_attn.q_proj": (hidden, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
        name = f"model.layers.{index}"
        return Block(name, tuple(Site(f"{name}.{k}", f"{name}.{k}", "weight", v) for k, v in shapes.items()))

    outside = (Site("lm_head", "lm_head", "weight", (1000, hidden)),) if head else ()
    return Structure(tuple(block(i) for i in range(layers)), outside, {"model.norm.weight": "norm"})


def recipe(tmp_path: Path, text: str = "") -> Recipe:
    return load_recipe(write(tmp_path, MINIMAL + text))


def test_steps_are_named_or_have_options_and_keep_their_order(tmp_path):
    text = "steps: [awq, {name: smoothquant, options: {alpha: 0.7}}, {name: distill, options: {steps: 7, rate: 0.001}}]\n"
    found = recipe(tmp_path, text).steps
    assert [one.build() for one in found] == [AWQ(), SmoothQuant(alpha=0.7), Distill(steps=7, rate=0.001)]
    with pytest.raises(RecipeError, match=r"'awq' has no option 'alpha'"):
        recipe(tmp_path, "steps: [{name: awq, options: {alpha: 1}}]\n")
    with pytest.raises(RecipeError, match=r"unknown \w+ 'awk'; did you mean 'awq'"):
        recipe(tmp_path, "steps: [awk]\n")


def test_python_and_recipe_share_one_definition_of_the_settings(tmp_path):
    found = recipe(tmp_path, "calibration: {samples: 3, mode: ragged}\nrun: {strict: true}\nrules: [{match: a, skip: true}]\n")
    assert found.calibration == quantkit.Calibration(samples=3, mode="ragged")
    assert found.run == quantkit.Run(strict=True)
    assert found.rules == [quantkit.Rule("a", skip=True)]
    assert found.output == quantkit.Output("out")


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: quantkit.Calibration(samples=0), r"Calibration\(samples=0\): Input should be greater than 0"),
        (lambda: quantkit.Calibration(data=3), r"Calibration\(data=3\): want a file"),
        (lambda: quantkit.Calibration(sampels=3), "no setting 'sampels'; did you mean 'samples'"),
        (lambda: quantkit.Output(format="natif"), "unknown format 'natif'; did you mean 'native'"),
        (lambda: quantkit.Run(strict="yes"), "should be a valid boolean"),
        (lambda: quantkit.Rule("a"), "a rule wants either skip"),
        (lambda: quantkit.Rule("a", "w4a61"), "unknown scheme 'w4a61'; did you mean"),
        (lambda: quantkit.SchemeChoice(full=quantkit.Scheme(quantkit.QuantSpec("int4")), group_size=32), "already says both"),
        (lambda: quantkit.Rule("a", 5), r"Rule\(scheme=5\): want a preset name"),
    ],
)
def test_settings_made_in_python_are_checked_too(make, wanted):
    with pytest.raises(QuantkitError, match=wanted):
        make()


def test_defaults_are_the_documented_ones(tmp_path):
    found = recipe(tmp_path)
    assert (found.scheme.name, found.method.name, found.output.format) == ("w4a16", "gptq", "compressed-tensors")
    assert (found.calibration.samples, found.calibration.length, found.evaluate) == (128, 512, None)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (MINIMAL + "methode: gptq\n", "/recipe.yaml:3:1: methode: unknown key; did you mean 'method'?"),
        (MINIMAL + "quantizer: gptq\n", "/recipe.yaml:3:1: quantizer: unknown key; write method"),
        (MINIMAL + "head: w8a16\n", "head: unknown key; write rules: [{match: head, scheme: ...}]"),
        (
            MINIMAL + "calibration:\n  samples: 3\n  lenght: 4\n",
            "/recipe.yaml:5:3: calibration.lenght: unknown key; did you mean 'length'?",
        ),
        (
            MINIMAL + "rules:\n- {match: a, skip: true}\n- {mach: b}\n",
            "/recipe.yaml:5:4: rules.1.mach: unknown key; did you mean 'match'?",
        ),
        (MINIMAL + "steps: [{name: distill, options: {steps: 4, rat: 3}}]\n", "has no option 'rat'; did you mean 'rate'?"),
        (MINIMAL + "output: {path: a, format: natif}\n", "key 'output' is given twice"),
        ("model: a\noutput: {path: a, format: natif}\n", "/recipe.yaml:2:19: output.format: unknown format 'natif'"),
        (MINIMAL + "run: {strikt: true}\n", "run.strikt: unknown key; did you mean 'strict'?"),
        (MINIMAL + "scheme: {name: w4a16, groupsize: 3}\n", "scheme.groupsize: unknown key; did you mean 'group_size'?"),
        (MINIMAL + "scheme: w4a61\n", "/recipe.yaml:3:1: scheme: unknown scheme 'w4a61'; did you mean 'w4a16'?"),
        (MINIMAL + "scheme: {dtype: int44}\n", "unknown dtype 'int44'; did you mean 'int4'?"),
        (MINIMAL + "scheme: {dtype: int4, bits: 4}\n", "exactly one of name, dtype, bits; got dtype, bits"),
        (MINIMAL + "scheme: {group_size: 4}\n", "exactly one of name, dtype, bits; got none"),
        (MINIMAL + "scheme: {name: w4a16-g64, group_size: 32}\n", "'w4a16-g64' and group_size=32 disagree"),
        (MINIMAL + "method: gptk\n", "/recipe.yaml:3:1: method: unknown quantizer 'gptk'; did you mean 'gptq'?"),
        (MINIMAL + "method: {options: {dampin: 1}}\n", "'gptq' has no option 'dampin'; did you mean 'damping'?"),
        (
            MINIMAL + "method: {options: {clip: x}}\n",
            "option clip: Input should be 'importance', 'mse' or 'absmax'; got 'x'",
        ),
        (MINIMAL + "dtype: f16\n", "dtype: Input should be 'auto', 'float32', 'bfloat16' or 'float16'; got 'f16'"),
        (MINIMAL + "calibration: {samples: '3'}\n", "calibration.samples: Input should be a valid integer; got '3'"),
        (MINIMAL + "calibration: {samples: 0}\n", "calibration.samples: Input should be greater than 0; got 0"),
        (MINIMAL + "rules: [{match: a}]\n", "a rule wants either skip: true, or a scheme or group_size"),
        (MINIMAL + "rules: [{match: a, skip: true, group_size: 4}]\n", "a rule wants either"),
        (MINIMAL + "rules: [{match: 're:(', skip: true}]\n", "not a regular expression"),
        (MINIMAL + "model: other\n", "/recipe.yaml:3:1: key 'model' is given twice"),
        ("model: a\n", "output: is missing"),
        ("model: a\noutput: {}\n", "/recipe.yaml:2:1: output: path is missing"),
        ("", "a recipe is a mapping"),
        ("- a\n", "a recipe is a mapping"),
        ("model: [\n", "not valid YAML"),
    ],
)
def test_a_bad_recipe_names_place_and_way_out(tmp_path, text, wanted):
    assert wanted in refusal(tmp_path, text)


def test_every_mistake_is_listed_at_once(tmp_path):
    assert len(refusal(tmp_path, MINIMAL + "methode: x\ndtype: y\nscheme: z\n").splitlines()) == 3


def test_a_missing_or_binary_file_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path / "binary.yaml")


def test_overrides_apply_and_are_checked(tmp_path):
    path = write(tmp_path, MINIMAL + "method: rtn\n")
    changed = load_recipe(path, {"calibration.samples": 8, "method.options": {"clip": "mse"}, "scheme": "w8a16"})
    assert (changed.calibration.samples, changed.scheme.name) == (8, "w8a16")
    assert changed.method.build().clip == "mse"
    assert refusal(tmp_path, MINIMAL, {"calibration.sampels": 8}).startswith("--set calibration.sampels: ")
    assert refusal(tmp_path, MINIMAL, {"model.name.x": 8}).startswith("--set model.name.x: ")


def test_quantizer_options_reach_the_quantizer(tmp_path):
    assert recipe(tmp_path, "method: {name: gptq, options: {damping: 0.05}}\n").method.build() == GPTQ(damping=0.05)


def test_the_scheme_covers_the_blocks_and_leaves_the_head(tmp_path):
    found = recipe(tmp_path).resolve(structure())
    assert len(found.plan) == 6
    assert set(found.plan.values()) == {Scheme(QuantSpec("int4", (1, 64)))}
    assert found.skipped == {"lm_head": "outside the decoder layers, not named by a rule"}
    assert found.notes == (
        "scheme: group size 64: the largest of 128, 64, 32 that divides every input size of its 6 layers (576, 1536)",
    )


def test_the_last_matching_rule_decides_and_each_scheme_gets_its_own_group(tmp_path):
    found = recipe(
        tmp_path,
        "rules:\n"
        "- {match: '*.mlp.*', scheme: w8a16-channel}\n"
        "- {match: '*.down_proj', scheme: w3a16-asym}\n"
        "- {match: 're:model\\.layers\\.0\\..*', skip: true}\n"
        "- {match: lm_head, scheme: {dtype: int8, group_size: 32}}\n",
    ).resolve(structure())
    assert {name: scheme.weight.describe() for name, scheme in found.plan.items()} == {
        "model.layers.1.self_attn.q_proj": "int4 g64",
        "model.layers.1.mlp.up_proj": "int8 channel",
        "model.layers.1.mlp.down_proj": "int3 g128 asym",
        "lm_head": "int8 g32",
    }
    assert set(found.skipped.values()) == {"skipped by rule 3 ('re:model\\\\.layers\\\\.0\\\\..*')"}


def test_resolving_is_pure_and_ordered(tmp_path):
    found, model = recipe(tmp_path, "rules: [{match: '*.q_proj', group_size: 32}]\n"), structure()
    assert list(found.resolve(model).plan.items()) == list(found.resolve(model).plan.items())
    assert list(found.resolve(model).plan) == [site.name for site in model.sites]


def test_a_wildcard_does_not_reach_outside_the_blocks(tmp_path):
    assert "lm_head" not in recipe(tmp_path, "rules: [{match: '*', scheme: w8a16}]\n").resolve(structure()).plan


def test_a_rule_that_matches_nothing_lists_the_closest_sites(tmp_path):
    with pytest.raises(
        SpecError, match=r"rules\[0\]: match '\*\.down' matches no layer; closest: model\.layers\.\d\.mlp\.down_proj"
    ):
        recipe(tmp_path, "rules: [{match: '*.down', skip: true}]\n").resolve(structure())


def test_a_rule_without_effect_is_said(tmp_path):
    found = recipe(tmp_path, "rules: [{match: '*.q_proj', scheme: w8a16}, {match: '*', scheme: w4a16}]\n").resolve(structure())
    assert "rule 1 ('*.q_proj') has no effect: later rules decide every layer it matches" in found.notes


@pytest.mark.parametrize(
    "text", ["scheme: {name: w4a16, group_size: 128}\n", "scheme: w4a16-g128\n", "scheme: {bits: 4, group_size: 128}\n"]
)
def test_a_group_size_that_does_not_divide_names_the_first_site_and_counts_the_rest(tmp_path, text):
    with pytest.raises(SpecError) as caught:
        recipe(tmp_path, text).resolve(structure())
    message = str(caught.value)
    assert message.startswith("model.layers.0.self_attn.q_proj: in=576 is not a multiple of group_size 128; use 64 or channel")
    assert "(and 3 more layers)" in message


def test_no_group_fits_means_one_scale_per_channel_and_it_is_said(tmp_path):
    found = recipe(tmp_path).resolve(structure(hidden=72, inner=100))
    assert {scheme.weight.strategy for scheme in found.plan.values()} == {"channel"}
    assert "one scale per channel: none of 128, 64, 32 divides" in found.notes[0]


def test_an_odd_layer_alone_loses_its_groups_and_it_is_said(tmp_path):
    found = recipe(tmp_path).resolve(structure(hidden=256, inner=1000))
    assert {name.rsplit(".", 1)[-1]: scheme.weight.describe() for name, scheme in found.plan.items()} == {
        "q_proj": "int4 g128",
        "up_proj": "int4 g128",
        "down_proj": "int4 channel",
    }
    why = "one scale per channel, because 128 does not divide its input size 1000"
    assert found.remarks == {f"model.layers.{i}.mlp.down_proj": why for i in range(2)}
    assert found.notes == (
        f"scheme: group size 128 for 4 of its 6 layers; 2 others differ: model.layers.0.mlp.down_proj has {why}",
    )


def test_a_rules_group_size_counts_more_than_the_runs():
    found = make_plan(structure(), quantkit.SchemeChoice(name="w4a16", group_size=64), [quantkit.Rule("q_proj", group_size=32)])
    assert found.plan["model.layers.0.self_attn.q_proj"].weight.group_size == 32
    assert found.plan["model.layers.0.mlp.up_proj"].weight.group_size == 64


def test_the_ends_of_the_model_have_names_of_their_own(tmp_path):
    found = recipe(tmp_path, "rules: [{match: head, scheme: w8a16-g32}]\n").resolve(replace(structure(), head="lm_head"))
    assert found.plan["lm_head"].weight.describe() == "int8 g32"
    with pytest.raises(SpecError, match="rule 'embedding': the model has no input embedding"):
        recipe(tmp_path, "rules: [{match: embedding, scheme: w8a16}]\n").resolve(structure())


@pytest.mark.parametrize("match", ["down_proj", "mlp.down_proj", "*.down_proj", r"re:.*down_proj"])
def test_one_pattern_language(match):
    found = make_plan(structure(), "w4a16", [quantkit.Rule(match, skip=True)])
    assert [name for name in found.skipped if name != "lm_head"] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


def test_nothing_left_to_quantize_is_an_error(tmp_path):
    with pytest.raises(SpecError, match="nothing to quantize: the model has 7 layers and rules skip them all"):
        recipe(tmp_path, "rules: [{match: '*', skip: true}]\n").resolve(structure())
    with pytest.raises(QuantkitError, match="nothing to quantize: the model has 0 layers"):
        recipe(tmp_path).resolve(Structure((), (), {}))


def test_data_may_be_rows_and_columns_may_be_named(tmp_path):
    text = (
        "calibration: {data: [{body: a, title: b}], column: body, bos: true}\n"
        "evaluate: {data: [{messages: [{role: user, content: a}]}], column: messages, template: x}\n"
    )
    found = recipe(tmp_path, text)
    assert found.calibration == quantkit.Calibration([{"body": "a", "title": "b"}], column="body", bos=True)
    assert (found.evaluate.column, found.evaluate.template) == ("messages", "x")
    assert "calibration.data: want a file" in refusal(tmp_path, MINIMAL + "calibration: {data: {body: a}}\n")


def test_a_section_train_is_checked_and_planned(tmp_path):
    assert "train.step: unknown key; did you mean 'steps'" in refusal(tmp_path, MINIMAL + "train: {step: 2}\n")
    assert "train.rate" in refusal(tmp_path, MINIMAL + "train: {rate: 7}\n")
    recipe = load_recipe(write(tmp_path, MINIMAL + "train: {steps: 3, windows: 2}\n"))
    assert recipe.train == quantkit.Training(steps=3, windows=2)
