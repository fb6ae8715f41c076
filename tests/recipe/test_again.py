"""The same command again: it continues, measures what is missing, or is done."""

import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantkit.cli import app
from quantkit.errors import BusyError
from quantkit.evaluation import EvalReport
from quantkit.recipe import run as module
from quantkit.recipe.run import run_recipe
from quantkit.recipe.schema import Recipe
from quantkit.system.files import TEMPORARY
from quantkit.system.lock import lock
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A recipe for a tiny model; the output takes the place of the model that it is made from."""
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "text.txt").write_text("the cat sat on a mat and sang of bread\n" * 20)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tmp_path}/m\nscheme: w4a16\nmethod: rtn\noutput: {{path: {tmp_path}/q}}\n"
        f"evaluate: {{data: {tmp_path}/text.txt, windows: 2, length: 16, latency: false}}\n"
    )
    return recipe


def call(recipe: Path, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["run", str(recipe), *options], env={"COLUMNS": "500"})
    return done.exit_code, done.output


def interrupted(*_: object, **__: object) -> EvalReport:
    raise KeyboardInterrupt


@pytest.mark.parametrize("in_place", [False, True])
def test_a_run_that_was_stopped_while_it_measured_measures(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    out = tmp_path / ("m" if in_place else "q")
    options = ("--set", f"output.path={out}", "--set", "output.overwrite=true") if in_place else ()
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", interrupted)
        assert call(text, *options)[0] == 130
    weights = (out / "model.safetensors").read_bytes()
    assert not (out / "evaluation.json").exists()
    (out / f".evaluation.json.0{TEMPORARY}").write_text("{")  # what a kill leaves while the report is written
    code, output = call(text, *options)
    assert (code, f"already done: {out}" in output) == (0, True), output
    report = EvalReport.load(out / "evaluation.json")
    assert (report.base is None) == in_place, "where the float model was replaced there is nothing to compare with"
    assert (out / "model.safetensors").read_bytes() == weights
    assert not list(out.glob(f".*{TEMPORARY}"))
    if not in_place:
        monkeypatch.setattr(module, "evaluate", interrupted)  # nothing is measured twice
        assert call(text)[0] == 0
        assert call(text, "--set", "evaluate.windows=3")[0] == 130
    code, output = call(text, *options, "--set", "scheme=w8a16")
    assert (code, "another run: " in output and "plan" in output) == (2, True), output


def test_a_recipe_waits_for_nobody_and_says_who_is_at_work(tmp_path: Path, text: Path) -> None:
    recipe = Recipe.model_validate({"model": str(tmp_path / "m"), "output": {"path": str(tmp_path / "q")}})
    found: list[BaseException] = []

    def second() -> None:
        try:
            run_recipe(recipe)
        except BusyError as error:
            found.append(error)

    with lock(tmp_path / "q", "carrying out a recipe"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "carrying out a recipe, process" in str(found[0])
    assert not (tmp_path / "q").exists()
