"""What a newcomer meets first: chat, init, prompts from a pipe, common options, and errors in the command's own words."""

import gc
import json
import shutil
from types import SimpleNamespace

import jsonschema
import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

import quantkit
from quantkit.cli import app, in_options
from quantkit.cli.chat import HELP
from quantkit.errors import QuantkitError
from quantkit.generation.chat import Conversation
from quantkit.generation.generate import generate
from quantkit.hf import source
from quantkit.recipe.starter import recipe_schema
from tests.tiny import tiny_llama, tiny_tokenizer

TEMPLATE = "{% for m in messages %}<bos>{{ m.role }} {{ m.content }} . {% endfor %}"
MAKE = ("quantize", "run", "train", "search", "sweep")
COMMANDS = {name: one for name, one in get_command(app).commands.items()}


def call(*arguments: object, code: int = 0, stdin: str | None = None):
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(a) for a in arguments], input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def told(result) -> list[str]:
    """Return what was said beside the result; transformers' own bar is off where the command runs alone."""
    return [line for line in result.stderr.splitlines() if line and "Loading weights" not in line]


@pytest.fixture(params=["quantized", "float"])
def talker(request, tiny_quantized, tiny_float, tmp_path):
    """A directory of a model with a chat template."""
    shutil.copytree({"quantized": tiny_quantized, "float": tiny_float}[request.param], tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "model"


def test_chat_answers_lines_of_a_pipe_and_forgets(talker):
    done = call("chat", talker, "-n", 5, "--quiet", stdin="the cat\n\non the mat\n/reset\nthe cat\n/exit\nthe dog\n")
    model, tokenizer = quantkit.open_model(talker)
    turns, want = [], []
    for said in ("the cat", "on the mat"):
        turns += [{"role": "user", "content": said}]
        want.append(generate(model, turns, tokenizer, max_new_tokens=5).text)
        turns += [{"role": "assistant", "content": want[-1]}]
    assert done.stdout == "\n".join([*want, want[0], ""])
    assert "".join(told(done)) == ""


def test_chat_says_what_it_does(talker):
    done = call("chat", talker, "-n", 3, stdin="the cat\n/help\n/nothing here\nthe \\\ndog\n")
    assert told(done)[0] == "loading ..."
    assert done.stderr.count(HELP) == 3
    assert "native" in done.stderr
    assert "/nothing is no command" in done.stderr
    assert "cut after 3 tokens; --max-new-tokens allows more" in done.stderr


def test_chat_with_a_base_model_says_that_it_is_one(tiny_quantized):
    said = call("chat", tiny_quantized, stdin="hello\n", code=2).stderr
    assert "this model has no chat template" in said
    assert "quantkit generate MODEL PROMPT" in said


def test_a_conversation_longer_than_the_context_goes_on_without_that_turn():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    talk = Conversation(tiny_llama(), tokenizer, "be brief")
    assert talk.messages == [{"role": "system", "content": "be brief"}]
    answer, reason = talk.say("the cat", max_new_tokens=4)
    before = list(talk.messages)
    assert before[-1] == {"role": "assistant", "content": answer}
    assert reason in ("length", "stop")
    with pytest.raises(QuantkitError, match="/reset"):
        talk.say("the cat sat on the mat " * talk.context_tokens)
    assert talk.messages == before
    talk.reset()
    assert talk.messages == before[:1]
    assert talk.say("the cat", max_new_tokens=4)[0] == answer


def test_ctrl_c_ends_an_answer_and_not_the_conversation():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    talk = Conversation(tiny_llama(), tokenizer)

    def stop(piece):
        raise KeyboardInterrupt

    whole = Conversation(tiny_llama(), tokenizer).say("the cat", max_new_tokens=4)
    answer, reason = talk.say("the cat", stop, max_new_tokens=40)
    assert reason is None
    assert len(talk.messages) == 2
    assert talk.messages[-1]["content"] == answer
    talk.reset()
    assert talk.say("the cat", max_new_tokens=4) == whole


def test_a_prompt_comes_from_a_pipe(tiny_quantized):
    want = call("generate", tiny_quantized, "the cat sat", "-n", 6).stdout
    assert call("generate", tiny_quantized, "-n", 6, stdin="the cat sat\n").stdout == want
    assert call("generate", tiny_quantized, "-", "-n", 6, stdin="the cat sat").stdout == want
    assert "standard input is empty" in call("generate", tiny_quantized, stdin="", code=2).stderr


def test_json_is_all_there_is_on_stdout(tiny_quantized, tiny_text):
    found = json.loads(call("generate", tiny_quantized, "the cat", "-n", 3, "--json").stdout)
    assert len(found["ids"]) == 3
    options = ("--data", tiny_text, "--windows", 2, "--length", 48, "--no-latency", "--json")
    report = json.loads(call("eval", tiny_quantized, *options).stdout)
    assert report["compute"] == "exact"
    found = json.loads(call("bench", tiny_quantized, "--context", 8, "--new-tokens", 2, "--rounds", 1, "--json").stdout)
    assert found[str(tiny_quantized)]["decode_ms"]["median"] > 0


def test_quantize_says_as_json_what_became_of_every_weight(tiny_float, tmp_path):
    found = json.loads(call("quantize", tiny_float, "--out", tmp_path / "q", "--method", "rtn", "--json").stdout)
    assert found["path"] == str(tmp_path / "q")
    assert {row["kind"] for row in found["coverage"]} == {"quantized", "skipped"}
    assert all(row["reason"] for row in found["coverage"] if row["kind"] == "skipped")
    again = json.loads(call("quantize", tiny_float, "--out", tmp_path / "q", "--method", "rtn", "--json").stdout)
    assert (again.pop("already_done"), found.pop("already_done")) == (True, False)
    assert again == found


def test_quiet_leaves_results_and_errors(tiny_quantized, tiny_float, tmp_path):
    done = call("quantize", tiny_float, "--out", tmp_path / "q", "--method", "rtn", "-q")
    assert not told(done)
    assert "written to" in done.stdout
    assert call("generate", "./nothing", "a", "--quiet", code=2).stderr.startswith("error: cannot load a model")
    assert call("generate", tiny_quantized, "the cat", "-n", 2).stderr.startswith("loading ...")


def test_every_command_that_works_with_a_model_has_the_common_options():
    """What a command cannot use it does not offer: a recipe names its model's dtype, a server prints no JSON."""
    wanted = {
        "--device": {*MAKE, "eval", "bench", "generate", "chat", "serve", "trace"},
        "--dtype": {"quantize", "plan", "search", "eval", "bench", "generate", "chat", "serve", "trace"},
        "--revision": {"quantize", "plan", "search", "eval", "generate", "chat", "serve", "trace"},
        "--json": {*MAKE, "plan", "eval", "bench", "generate", "trace", "inspect", "list"},
        "--trust-remote-code": {*MAKE, "plan", "eval", "bench", "generate", "chat", "serve", "trace"},
        "--quiet": set(COMMANDS),
    }  # fmt: skip
    for option, names in wanted.items():
        without = {name for name in names if option not in {text for one in COMMANDS[name].params for text in one.opts}}
        assert not without, option


def test_a_device_or_dtype_that_is_none_is_an_error_in_the_commands_words(tiny_quantized, tiny_float, tmp_path):
    said = call("generate", tiny_quantized, "a", "--device", "tpu", code=2).stderr
    assert "--device tpu: want cpu or cuda" in said
    assert "--dtype int3" in call("eval", tiny_quantized, "--dtype", "int3", code=2).stderr
    assert "--compute fast; want one of auto" in call("chat", tiny_quantized, "--compute", "fast", code=2).stderr
    assert "no id of the hub" in call("generate", tiny_float, "a", "--revision", "main", code=2).stderr
    assert "want cpu or cuda" in call("quantize", tiny_float, "--out", tmp_path / "q", "--device", "tpu", code=2).stderr
    said = call("generate", tiny_quantized, "a", "--top-k", "5", code=2).stderr
    assert "--temperature" in said
    assert "temperature=" not in said


@pytest.mark.parametrize(
    ("message", "want"),
    [
        ("pass overwrite=True", "pass --overwrite"),
        ("pass resume=False to start over", "pass --no-resume to start over"),
        ("kv='int4' needs pages; use engine='modules'", "--kv int4 needs pages; use --engine modules"),
        ("q_proj: in=96 is not a multiple", "q_proj: in=96 is not a multiple"),
        ("windows=50: want at least 1", "windows=50: want at least 1"),
        ("kv: no effect (engine=modules)", "--kv: no effect (--engine modules)"),
        ("Output(kv=None): want a name", "--kv None: want a name"),
        ("Output(path=3): want a name", "Output(path=3): want a name"),
        ("there GPTQ(a=1, kv=2), kv=2", "there GPTQ(a=1, kv=2), --kv 2"),
        ("it is a step, which goes under engines; known", "it is a step, which goes under --engine; known"),
        ("output.kv: unknown 'x'", "--kv: unknown 'x'"),
        ("engines.0: unknown 'x'", "--engine: unknown 'x'"),
        ("it is; say --kv, or quantkit.load(..., kv='x') and give the model itself in place of its name", "it is; say --kv"),
    ],
)
def test_arguments_of_the_library_become_options(message, want):
    names = {"overwrite": [], "resume": ["--no-resume"], "kv": [], "engine": []}
    options = [SimpleNamespace(name=name, opts=[f"--{name}"], secondary_opts=no) for name, no in names.items()]
    assert in_options(message, SimpleNamespace(params=options)) == want


def test_init_writes_a_recipe_that_can_be_planned(tiny_float, tiny_text, tmp_path):
    out = tmp_path / "recipe.yaml"
    assert "quantkit plan" in call("init", tiny_float, "--out", out, "--data", tiny_text).stdout
    assert "# " in out.read_text()
    recipe = quantkit.load_recipe(out)
    assert (recipe.model, recipe.calibration.data) == (str(tiny_float), str(tiny_text))
    jsonschema.validate(yaml.safe_load(out.read_text()), recipe_schema())
    call("plan", out, "--set", "scheme=w4a16")
    said = call("init", tiny_float, "--out", out, code=2).stderr
    assert "is there already; choose another --out, or pass --overwrite" in said
    call("init", "a: b/c", "--out", out, "--budget", "4.25 bpw", "--overwrite")
    again = quantkit.load_recipe(out)
    assert (again.model, again.scheme.budget) == ("a: b/c", "4.25 bpw")
    before = out.read_bytes()
    assert "w4a61" in call("init", "demo", "--out", out, "--scheme", "w4a61", "--overwrite", code=2).stderr
    assert out.read_bytes() == before


def test_the_schema_takes_every_recipe_that_is_read_and_refuses_typing_errors():
    schema = json.loads(call("init", "--schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    checker = jsonschema.Draft202012Validator(schema)
    for path in quantkit.__path__:
        for recipe in sorted((__import__("pathlib").Path(path).parent / "recipes").glob("*.yaml")):
            data = yaml.safe_load(recipe.read_text())
            if "schemes" not in data:
                assert not list(checker.iter_errors(data)), recipe
    good = {"model": "demo", "output": {"path": "x"}}
    assert checker.is_valid(good)
    for bad in (
        {"mode": "x"},
        {"method": "gtpq"},
        {"calibration": {"samples": 0}},
        {"steps": ["awk"]},
        {"rules": [{"skip": 1}]},
    ):
        assert not checker.is_valid(good | bad), bad


def test_plan_takes_a_model_in_place_of_a_recipe(tiny_float):
    found = json.loads(call("plan", tiny_float, "--scheme", "w3a16", "--json").stdout)
    assert list(found["schemes"]) == ["int3 g32"]
    assert "peak memory" in call("plan", tiny_float).stdout
    assert (
        "--scheme gives every layer the same"
        in call("plan", tiny_float, "--scheme", "w3a16", "--budget", "4 bpw", code=2).stderr
    )


def test_help_groups_the_commands_and_names_the_first_step():
    shown = call("--help").stdout
    assert [shown.index(title) for title in ("Quantize ", "Use ", "Measure ", "This machine")] == sorted(
        shown.index(title) for title in ("Quantize ", "Use ", "Measure ", "This machine")
    )
    assert "quantkit quantize MODEL --out DIR" in " ".join(shown.split())
    assert "--install-completion" in shown


def test_inspect_says_why_a_layer_was_skipped(tiny_quantized, tiny_float, tmp_path):
    rows = json.loads(call("inspect", tiny_quantized, "--layers", "--json").stdout)["layers"]
    assert {row["reason"] for row in rows if row["layer"] == "model.embed_tokens.weight"} == {"embedding"}
    shown = call("inspect", tiny_quantized, "--layers").stdout
    assert "model.layers.1.mlp.down_proj" in shown
    model = quantkit.load(tiny_quantized)
    quantkit.save(model, tmp_path / "saved")
    said = call("inspect", tmp_path / "saved", "--layers", code=2).stderr
    assert "does not record what became of its layers" in said


def test_three_schemes_are_compared_without_a_file(tiny_float, tiny_text, tmp_path):
    options = ("--data", tiny_text, "--eval-data", tiny_text, "--samples", 4, "--length", 32, "--windows", 2, "--method", "rtn")
    schemes = [part for name in ("w8a16", "w4a16", "w3a16") for part in ("--scheme", name)]
    rows = json.loads(call("sweep", tiny_float, "--out", tmp_path / "s", *schemes, *options, "--json").stdout)
    assert [row["scheme"] for row in rows[1:]] == ["w8a16", "w4a16", "w3a16"]
    assert rows[1]["kl"] < rows[2]["kl"] < rows[3]["kl"]
    assert "wants --out and --scheme" in call("sweep", tiny_float, "--out", tmp_path / "t", code=2).stderr
    assert "w3a61" in call("sweep", tiny_float, "--out", tmp_path / "t", "--scheme", "w3a61", code=2).stderr


def test_a_revision_of_the_hub_goes_to_the_hub(tiny_float, monkeypatch):
    asked = []

    def download(name, revision=None, **options):
        asked.append((name, revision))
        return str(tiny_float)

    monkeypatch.setattr(source, "snapshot_download", download)
    assert call("generate", "owner/name", "the cat", "--revision", "v2", "-n", 2).stdout
    assert call("generate", "owner/name@v3", "the cat", "-n", 2).stdout
    call("generate", "owner/name", "the cat", "-n", 2)
    assert asked == [("owner/name", "v2"), ("owner/name", "v3"), ("owner/name", None)]
    asked.clear()
    assert "int3" in call("plan", "owner/name@v3", "--scheme", "w3a16").stdout
    assert set(asked) == {("owner/name", "v3")}
    assert source.hub_name("own/er@main") == ("own/er", "main")
    for path in ("./a@b", "/a@b", "a/b/c@d", "a/b@", "a@b", str(tiny_float)):
        assert source.hub_name(path) == (path, None)


def test_a_mistyped_name_never_asks_the_hub(monkeypatch):
    monkeypatch.setattr(source, "snapshot_download", None)
    for command in (("generate", "smolm2-w4", "a"), ("quantize", "smolm2", "--out", "x"), ("plan", "smolm2")):
        said = call(*command, code=2).stderr
        assert "there is no such file or directory" in said
        assert "owner/name" in said


def test_tables_for_notebooks(tiny_float, tmp_path):
    result = quantkit.quantize(tiny_float, "w4a16", method="rtn", rules=[quantkit.Rule("*.0.mlp.down_proj", skip=True)])
    table = result.layers()
    assert len(table) == len(result.coverage)
    kept = next(row for row in result.coverage if row.name == "model.layers.0.mlp.down_proj")
    assert "skipped by rule 1" in kept.reason
    assert "skipped by rule 1" in result.coverage._repr_html_()
    assert repr(result.coverage).startswith(f"Coverage of {len(result.coverage)} weights\n")
    assert len(repr(result.coverage).splitlines()) < 10
    plan = quantkit.plan(tiny_float, "w4a16")
    assert "model.layers.*.mlp.down_proj" in plan._repr_html_()
    assert result._repr_html_().startswith("<table>")


def test_plan_says_what_fits_this_machine(tiny_float, tiny_quantized, tmp_path):
    options = ("--serve", "--context", 64, "--context", 128, "--users", 2)
    found = json.loads(call("plan", tiny_float, *options, "--json").stdout)
    assert [(row["weights"], row["context"]) for row in found["rows"]] == [
        (name, context) for name in ("float32", "w8a16", "w4a16-asym") for context in (64, 128)
    ]
    sizes = {row["weights"]: row["weight_bytes"] for row in found["rows"]}
    assert sizes["float32"] > sizes["w8a16"] > sizes["w4a16-asym"]
    shown = call("plan", tiny_quantized, "--serve", "--kv", "int8").stdout
    assert "what fits, with int8 keys and values" in shown
    assert "of reading alone" in shown
    of_scheme = json.loads(call("plan", tiny_float, *options, "--scheme", "w3a16", "--json").stdout)
    assert {row["weights"] for row in of_scheme["rows"]} == {"float32", "w3a16"}
    assert "the model takes 512 tokens at most" in call("plan", tiny_float, "--serve", "--context", 9999, code=2).stderr


def test_every_option_and_argument_is_explained_in_words_that_reach_the_screen():
    for name, command in get_command(app).commands.items():
        for parameter in command.params:
            said = parameter.help or ""
            assert said, f"{name} {parameter.name} says nothing"
            assert "[" not in said, f"{name} {parameter.name}: what stands in brackets is taken for a style and left out"


def test_a_command_without_weights_leaves_the_collector_of_garbage_as_it_was():
    assert gc.isenabled()
    assert CliRunner().invoke(app, ["list"]).exit_code == 0
    assert gc.isenabled()


def test_a_mistyped_base_is_refused_before_the_model_is_loaded(tiny_quantized, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("quantkit.cli.evaluate.load", never)
    result = CliRunner().invoke(app, ["eval", str(tiny_quantized), "--base", "./not-there"])
    assert result.exit_code == 2, result.output
    assert "cannot load a model from ./not-there" in result.output
