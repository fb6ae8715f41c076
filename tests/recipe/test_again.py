"""The same command again: it continues, measures what is missing, or is done."""

import threading
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from quantkit.cli import app, in_options
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


def leave_out(file: Path) -> None:
    file.unlink()


def empty(file: Path) -> None:
    file.write_bytes(b"")


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("harm", [leave_out, empty, halve])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_what_is_gone_from_beside_the_weights_is_written_again(tmp_path: Path, text: Path, harm: Any, name: str) -> None:
    assert call(text)[0] == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "q").iterdir()}
    harm(tmp_path / "q" / name)
    (tmp_path / "q" / "mine.txt").write_text("stays")
    code, output = call(text)
    after = {file.name: file.read_bytes() for file in (tmp_path / "q").iterdir()}
    assert (code, "already done: " in output) == (0, True), output
    assert after == {**before, "mine.txt": b"stays"}


def test_what_a_user_has_changed_beside_the_weights_stays(tmp_path: Path, text: Path) -> None:
    assert call(text)[0] == 0
    (tmp_path / "q" / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (tmp_path / "q" / "tokenizer.json").unlink()
    assert call(text)[0] == 0
    assert (tmp_path / "q" / "generation_config.json").read_text() == '{"max_new_tokens": 7}'
    assert (tmp_path / "q" / "tokenizer.json").read_bytes() == (tmp_path / "m" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_without_the_model_itself_the_way_out_is_named(tmp_path: Path, text: Path, name: str) -> None:
    assert call(text)[0] == 0
    before = (tmp_path / "q" / name).read_bytes()
    halve(tmp_path / "q" / name)
    code, output = call(text)
    assert (code, "delete the directory or pass --set output.overwrite=true" in output) == (2, True), output
    assert call(text, "--set", "output.overwrite=true")[0] == 0
    assert (tmp_path / "q" / name).read_bytes() == before


@pytest.mark.parametrize(
    ("command", "way_out"),
    [
        ("run", "pass --set output.overwrite=true or --set run.resume=false"),
        ("sweep", "pass --set output.overwrite=true or --set run.resume=false"),
        ("quantize", "pass --overwrite or --no-resume"),
        ("inspect", "pass overwrite=True or resume=False"),
        (None, "pass overwrite=True or resume=False"),
    ],
)
def test_messages_name_the_options_of_the_command(command: str | None, way_out: str) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert in_options("pass overwrite=True or resume=False", commands.get(command)) == way_out


def test_quantize_starts_over_if_told_to(tmp_path: Path, text: Path) -> None:
    ask = ["quantize", f"{tmp_path}/m", "--method", "rtn", "--data", f"{tmp_path}/text.txt", "--out", f"{tmp_path}/q"]
    ask += ["--samples", "2", "--length", "16"]
    assert CliRunner().invoke(app, ask).exit_code == 0
    assert "already done" in CliRunner().invoke(app, ask).output
    refused = CliRunner().invoke(app, [*ask, "--no-resume"], env={"COLUMNS": "500"})
    assert (refused.exit_code, "or pass --overwrite" in refused.output) == (2, True), refused.output
    again = CliRunner().invoke(app, [*ask, "--no-resume", "--overwrite"])
    assert (again.exit_code, "written to" in again.output) == (0, True), again.output
