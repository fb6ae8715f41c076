"""train(): the loss falls, the checkpoint is proven, and a run that is killed ends in the bytes of one that was not."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit.checkpoint.contents import contents_of
from quantkit.errors import CalibrationError, FormatError, QuantkitError, SpecError
from quantkit.pipeline.training import loop, timing
from quantkit.pipeline.training.loop import rise_and_fall
from quantkit.pipeline.training.loss import Losses, Objective
from quantkit.pipeline.training.picture import smoothed
from quantkit.pipeline.training.settings import Training
from quantkit.pipeline.training.teacher import Live
from quantkit.report.cells import significant
from quantkit.report.trained import LivePage
from quantkit.system.progress import Progress
from tests.tiny import FAMILIES, tiny_llama

SETTINGS = Training(steps=8, windows=2, evaluate_every=4, held_out=2, share=0.0, rate=0.05, save_every_s=0.0, dtype="float32")
TEXT = quantkit.Calibration(data=[torch.randint(3, 190, (8, 24), generator=torch.Generator().manual_seed(1))])
NATIVE = quantkit.Output(format="native")


def trained(out: Path | None, training: Training = SETTINGS, **options) -> quantkit.QuantizeResult:
    options = {"method": "rtn", "training": training, **options}
    return quantkit.train(tiny_llama(), "w2a16-asym-g32", out=out, output=NATIVE, **{"calibration": TEXT, **options})


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("whole") / "out").path


@pytest.mark.parametrize("loss", ["distill", "next-token", "mixed"])
def test_the_loss_falls_and_the_result_says_so(loss: str) -> None:
    training = dataclasses.replace(SETTINGS, loss=loss, steps=24, evaluate_every=6, rate=0.1)
    events: list[Progress] = []
    result = trained(None, training, run=quantkit.Run(progress=events.append))
    facts = result.metadata["training"]
    share = training.next_token_share
    total = [(1 - share) * (kl or 0) + share * (nll or 0) for kl, nll in zip(facts["kl"], facts["nll"], strict=True)]
    assert facts["evaluations"][0]["steps"] == 0
    assert sum(total[-4:]) < 0.9 * sum(total[:4])
    assert len(total) == 24 == sum(event.stage == "train" for event in events)
    assert {row.kind for row in result.coverage} == {"quantized", "skipped"}
    (axes,) = result.plot_training().axes
    assert axes.get_ylabel().startswith("KL" if share < 1 else "NLL")
    assert result.metadata["quality"]["kl_mean"] > 0
    best = min(facts["evaluations"], key=lambda one: (1 - share) * (one["kl"] or 0) + share * one["nll"])
    assert best["steps"] == facts["best_after"]


def test_scales_alone_bring_the_model_closer() -> None:
    """Weights that begin with their codes' own values leave scales no gradient unless they move along."""
    text = dataclasses.replace(TEXT, data=[torch.randint(3, 190, (32, 24), generator=torch.Generator().manual_seed(1))])
    training = dataclasses.replace(SETTINGS, steps=24, windows=8, evaluate_every=24, rate=1e-9, scale_rate=0.01, warm_steps=2)
    result = trained(None, training, calibration=text)
    before, after = (one["kl"] for one in result.metadata["training"]["evaluations"])
    assert after < 0.96 * before  # 0.99 if they do not
    codes = {name: one.qtensor.codes() for name, one in result.model.named_modules() if hasattr(one, "qtensor")}
    start = quantkit.quantize(tiny_llama(), "w2a16-asym-g32", method="rtn", calibration=text).model
    assert all(torch.equal(start.get_submodule(name).qtensor.codes(), mine) for name, mine in codes.items())


def test_the_checkpoint_is_the_best_that_was_seen_and_is_known_again(whole: Path) -> None:
    again = trained(whole)
    assert again.already_done
    facts = again.metadata["training"]
    assert not (whole / "training").exists()
    held = [row for i, row in enumerate(TEXT.data[0]) if i in (2, 6)]
    kl = Objective(Live(tiny_llama()), 0.0, 1).evaluate(quantkit.load(whole), held).kl
    assert kl == pytest.approx(min(one["kl"] for one in facts["evaluations"]), rel=1e-3)
    with pytest.raises(FormatError, match="of another run"):
        trained(whole, dataclasses.replace(SETTINGS, rate=0.02))


class Killed(BaseException):
    """Stands for a signal."""


