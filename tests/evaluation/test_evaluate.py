"""evaluate(), latency, footprint, coverage and the report that goes to the disk."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from quantkit.calibrate.data import Batch
from quantkit.checkpoint import save
from quantkit.errors import CalibrationError, FormatError, SpecError
from quantkit.evaluation import (
    BaseLogits,
    EvalReport,
    compare_latency,
    cut_windows,
    evaluate,
    footprint,
    measure_latency,
    score,
)
from quantkit.evaluation.coverage import CoverageRow, summarise
from quantkit.evaluation.latency import Spread
from quantkit.nn.embedding import max_positions
from quantkit.nn.linear import QuantLinear
from quantkit.numerics import grid
from quantkit.qtensor import GridTensor
from quantkit.spec import QuantSpec, Scheme
from tests.tiny import FAMILIES, TEXT, tiny_llama, tiny_tokenizer


def quantized(model, spec: QuantSpec):
    """Round every linear layer of the blocks to ``spec``, in place."""
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    weight = child.weight.detach()
                    scale, zero = grid.choose_qparams(weight, spec)
                    codes = grid.quantize(weight, scale, zero, spec)
                    setattr(parent, name, QuantLinear(GridTensor.from_codes(codes, scale, zero, spec)))
    return model


@pytest.fixture(scope="module")
def report():
    return evaluate(
        tiny_llama(seed=1),
        tiny_llama(seed=0),
        data=[TEXT],
        tokenizer=tiny_tokenizer(),
        windows=4,
        length=32,
        base_label="float",
    )


def test_a_report_says_what_was_measured_and_how(report):
    tokens = torch.tensor(tiny_tokenizer()(TEXT)["input_ids"])
    windows = cut_windows(tokens, length=32, count=4)
    assert report.quality == score(tiny_llama(seed=1), windows, tiny_llama(seed=0))
    protocol = report.protocol
    assert (protocol.source, protocol.length, protocol.stride, protocol.bos) == ("1 texts", 32, 32, False)
    assert (protocol.windows, protocol.tokens, protocol.kl_windows, protocol.kl_tokens) == (4, 124, 4, 124)
    assert (protocol.available_windows, protocol.fingerprint) == (windows.available, windows.fingerprint())
    assert (report.label, report.base) == ("float32", "float")
    assert report.environment.torch == torch.__version__
    assert report.environment.threads == torch.get_num_threads()
    assert report.environment.cpu
    assert report.latency.context_tokens == 96
    assert report.latency.decode_ms.p10 <= report.latency.decode_ms.median <= report.latency.decode_ms.p99


def test_a_report_shows_itself_in_a_line_and_in_a_table(report):
    line = repr(report)
    assert line.startswith(f"EvalReport({report.label}: perplexity {report.quality.perplexity:.4g} ± ")
    assert f"same top-1 {100 * report.quality.divergence.same_top1:.1f} %" in line
    assert "nats from float" in line
    assert f"decode {report.latency.decode_ms.median:.2f} ms per token" in line
    assert len(line) < 250
    table = dataclasses.replace(report, label="<b>&", base="<i>")._repr_html_()
    assert table.startswith("<table>")
    assert table.count("<tr>") == len(report.summary()) == 6
    assert "&lt;b&gt;&amp;" in table
    assert "&lt;i&gt;" in table
    assert "<b>" not in table
    assert "<i>" not in table
    bare = dataclasses.replace(
        report, latency=None, quality=dataclasses.replace(report.quality, divergence=None, perplexity_se=None)
    )
    assert list(bare.summary()) == ["perplexity", "bits per weight"]
    assert "±" not in repr(bare)


def test_a_report_survives_the_disk(report, tmp_path):
    report.save(tmp_path / "report.json")
    assert EvalReport.load(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text())["schema"] == "quantkit.eval-report/1"
    spread = Spread.of([1.0, 2.0])
    timings = compare_latency({"a": tiny_llama(), "b": tiny_llama()}, context=4, new_tokens=2, rounds=2)
    full = dataclasses.replace(report, latency=timings["b"], base=None)
    assert EvalReport.from_dict(json.loads(json.dumps(full.to_dict()))) == full
    assert spread == Spread(1.5, 1.1, 1.9, 1.99)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="quantkit.eval-report/9"), "schema is 'quantkit.eval-report/9'"),
        (lambda d: d.pop("protocol"), "missing .'protocol'."),
        (lambda d: d["quality"].update(surprise=1), "report.quality.*unknown .'surprise'."),
        (lambda d: d["quality"].update(nll="low"), "report.quality.nll: 'low' is a str, want float"),
        (lambda d: d["quality"]["divergence"]["quantiles"][3].append(1), r"quantiles\[3\]: 3 values, want 2"),
        (lambda d: d["protocol"].update(windows=True), "windows: True is a bool, want int"),
    ],
)
def test_damaged_reports_are_refused(report, change, message):
    data = json.loads(json.dumps(report.to_dict()))
    change(data)
    with pytest.raises(FormatError, match=message):
        EvalReport.from_dict(data)


def test_files_that_are_no_reports_are_refused(tmp_path):
    for content in ("{", "[]", "3"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(FormatError, match="report"):
            EvalReport.load(tmp_path / "x.json")
    with pytest.raises(FormatError, match="not an evaluation report"):
        EvalReport.load(tmp_path / "absent.json")


def test_data_comes_in_many_shapes():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tokens = torch.tensor(tokenizer(TEXT)["input_ids"])
    options = {"windows": 3, "length": 16, "latency": False}
    want = evaluate(model, data=[TEXT], tokenizer=tokenizer, **options).quality
    cut = cut_windows(tokens, length=16, count=3)
    for data in (tokens, cut, cut.ids, [Batch(cut.ids[:2]), Batch(cut.ids[2:])]):
        assert evaluate(model, data=data, **options).quality == want
    assert evaluate(model, data=tokens, **{**options, "windows": None}).protocol.windows == len(tokens) // 16


def test_a_text_file_is_named_without_its_folder(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    found = evaluate(tiny_llama(), data=tmp_path / "text.txt", tokenizer=tiny_tokenizer(), length=16, windows=2, latency=False)
    assert found.protocol.source == "text.txt"


def test_the_default_text_and_the_models_length_bound_the_windows():
    found = evaluate(tiny_llama(), tokenizer=tiny_tokenizer(), windows=2, latency=False)
    assert "language reference" in found.protocol.source
    assert found.protocol.length == 128 == max_positions(tiny_llama())


def test_bos_is_stated_and_scored_against():
    found = evaluate(tiny_llama(), data=[TEXT], tokenizer=tiny_tokenizer(), windows=2, length=16, bos=True, latency=False)
    assert (found.protocol.bos, found.protocol.tokens) == (True, 30)


def test_too_few_windows_are_said(caplog):
    evaluate(tiny_llama(), data=torch.arange(40), windows=20, length=16, latency=False)
    assert "windows=20: token ids has only 2 of length 16" in caplog.text


def test_missing_tokenizers_are_errors():
    with pytest.raises(CalibrationError, match="needs a tokenizer"):
        evaluate(tiny_llama(), data=[TEXT])
    with pytest.raises(CalibrationError, match="with a BOS token"):
        evaluate(tiny_llama(), data=torch.arange(40), bos=True, length=16)


def test_a_directory_is_loaded_and_weighed(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    found = evaluate(tmp_path / "tiny", str(tmp_path / "tiny"), data=[TEXT], windows=2, length=16, latency=False)
    assert (found.label, found.base) == ("tiny", "tiny")
    assert found.quality.divergence.mean == 0
    assert found.footprint.disk_bytes == sum(f.stat().st_size for f in (tmp_path / "tiny").iterdir())
    same = evaluate(model, data=[TEXT], tokenizer=tokenizer, windows=2, length=16, latency=False, path=tmp_path / "tiny")
    assert same.footprint == found.footprint


def test_a_quantized_checkpoint_is_loaded_as_one(tmp_path):
    spec = QuantSpec("int8", (1, 32))
    model = quantized(tiny_llama(), spec)
    plan = {name: Scheme(spec) for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    save(model, tmp_path / "w8", plan=plan, tokenizer=tiny_tokenizer())
    found = evaluate(tmp_path / "w8", model, data=[TEXT], windows=2, length=16, latency=False)
    assert (found.label, found.footprint.bits_per_weight) == ("w8", 8.5)
    assert found.quality.divergence.mean < 1e-9
    assert found.footprint.disk_bytes > found.footprint.stored_bytes


def test_one_base_for_several_models_is_a_remembered_one():
    base = BaseLogits(tiny_llama(seed=0))
    ids = torch.arange(64).view(4, 16)
    found = [evaluate(tiny_llama(seed=s), base, data=ids, latency=False).quality.divergence.mean for s in (0, 1, 1)]
    assert found[0] == 0 < found[1] == found[2]
    assert base.nbytes


def test_importing_is_light():
    code = "import sys, quantkit.evaluation; assert not {'matplotlib', 'transformers', 'rich', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_footprint_counts_what_a_checkpoint_stores():
    plain = footprint(tiny_llama())
    assert plain.stored_bytes == plain.tensor_bytes - 4 * 8 * 2 == 4 * plain.parameters  # two buffers of rotary frequencies
    assert (plain.bits_per_weight, plain.model_bits_per_weight, plain.quantized_share) == (32, 32, 0)
    spec = QuantSpec("int4", (1, 32), symmetric=False)
    found = footprint(quantized(tiny_llama(), spec))
    assert found.parameters == plain.parameters
    assert found.bits_per_weight == 4 + (16 + 4) / 32
    weights = sum(
        site.numel for site in [m.qtensor for m in quantized(tiny_llama(), spec).modules() if isinstance(m, QuantLinear)]
    )
    assert found.quantized_share == weights / plain.parameters
    assert found.stored_bytes == weights * found.bits_per_weight / 8 + 4 * (plain.parameters - weights)


def test_footprint_counts_tied_weights_once():
    tied, free = FAMILIES["llama_tied"](), FAMILIES["llama_tied"](tie_word_embeddings=False)
    assert footprint(free).parameters - footprint(tied).parameters == tied.lm_head.weight.numel()
    assert footprint(free).tensor_bytes - footprint(tied).tensor_bytes == tied.lm_head.weight.nbytes


def test_a_quantized_model_is_labelled_by_its_grid():
    model = quantized(tiny_llama(), QuantSpec("int8", (1, 32)))
    found = evaluate(model, tiny_llama(), data=torch.arange(64).view(4, 16), latency=False)
    assert found.label == "int8 g32"
    assert 0 < found.quality.divergence.mean < 1e-3


def test_models_are_timed_in_turn_and_compared_within_a_round():
    models = {"a": tiny_llama(), "b": tiny_llama(seed=1)}
    events = []
    found = compare_latency(models, context=8, new_tokens=3, rounds=2, progress=events.append)
    assert [event.detail for event in events] == ["a", "b"] * 3
    assert (events[-1].done, events[-1].total) == (6, 6)
    assert found["a"].speedup is None
    assert found["b"].speedup.baseline == "a"
    assert found["b"].speedup.decode.p10 <= found["b"].speedup.decode.p90
    assert (found["b"].context_tokens, found["b"].new_tokens, found["b"].rounds) == (8, 3, 2)
    assert found["a"].prefill_tokens_per_s.median > 0
    assert found["a"].peak_bytes > 10 << 20
    assert found["a"].device == "cpu"


def test_a_short_prompt_is_repeated():
    assert measure_latency(tiny_llama(), prompt=torch.tensor([5, 6]), context=7, new_tokens=1, rounds=1).context_tokens == 7


@pytest.mark.parametrize("options", [{"context": 0}, {"new_tokens": 0}, {"rounds": 0}, {"context": 128}])
def test_latency_arguments_are_checked(options):
    with pytest.raises(CalibrationError, match=r"want at least 1|128 positions"):
        measure_latency(tiny_llama(), **options)


def test_coverage_groups_keep_every_byte():
    rows = [
        CoverageRow("quantized", "a", "Linear", 100, 200, 60, "int4 g64"),
        CoverageRow("quantized", "b", "Linear", 100, 200, 60, "int4 g64"),
        CoverageRow("skipped", "c", "Embedding", 500, 1000, 1000, None, "embedding"),
        CoverageRow("fell back", "d", "Linear", 10, 20, 6, "int4 g64", "singular"),
        CoverageRow("skipped", "e", "RMSNorm", 5, 10, 10, None, "norm"),
    ]
    groups = summarise(rows)
    assert [(g.kind, g.module_type, g.count) for g in groups] == [
        ("quantized", "Linear", 2), ("fell back", "Linear", 1), ("skipped", "Embedding", 1), ("skipped", "RMSNorm", 1),
    ]  # fmt: skip
    for field in ("parameters", "bytes_before", "bytes_after"):
        assert sum(getattr(g, field) for g in groups) == sum(getattr(r, field) for r in rows)
    with pytest.raises(SpecError, match="'ignored'"):
        CoverageRow("ignored", "x", "Linear", 1, 1, 1)
