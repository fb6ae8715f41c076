"""The command: what each sub-command shows, and how errors and Ctrl-C end."""

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

import quantkit
from quantkit.cli import _shown_by_nobody, app
from quantkit.cli.bars import progress_bars
from quantkit.cli.console import parse_settings, size
from quantkit.errors import RecipeError
from quantkit.system.progress import Progress

COMMANDS = (
    "bench", "build-kernels", "cache", "demo", "doctor", "eval", "generate", "inspect", "list", "plan", "run", "serve", "sweep",
    "trace",
)  # fmt: skip


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output.removeprefix("loading ...\n")  # the sign of life, on standard error


@pytest.fixture
def recipe(tmp_path, tiny_float, tiny_text) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_float}\nscheme: w4a16\nmethod: gptq\n"
        "rules:\n- {match: '*.down_proj', scheme: w8a16-channel}\n"
        f"calibration: {{data: {tiny_text}, samples: 4, length: 32}}\n"
        f"output: {{path: {tmp_path / 'out'}}}\n"
        f"evaluate: {{data: {tiny_text}, windows: 2, length: 48}}\n"
    )
    return path


def test_a_record_that_a_library_shows_itself_is_not_shown_twice(monkeypatch):
    own, plain = logging.getLogger("a_library"), logging.getLogger("another_library")
    monkeypatch.setattr(own, "handlers", [logging.NullHandler()])
    record = lambda name: logging.LogRecord(name, logging.WARNING, "", 1, "said", None, None)  # noqa: E731
    assert not _shown_by_nobody(record(f"{own.name}.part"))
    assert not _shown_by_nobody(record(own.name))
    assert _shown_by_nobody(record(plain.name))
    assert _shown_by_nobody(record("quantkit.engine"))


def test_help_lists_every_command():
    shown = call("--help")
    for command in COMMANDS:
        assert command in shown
        assert "Usage" in call(command, "--help")


def test_version():
    assert call("--version").strip() == f"quantkit {quantkit.__version__}"


def test_plan_predicts_and_writes_nothing(recipe, tmp_path):
    shown = call("plan", recipe)
    for text in (
        "int4 g64",
        "int8 channel",
        "embedding",
        "tied to",
        "peak memory",
        "128 tokens",
        "note: scheme: group size 64",
    ):
        assert text in shown
    assert not (tmp_path / "out").exists()
    found = json.loads(call("plan", recipe, "--json"))
    assert len(found["plan"]) == 14
    assert found["schemes"]["int8 channel"] == [2, 2 * 64 * 96]


def test_plan_agrees_with_run(recipe, tmp_path):
    predicted = json.loads(call("plan", recipe, "--json"))
    shown = call("run", recipe)
    for text in ("int4 g64", "int8 channel", "embedding", "perplexity", f"written to {tmp_path / 'out'}"):
        assert text in shown
    found = json.loads(call("inspect", tmp_path / "out", "--json"))
    assert found["quantized_parameters"] == predicted["weights"]
    assert found["quantized_bytes"] == predicted["quantized_bytes"]
    assert found["metadata"]["bits_per_weight"] == predicted["bits_per_weight"]
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert saved["quality"]["divergence"]["mean"] > 0


def test_set_overrides_a_key(recipe):
    found = json.loads(call("plan", recipe, "--json", "--set", "scheme=w3a16", "--set", "rules=[]"))
    assert list(found["schemes"]) == ["int3 g32"]


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("scheme=w3a61", "did you mean 'w3a16'"),
        ("schem=1", "did you mean 'scheme'"),
        ("x", "want KEY=VALUE"),
        ("a=[", "not valid YAML"),
    ],
)
def test_a_bad_recipe_is_one_message_and_exit_code_2(recipe, setting, wanted):
    shown = call("plan", recipe, "--set", setting, code=2)
    assert shown.startswith("error: ")
    assert wanted in shown
    assert "Traceback" not in shown