MOMENTS = ("at the start", "in a step", "in an update", "while saving", "while saving the last", "after saving", "at the end")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_bytes(
    moment: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        place, name, call = {
            "at the start": (loop.Learner, "evaluate", 1),
            "in a step": (Objective, "add_gradient", 6),
            "in an update": (torch.optim.AdamW, "zero_grad", 5),
            "while saving": ("quantkit.pipeline.training.state", "write_json", 4),
            "while saving the last": ("quantkit.pipeline.training.state", "write_json", 9),
            "after saving": (loop.Learner, "step", 6),
            "at the end": ("quantkit.pipeline.train", "_written", 1),
        }[moment]
        kill(patch, place, name, call)
        with pytest.raises(Killed):
            trained(out)
    assert not (out / "config.json").exists()
    stopped_at = json.loads((out / "training/state.json").read_text()) if moment not in ("at the start",) else None
    assert stopped_at is None or 0 < len(stopped_at["history"]["steps"]) <= 8
    (out / "training/.tmpAbC123").write_bytes(b"half of a file")  # what safetensors leaves when it is killed
    trained(out)
    assert digests(out) == digests(whole)


def kill(patch: pytest.MonkeyPatch, place: object, name: str, call: int) -> None:
    """Raise at the given call of something."""
    import importlib

    owner = importlib.import_module(place) if isinstance(place, str) else place
    real, calls = getattr(owner, name), [0]

    def counted(*arguments, **options):
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return real(*arguments, **options)

    patch.setattr(owner, name, counted)


def test_the_state_of_other_settings_or_a_damaged_one_is_not_continued(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        kill(patch, loop.Learner, "step", 5)
        with pytest.raises(Killed):
            trained(out)
    with pytest.raises(FormatError, match=r"another training run \(other settings\)"):
        trained(out, dataclasses.replace(SETTINGS, steps=9))
    file = next((out / "training").glob("step-*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(FormatError, match="not what was written"):
        trained(out)
    trained(out, run=quantkit.Run(resume=False))
    assert {k: v for k, v in digests(out).items() if k.endswith("safetensors")} == {
        k: v for k, v in digests(whole).items() if k.endswith("safetensors")
    }


def test_training_stops_early_when_it_gets_no_better() -> None:
    training = dataclasses.replace(SETTINGS, steps=40, evaluate_every=1, patience=3, rate=0.9, scale_rate=0.5, warm_steps=0)
    facts = trained(None, training).metadata["training"]
    assert facts["steps"] < 40
    assert len(facts["evaluations"]) - 1 - [one["steps"] for one in facts["evaluations"]].index(facts["best_after"]) == 3


def test_accumulated_gradients_are_those_of_all_windows_together() -> None:
    windows = list(TEXT.data[0][:4])
    found = []
    for together in (1, 2, 4):
        model = quantkit.prepare(tiny_llama(), "w4a16-asym-g32")
        losses = Objective(Live(tiny_llama()), 0.3, together).add_gradient(model, windows)
        found.append((losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    for losses, gradients in found[1:]:
        assert losses.kl == pytest.approx(found[0][0].kl, rel=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-3, atol=1e-6)


def test_the_gradient_of_the_mixed_loss_is_that_of_torch() -> None:
    model, teacher, ids = tiny_llama(), tiny_llama(seed=3), TEXT.data[0][:1]
    losses = Objective(Live(teacher), 0.25, 1).add_gradient(model, list(ids))
    want = tiny_llama()
    log_q = want(input_ids=ids).logits.log_softmax(-1)
    p = teacher(input_ids=ids).logits.softmax(-1).detach()
    kl = (p * (p.log() - log_q)).sum(-1).mean()
    chosen = log_q[:, :-1].gather(-1, ids[:, 1:].unsqueeze(-1))
    loss = 0.75 * kl - 0.25 * chosen.sum() / ids.numel()
    loss.backward()
    assert losses.kl == pytest.approx(float(kl.detach()), rel=1e-4)
    assert losses.nll == pytest.approx(-float(chosen.detach().mean()), rel=1e-4)
    for (name, one), (_, other) in zip(model.named_parameters(), want.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert Losses(2.0, 4.0).total(0.25) == 2.5
    assert Losses(2.0, math.nan).total(0.0) == 2.0


def test_rates_rise_and_fall() -> None:
    factors = [rise_and_fall(step, 20, 4) for step in range(20)]
    assert factors.index(max(factors)) == 4
    assert factors[:5] == sorted(factors[:5])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.02


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "gtpq"}, SpecError, "unknown quantizer 'gtpq'"),
        ({"start": "nowhere"}, SpecError, "start='nowhere': want the directory"),
        ({"start": "nowhere", "steps": ["distill"]}, SpecError, "steps beside start="),
        ({"steps": ["distil"]}, SpecError, "distill"),
        ({"training": dataclasses.replace(SETTINGS, held_out=7)}, CalibrationError, "8 windows of text, 7 of which"),
        ({"training": {"steps": 3}}, SpecError, "want a quantkit.Training"),
        ({"calibration": dataclasses.replace(TEXT, answers_only=True)}, CalibrationError, "every token"),
    ],
)
def test_bad_settings_are_refused_before_any_work(options: dict, error: type, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        trained(tmp_path / "out", **options)
    assert not (tmp_path / "out/training").exists()
    with pytest.raises(QuantkitError, match=r"Training\(rate=2"):
        Training(rate=2)


def test_tables_are_trained_with_frozen_narrow_scales() -> None:
    text = quantkit.Calibration(data=[torch.randint(3, 190, (4, 16), generator=torch.Generator().manual_seed(1))])
    training = dataclasses.replace(SETTINGS, steps=2, held_out=1)
    result = quantkit.train(FAMILIES["llama"](), "mxfp4", method="rtn", training=training, calibration=text)
    scales = {name: one.qtensor.scale for name, one in result.model.named_modules() if hasattr(one, "qtensor")}
    start = quantkit.quantize(FAMILIES["llama"](), "mxfp4", method="rtn").model
    assert all(same(start.get_submodule(name).qtensor.scale, scale) for name, scale in scales.items())


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_a_page_shows_a_run_at_work_and_the_finished_one(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, file = tmp_path / "out", tmp_path / "page.html"
    page, seen = LivePage(out, file, "a run"), []

    def look(event: Progress) -> None:
        page()
        seen.append(file.read_text() if file.exists() else "")

    with monkeypatch.context() as patch:
        kill(patch, loop.Learner, "step", 6)
        with pytest.raises(Killed):
            trained(out, run=quantkit.Run(progress=look))
    assert 'http-equiv="refresh"' in seen[-1]
    assert "4 updates" in seen[-1]  # the state of the fifth is written after its event
    trained(out, run=quantkit.Run(progress=look))
    page(over=True)
    text = file.read_text()
    first, best = (significant(one["kl"]) for one in (evaluations(out)[0], min(evaluations(out), key=lambda one: one["kl"])))
    assert f"goes from {first} to {best}" in text
    assert "refresh" not in text
    assert text.count("<svg") == 1
    with pytest.raises(CalibrationError, match="'kl' is missing"):
        quantkit.write_html(file, [], training={})
    with pytest.raises(CalibrationError, match="no evaluation report"):
        quantkit.write_html(file, [], training=tmp_path)


def evaluations(out: Path) -> list[dict]:
    return json.loads((out / "config.json").read_text())["quantkit"]["training"]["evaluations"]


def test_the_line_through_losses_keeps_their_ends_and_mean() -> None:
    assert smoothed([3.0, 1.0]) == [3.0, 1.0]
    straight = [float(i) for i in range(50)]
    assert smoothed(straight) == pytest.approx(straight)
    assert min(smoothed([1.0, -1.0] * 50)[5:-5]) > -0.3


def test_a_searched_plan_is_trained_as_it_is() -> None:
    found = quantkit.search(tiny_llama(), "4 bpw", choices=["w2a16-asym-g32", "w4a16-asym-g32"], calibration=TEXT)
    training = dataclasses.replace(SETTINGS, steps=2)
    result = quantkit.train(tiny_llama(), found.plan, method="rtn", training=training, calibration=TEXT, output=NATIVE)
    assert result.plan == found.plan
    assert {scheme.weight.bits for scheme in result.plan.values()} == {2, 4}
    installed = {name: one.qtensor.spec for name, one in result.model.named_modules() if hasattr(one, "qtensor")}
    assert installed == {name: scheme.weight for name, scheme in found.plan.items()}


def test_the_expected_time_counts_every_product_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    contents = contents_of(model.config)
    sites = contents.structure.sites
    timed: list[tuple[int, ...]] = []

    def product(rows: int, out: int, features: int, dtype: torch.dtype) -> float:
        timed.append((out, features))
        return float(out * features)

    monkeypatch.setattr(timing, "_timed_product", product)
    monkeypatch.setattr(timing, "_timed_attention", lambda *_: (10.0, 20.0))
    training = Training(steps=10, windows=3, evaluate_every=5, held_out=2, dtype="float32")
    weights, table = sum(site.numel for site in sites), model.get_input_embeddings().weight.numel()
    once, back = weights + table + 10, 2 * weights + table + 20
    want = timing.REST * (30 * (2 * once + back) + 3 * 2 * 2 * once)
    assert timing.training_seconds(training, contents.model, sites, 16) == pytest.approx(want)
    assert sorted(timed) == sorted({site.shape for site in sites} | {tuple(model.lm_head.weight.shape)})
    alone = dataclasses.replace(training, loss="next-token")
    want = timing.REST * (30 * (once + back) + 3 * 2 * once)
    assert timing.training_seconds(alone, contents.model, sites, 16) == pytest.approx(want)
    stored = dataclasses.replace(training, teacher="stored")
    want = timing.REST * (30 * (once + back) + 3 * 2 * once + (4 + 2) * once)
    assert timing.training_seconds(stored, contents.model, sites, 16, 4) == pytest.approx(want)
    blocks = dataclasses.replace(training, block_steps=5)
    there, both = weights + 10, 3 * weights + 30
    want = timing.REST * (30 * (2 * once + back) + 4 * 2 * 2 * once + 15 * both + 4 * 6 * there)
    assert timing.training_seconds(blocks, contents.model, sites, 16, 6) == pytest.approx(want)


def test_parts_of_a_step_are_really_timed() -> None:
    contents = contents_of(tiny_llama().config)
    assert timing.training_seconds(SETTINGS, contents.model, contents.structure.sites, 16) > 0
    mixture = contents_of(FAMILIES["mixtral"]().config)
    assert timing.training_seconds(SETTINGS, mixture.model, mixture.structure.sites, 16) > 0
