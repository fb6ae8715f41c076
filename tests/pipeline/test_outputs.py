"""One quantization written in several formats: the same codes everywhere, continued after a kill, refused before any work."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import quantkit
from quantkit import Output, QuantSpec, Run, Scheme, reformat
from quantkit.checkpoint.read import open_checkpoint
from quantkit.checkpoint.reformat import open_source
from quantkit.checkpoint.regrid import regridded
from quantkit.cli import app
from quantkit.errors import FormatError, RecipeError, SpecError
from quantkit.pipeline import outputs
from quantkit.pipeline.reformat import convert, key_of
from quantkit.recipe.schema import load_recipe, recipe_of
from quantkit.sweeps.schema import SweepRecipe
from tests.tiny import FAMILIES, tiny_tokenizer

FORMATS = ("compressed-tensors", "gptq", "mlx", "gguf", "awq", "native")
IDS = torch.arange(3, 23)[None]


def several(folder: Path, *formats: str) -> list[Output]:
    return [Output(folder / name, format=name) for name in formats]


def quantize(folder: Path, formats: tuple[str, ...] = FORMATS, scheme: Any = "w4a16-g32", **options: Any) -> Any:
    model = FAMILIES["llama"]()
    output = several(folder, *formats)
    return quantkit.quantize(model, scheme, method="rtn", output=output, tokenizer=tiny_tokenizer(), **options)


@torch.no_grad()
def logits(path: Path) -> torch.Tensor:
    found: torch.Tensor = quantkit.load(path)(input_ids=IDS).logits
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("outputs")
    return folder, quantize(folder)


def test_every_format_has_the_same_numbers(made: tuple[Path, Any]) -> None:
    folder, result = made
    assert [one["format"] for one in result.outputs] == list(FORMATS[1:])
    assert all(one["reload_kl"] < 1e-6 and not one["already_done"] for one in result.outputs)
    first = logits(folder / FORMATS[0])
    with open_checkpoint(folder / FORMATS[0]) as source:
        for name in FORMATS[1:]:
            with open_checkpoint(folder / name) as other:
                assert other.format_name == name
                for layer in source.schemes:
                    one, two = (opened.qtensor(opened.contents.sites[layer]) for opened in (source, other))
                    back = regridded(two, one.spec)
                    assert back is not None
                    assert all(torch.equal(back.parts()[key], part) for key, part in one.parts().items())
            assert torch.allclose(logits(folder / name), first, atol=1e-5)
    assert result.facts()["the same as mlx"] == str(folder / "mlx")


def test_the_same_call_is_done_already_and_what_is_missing_is_made_again(made: tuple[Path, Any]) -> None:
    folder, _ = made
    again = quantize(folder)
    assert again.already_done
    assert all(one["already_done"] for one in again.outputs)
    gone = folder / "mlx" / "model.safetensors"
    before = gone.read_bytes()
    gone.unlink()
    with pytest.raises(FormatError, match=r"model\.safetensors is gone; delete it"):
        quantize(folder)
    (folder / "mlx" / "config.json").unlink()
    (folder / "mlx" / "quantkit.json").unlink()
    assert [one["already_done"] for one in quantize(folder).outputs] == [True, False, True, True, True]
    assert gone.read_bytes() == before


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_killed_run_continues_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    whole, formats = tmp_path / "whole", ("compressed-tensors", "gptq", "mlx")
    quantize(whole, formats)
    seen: list[str] = []
    real = outputs.convert

    def convert(*args: Any, **options: Any) -> Any:
        if len(seen) == after:
            raise KeyboardInterrupt
        seen.append("one")
        return real(*args, **options)

    killed = tmp_path / "killed"
    monkeypatch.setattr(outputs, "convert", convert)
    if after < 2:
        with pytest.raises(KeyboardInterrupt):
            quantize(killed, formats)
    monkeypatch.setattr(outputs, "convert", real)
    result = quantize(killed, formats)
    assert [one["already_done"] for one in result.outputs] == [i < after for i in range(2)] if after < 2 else True
    for name in formats:
        assert (killed / name / "model.safetensors").read_bytes() == (whole / name / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("formats", "scheme", "words"),
    [
        (("compressed-tensors", "gguf"), "w4a16-asym-g32", "format gguf beside the first output: .*layers.*formats that hold"),
        (("compressed-tensors", "awq"), "w8a16", "format awq beside .*formats that hold these numbers: .*gptq.*native"),
        (("native", "gptq"), Scheme(QuantSpec("nf4", (1, 32))), "format gptq beside"),
        (("gguf", "gptq"), "w4a16-g32", "a GGUF file holds blocks"),
        (("native", "float"), "w4a16-g32", "format float"),
    ],
)
def test_what_one_of_the_formats_cannot_hold_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, formats: tuple[str, ...], scheme: Any, words: str
) -> None:
    monkeypatch.setattr("quantkit.pipeline.quantize._carry_out", lambda *args: pytest.fail("work was begun"))
    with pytest.raises((FormatError, SpecError), match=words):
        quantize(tmp_path, formats, scheme)
    recipe = {"model": "demo", "scheme": scheme, "output": [{"path": name, "format": name} for name in formats]}
    assert recipe_of(recipe).output.formats == formats


def test_bfloat16_scales_are_told_of(tmp_path: Path) -> None:
    model = FAMILIES["llama"]().to(torch.bfloat16)
    with pytest.raises(FormatError, match="load the model in float16 or float32"):
        quantkit.quantize(model, "w4a16-g32", method="rtn", output=several(tmp_path, "compressed-tensors", "gguf"))


def test_mistakes_in_lists_of_outputs(tmp_path: Path) -> None:
    for wrong in ([], [Output(None), Output(tmp_path)], [Output(tmp_path), Output(tmp_path)], [Output(tmp_path), "gptq"]):
        with pytest.raises((FormatError, SpecError)):
            quantkit.quantize(FAMILIES["llama"](), output=wrong)  # type: ignore[arg-type]
    file = tmp_path / "recipe.yaml"
    file.write_text("model: demo\noutput:\n  - {path: a}\n  - {path: b, format: gptqq}\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:4:15: .*unknown format 'gptqq'"):
        load_recipe(file)
    file.write_text("model: demo\noutput: []\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:2:.*at least one output"):
        load_recipe(file)
    with pytest.raises(Exception, match="one format"):
        SweepRecipe.model_validate({"model": "demo", "output": {"path": "a", "also": [{"path": "b"}]}})
    with pytest.raises(SpecError, match="one format"):
        quantkit.sweep("demo", ["w8a16"], output=dataclasses.replace(Output(tmp_path), also=(Output(tmp_path / "b"),)))


def test_a_conversion_that_was_killed_goes_on(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = made
    stopped = tmp_path / "stopped"

    def check(stage: Path) -> Any:
        raise KeyboardInterrupt

    source = folder / "native"
    with open_source(source, "gptq") as opened:
        key = {**key_of(opened), "format": "gptq", "settings": "lossy=False, dtype=None"}
        with pytest.raises(KeyboardInterrupt):
            convert(opened, stopped, "gptq", key=key, overwrite=False, check=check)
    with pytest.raises(FormatError, match="quantkit run has not finished"):
        quantkit.load(stopped)
    assert not reformat(source, "gptq", stopped)["already_done"]
    assert (stopped / "model.safetensors").read_bytes() == (folder / "gptq" / "model.safetensors").read_bytes()
    assert json.loads((stopped / "quantkit.json").read_text())["key"]["format"] == "gptq"


def test_no_resume_makes_all_of_them_again(made: tuple[Path, Any], tmp_path: Path) -> None:
    quantize(tmp_path, ("native", "gptq"))
    with pytest.raises(FormatError, match="already holds a model"):
        quantize(tmp_path, ("native", "gptq"), run=Run(resume=False))


def test_the_command_takes_a_format_several_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("quantkit.cli.search.carry_out", lambda recipe, *args: seen.append(recipe))
    out = tmp_path / "out"
    for arguments in (["--format", "gptq", "--format", "mlx"], ["--format", "gptq"], []):
        done = CliRunner().invoke(app, ["quantize", "demo", "--out", str(out), *arguments])
        assert done.exit_code == 0, done.output
    paths = [[(Path(str(one.path)), one.format) for one in recipe.output.all] for recipe in seen]
    assert paths == [[(out / "gptq", "gptq"), (out / "mlx", "mlx")], [(out, "gptq")], [(out, "compressed-tensors")]]
    assert (
        CliRunner().invoke(app, ["quantize", "demo", "--out", str(out), "--format", "gptq", "--format", "gptq"]).exit_code != 0
    )