def test_plan_refuses_what_run_would(recipe):
    shown = call(
        "plan",
        recipe,
        "--set",
        "steps=[distill]",
        "--set",
        "rules=[{match: '*.down_proj', scheme: nvfp4}]",
        code=2,
    )
    assert "distillation learns integer grids" in shown


def test_debug_shows_the_traceback(tmp_path):
    result = CliRunner().invoke(app, ["--debug", "plan", str(tmp_path / "absent.yaml")])
    assert isinstance(result.exception, RecipeError)


def test_a_model_that_is_not_there(recipe, tmp_path):
    assert "cannot read the config of" in call("plan", recipe, "--set", f"model={tmp_path}", code=2)
    assert "absent is not a directory" in call("inspect", tmp_path / "absent", code=2)


def test_a_quantized_model_is_no_float_model(recipe, tiny_quantized):
    assert "is already quantized, want a float model" in call("plan", recipe, "--set", f"model={tiny_quantized}", code=2)


def test_an_output_that_holds_a_model_is_refused(recipe, tiny_quantized):
    before = (tiny_quantized / "config.json").read_bytes()
    assert "already holds a model" in call("run", recipe, "--set", f"output.path={tiny_quantized}", code=2)
    assert (tiny_quantized / "config.json").read_bytes() == before


def test_inspect(tiny_quantized):
    shown = call("inspect", tiny_quantized)
    for text in ("LlamaForCausalLM, float32", "int4 g32: 14 layers", "compressed-tensors", "recorded.quality.kl_mean"):
        assert text in shown


def test_doctor():
    shown = call("doctor")
    for text in ("reference", "torch", "cache", "cuda"):
        assert text in shown
    assert {row["kernel"] for row in json.loads(call("doctor", "--json"))["kernels"]} >= {"cpu", "reference"}


def test_eval_with_a_base_and_files(tiny_quantized, tiny_float, tiny_text, tmp_path):
    options = ["--data", tiny_text, "--windows", 2, "--length", 48, "--no-latency"]
    shown = call(
        "eval", tiny_quantized, "--base", tiny_float, *options, "--out", tmp_path / "r.json", "--html", tmp_path / "r.html"
    )
    assert "perplexity" in shown
    report = quantkit.EvalReport.load(tmp_path / "r.json")
    assert report.quality.divergence is not None
    assert report.quality.divergence.mean > 0
    assert "<html" in (tmp_path / "r.html").read_text()


def test_bench_times_models_in_turn(tiny_quantized, tiny_float):
    shown = call("bench", tiny_float, tiny_quantized, "--context", 8, "--new-tokens", 2, "--rounds", 1)
    assert "prefill tokens/s" in shown
    assert "x" in shown.splitlines()[-2]


def test_demo_replaces_an_earlier_one_and_says_what_to_do_next(tiny_float, tiny_quantized, tmp_path):
    shutil.copytree(tiny_quantized, tmp_path / "w8")
    shown = " ".join(call("demo", "--model", tiny_float, "--out", tmp_path, "--quick").split())  # wherever lines end
    for text in (
        "bf16",
        "W8",
        "W4 RTN g32",
        "W4 GPTQ g32",
        "report.html",
        "quantkit generate",
        "from_pretrained",
        "vllm serve",
    ):
        assert text in shown
    assert json.loads(call("inspect", tmp_path / "w8", "--json"))["schemes"][0]["describe"] == "int8 g32"


def test_generate_streams_and_is_deterministic(tiny_quantized):
    first, again = (call("generate", tiny_quantized, "the cat sat", "-n", 6).splitlines()[0] for _ in range(2))
    assert first == again != ""
    assert "[6 tokens, length;" in call("generate", tiny_quantized, "the cat sat", "-n", 6)


def test_generate_with_drafts_and_quantized_memory(tiny_quantized):
    plain = call("generate", tiny_quantized, "the cat sat", "-n", 24).splitlines()[0]
    drafted = call("generate", tiny_quantized, "the cat sat", "-n", 24, "--drafter", "ngram")
    assert drafted.splitlines()[0] == plain
    assert "drafts accepted" in drafted
    assert "[6 tokens" in call("generate", tiny_quantized, "the cat sat", "-n", 6, "--kv", "int8")
    assert "unknown key/value scheme 'int5'" in call("generate", tiny_quantized, "the cat", "--kv", "int5", code=2)
    assert "ngrams" in call("generate", tiny_quantized, "the cat", "--drafter", "ngrams", code=2)


def test_trace_compares_kinds_of_batching(tiny_float, tmp_path):
    out = tmp_path / "trace.json"
    page = tmp_path / "trace.html"
    options = ("--requests", 6, "--new", "2:9", "--prompt", "3:5", "--running", 2, "--price", 0.5, "--out", out, "--html", page)
    said = call("trace", tiny_float, *options, "--batching", "padded,static,continuous")
    assert "cost per million tokens" in said
    found = json.loads(out.read_text())
    assert list(found) == ["padded", "static", "continuous"]
    assert len({one["new_tokens"] for one in found.values()}) == 1
    assert found["continuous"]["steps"] <= found["padded"]["steps"]
    written = page.read_text()
    assert written.count("<svg") == 2
    assert all(part in written for part in ("Time to the first token", "<td>continuous</td>", "cost per million tokens"))
    assert "http" not in written.replace("http://www.w3.org", "")  # nothing is fetched
    assert "want LOW:HIGH" in call("trace", tiny_float, "--new", "many", code=2)
    assert "did you mean 'static'" in call("trace", tiny_float, "--batching", "statik", code=2)


def test_serve_listens_says_where_and_stops(tiny_float):
    command = [
        sys.executable,
        "-m",
        "quantkit",
        "serve",
        str(tiny_float),
        "--port",
        "0",
        "--name",
        "tiny",
        "--kv-tokens",
        "256",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = list(itertools.takewhile(lambda line: not line.startswith("many users"), iter(process.stdout.readline, "")))
            address = re.search(r"http://127.0.0.1:(\d+)/v1 \(model tiny\)", "".join(said))
            assert address is not None
            for _ in range(100):
                with contextlib.suppress(OSError):
                    found = urllib.request.urlopen(f"http://127.0.0.1:{address[1]}/health").read()
                    break
                time.sleep(0.05)
            assert json.loads(found) == {"status": "ok"}
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_generate_needs_a_chat_template_for_chat(tiny_quantized):
    assert "no chat template" in call("generate", tiny_quantized, "hi", "--chat", code=2)


def test_sizes_and_settings():
    assert [size(n) for n in (0, 999, 1500, 269_060_000, 5e12)] == ["0 B", "999 B", "1.5 kB", "269.1 MB", "5.00 TB"]
    assert parse_settings(["a.b=8", "c=[1, x]", "d=e=f"]) == {"a.b": 8, "c": [1, "x"], "d": "e=f"}


def test_progress_without_a_terminal_is_a_line_per_stage(capsys):
    with progress_bars() as progress:
        for done in (1, 2):
            progress(Progress("quantize", done, 2, "site", 0.5))
        progress(Progress("quantize", 1, 1))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" in ")[0] for line in lines] == ["quantize: 2 steps", "quantize: 1 steps"]


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(recipe, tmp_path):
    options = ["--set", "calibration.samples=64", "--set", "calibration.length=16", "--set", "calibration.batch_size=1"]
    command = [sys.executable, "-m", "quantkit", "run", str(recipe), *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    started = time.monotonic()
    while not list(tmp_path.glob("out/incomplete/run/chain-*")) and process.poll() is None and time.monotonic() - started < 300:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1] == "interrupted; give the same command again to continue where it stopped"
    assert not (tmp_path / "out" / "config.json").exists()
    assert "written to" in call("run", recipe, *options)
