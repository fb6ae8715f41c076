"""Perplexity and divergence against a naive computation in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from quantkit.calibrate.data import Batch
from quantkit.errors import CalibrationError
from quantkit.evaluation import quality
from quantkit.evaluation.quality import clustered_mean, score
from quantkit.evaluation.reference import BaseLogits
from quantkit.evaluation.windows import Windows, cut_windows, from_batches
from quantkit.system.compute import evaluation_mode
from tests.tiny import FAMILIES, tiny_llama

VOCABULARY = 192


@pytest.fixture(scope="module")
def models():
    base = tiny_llama(seed=0)
    near = tiny_llama(seed=0)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    return base, near


@pytest.fixture(scope="module")
def windows():
    text = torch.randint(VOCABULARY, (200,), generator=torch.Generator().manual_seed(2))
    return cut_windows(text, length=24, stride=16)


def naive(model, base, windows: Windows) -> dict[str, np.ndarray]:
    """Every quantity per scored token in float64, one window at a time, by the book."""
    out: dict[str, list[float]] = {key: [] for key in ("nll", "base_nll", "kl", "hit", "base_hit", "same", "window")}
    for number in range(len(windows)):
        ids = windows.ids[number : number + 1]
        with torch.no_grad():
            q = model(input_ids=ids).logits[0].double().log_softmax(-1)
            p = base(input_ids=ids).logits[0].double().log_softmax(-1)
        for t in windows.scored[number].nonzero().flatten().tolist():
            y, row_q, row_p = int(ids[0, t]), q[t - 1], p[t - 1]
            out["nll"].append(-float(row_q[y]))
            out["base_nll"].append(-float(row_p[y]))
            out["kl"].append(float((row_p.exp() * (row_p - row_q)).sum()))
            out["hit"].append(float(row_q.argmax() == y))
            out["base_hit"].append(float(row_p.argmax() == y))
            out["same"].append(float(row_p.argmax() == row_q.argmax()))
            out["window"].append(number)
    return {key: np.array(value) for key, value in out.items()}


def test_every_number_equals_the_naive_float64_computation(models, windows):
    base, near = models
    want, got = naive(near, base, windows), score(near, windows, base)
    d = got.divergence
    assert (got.tokens, got.windows, d.tokens, d.windows) == (windows.tokens, len(windows), windows.tokens, len(windows))
    assert got.nll == pytest.approx(want["nll"].mean(), rel=1e-6)
    assert got.perplexity == pytest.approx(math.exp(want["nll"].mean()), rel=1e-6)
    assert got.top1 == want["hit"].mean()
    assert d.mean == pytest.approx(want["kl"].mean(), abs=1e-7)
    assert d.median == pytest.approx(np.median(want["kl"]), abs=1e-6)
    assert d.p99 == pytest.approx(np.quantile(want["kl"], 0.99), abs=1e-6)
    assert d.max == pytest.approx(want["kl"].max(), abs=1e-6)
    assert d.quantiles[0] == (0.01, pytest.approx(np.quantile(want["kl"], 0.01), abs=1e-6))
    assert d.same_top1 == want["same"].mean()
    assert d.right_to_wrong == ((want["base_hit"] == 1) & (want["hit"] == 0)).sum()
    assert d.wrong_to_right == ((want["base_hit"] == 0) & (want["hit"] == 1)).sum()
    assert d.base_nll == pytest.approx(want["base_nll"].mean(), rel=1e-6)
    assert d.base_perplexity == pytest.approx(math.exp(want["base_nll"].mean()), rel=1e-6)
    assert d.nll_increase == pytest.approx((want["nll"] - want["base_nll"]).mean(), abs=1e-7)
    for got_se, values in (
        (got.nll_se, want["nll"]),
        (d.mean_se, want["kl"]),
        (d.nll_increase_se, want["nll"] - want["base_nll"]),
    ):
        residuals = [(values - values.mean())[want["window"] == w].sum() for w in range(len(windows))]
        w = len(residuals)
        assert got_se == pytest.approx(math.sqrt(w / (w - 1) * sum(r * r for r in residuals)) / len(values), rel=1e-4)
    assert got.perplexity_se == pytest.approx(got.perplexity * got.nll_se)


def test_a_model_is_at_distance_zero_from_itself(models, windows):
    d = score(models[0], windows, models[0]).divergence
    assert (d.mean, d.max, d.p99, d.mean_se, d.nll_increase, d.nll_increase_se) == (0, 0, 0, 0, 0, 0)
    assert (d.same_top1, d.right_to_wrong, d.wrong_to_right) == (1, 0, 0)


def test_a_tiny_difference_is_not_drowned_by_rounding():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1, 33, 5000, generator=generator, dtype=torch.float64) * 4
    q = p + 3e-3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    p, q = p.float(), q.float()
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    exact = float((log_p.exp() * (log_p - log_q)).sum(-1)[0, :-1].mean())
    windows = from_batches([Batch(torch.randint(5000, (1, 33), generator=generator))])
    assert 1e-6 < exact < 1e-5
    assert score(lambda ids: q, windows, lambda ids: p).divergence.mean == pytest.approx(exact, abs=5e-8)


@pytest.mark.parametrize("tile", [1, 1000, 1 << 20])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_and_tiles_change_nothing(models, windows, tile, batch_size, monkeypatch):
    base, near = models
    want = score(near, windows, base, kl_windows=5)
    monkeypatch.setattr(quality, "TILE", tile)
    got = score(near, windows, base, kl_windows=5, batch_size=batch_size)
    assert got.nll == pytest.approx(want.nll, rel=1e-6)
    assert got.divergence.mean == pytest.approx(want.divergence.mean, abs=1e-7)
    assert (got.tokens, got.top1, got.divergence.windows) == (want.tokens, want.top1, 5)
    assert got.divergence.tokens == windows.first(5).tokens


def test_comparing_fewer_windows_equals_scoring_them_alone(models, windows):
    base, near = models
    some, alone = score(near, windows, base, kl_windows=3), score(near, windows.first(3), base)
    assert some.divergence == alone.divergence
    assert some.nll == score(near, windows).nll


def test_padding_is_as_if_it_were_not_there(models):
    base, near = models
    rows = [torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)) for n in (17, 5, 30)]
    ids, mask = torch.full((3, 30), 77), torch.zeros(3, 30, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    got = score(near, from_batches([Batch(ids, mask)]), base, batch_size=3)
    parts = [score(near, from_batches([Batch(row[None])]), base) for row in rows]
    assert got.tokens == sum(p.tokens for p in parts) == 16 + 4 + 29
    assert got.nll == pytest.approx(sum(p.nll * p.tokens for p in parts) / got.tokens, rel=1e-6)
    assert got.divergence.mean == pytest.approx(sum(p.divergence.mean * p.tokens for p in parts) / got.tokens, abs=1e-7)
    assert got.divergence.max == pytest.approx(max(p.divergence.max for p in parts), abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("beside", ["alone", "model", "base"])
def test_non_finite_logits_name_the_window(windows, value, beside):
    clean = torch.randn(1, 24, VOCABULARY)

    def broken(ids):
        logits = clean.clone()
        if torch.equal(ids, windows.ids[2:3]):
            logits[0, 20, 7] = value
        return logits

    model = (lambda ids: clean) if beside == "base" else broken
    base = {"alone": None, "model": lambda ids: clean, "base": broken}[beside]
    with pytest.raises(CalibrationError, match=r"window 2, position 20.*not finite"):
        score(model, windows, base)


def test_non_finite_logits_at_unscored_positions_do_not_count():
    ids = torch.tensor([[1, 2, 3, 4]])
    logits = torch.randn(1, 4, 8)
    logits[0, 2:] = math.nan
    assert score(lambda _: logits, from_batches([Batch(ids, torch.tensor([[True, True, True, False]]))])).tokens == 2


def test_inputs_that_do_not_fit_are_refused(windows):
    logits = torch.randn(1, 24, VOCABULARY)
    with pytest.raises(CalibrationError, match="want \\(B, T, vocabulary\\)"):
        score(lambda ids: logits[:, -1], windows)
    with pytest.raises(CalibrationError, match="equal vocabularies"):
        score(lambda ids: logits, windows, lambda ids: logits[..., :-1])
    with pytest.raises(CalibrationError, match="outside the model's vocabulary of 3"):
        score(lambda ids: logits[..., :3], windows)
    with pytest.raises(CalibrationError, match="kl_windows=0"):
        score(lambda ids: logits, windows, lambda ids: logits, kl_windows=0)
    with pytest.raises(CalibrationError, match="batch_size=0"):
        score(lambda ids: logits, windows, batch_size=0)


def test_callers_logits_are_not_written_to(windows):
    logits = torch.randn(1, 24, VOCABULARY)
    before = logits.clone()
    score(lambda ids: logits, windows, lambda ids: logits)
    assert torch.equal(logits, before)


def test_low_precision_logits_are_summed_in_float32(windows):
    p, q = torch.randn(1, 24, VOCABULARY).bfloat16(), torch.randn(1, 24, VOCABULARY).bfloat16()
    got = score(lambda ids: q, windows, lambda ids: p)
    want = score(lambda ids: q.double(), windows, lambda ids: p.double())
    assert got.divergence.mean == pytest.approx(want.divergence.mean, rel=1e-6)


def test_dropout_is_off_meanwhile_and_modes_come_back(windows):
    model = FAMILIES["gpt2"](resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    assert score(model, windows).nll == score(model, windows).nll
    assert model.training
    assert not model.transformer.h[0].training
    with evaluation_mode(model):
        assert not model.training
        assert not torch.is_grad_enabled()


def test_a_plain_torch_model_is_called_with_ids_alone(windows):
    model = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY))
    assert score(model, windows).nll == pytest.approx(math.log(VOCABULARY), rel=0.2)


def test_one_window_has_no_standard_error(models, windows):
    got = score(models[1], windows.first(1), models[0])
    assert (got.nll_se, got.perplexity_se, got.divergence.mean_se, got.divergence.nll_increase_se) == (None,) * 4


def test_clustered_error_covers_correlated_tokens():
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(40), 25)
    means, errors = [], []
    for _ in range(300):
        values = rng.normal(size=40)[cluster] + 0.1 * rng.normal(size=1000)
        mean, se = clustered_mean(values, cluster)
        means.append(mean)
        errors.append(se)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_an_absurd_perplexity_stays_finite():
    logits = torch.zeros(1, 4, 8)
    logits[..., 0] = 5000.0
    got = score(lambda ids: logits, from_batches([Batch(torch.tensor([[1, 2, 3, 4]]))]))
    assert got.nll == 5000
    assert math.isfinite(got.perplexity)


class Counting(nn.Module):
    """Count how often a model is run."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.calls = model, model.config, 0

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, **kwargs):
        self.calls += 1
        return self.model(**kwargs)


def test_base_logits_are_computed_once_and_are_the_same_bits(models, windows):
    base, near = models
    counting = Counting(base)
    remembered = BaseLogits(counting)
    want = score(near, windows, base, batch_size=2)
    assert [score(near, windows, remembered, batch_size=2) for _ in range(3)] == [want] * 3
    assert counting.calls == -(-len(windows) // 2)
    assert remembered.nbytes == windows.ids.numel() * base.config.hidden_size * 4


def test_base_logits_beyond_the_bound_are_computed_again(models, windows):
    counting = Counting(models[0])
    remembered = BaseLogits(counting, max_bytes=3 * 24 * 64 * 4)
    want = score(models[1], windows, models[0])
    assert [score(models[1], windows, remembered) for _ in range(2)] == [want] * 2
    assert remembered.nbytes == remembered.max_bytes
    assert counting.calls == len(windows) + len(windows) - 3


def test_a_released_base_survives_its_model_being_changed(windows):
    model, near = tiny_llama(seed=0), tiny_llama(seed=1)
    want = score(near, windows, model)
    remembered = BaseLogits(model)
    remembered.release(windows)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    assert score(near, windows, remembered) == want
    with pytest.raises(CalibrationError, match="base model was released"):
        remembered(windows.ids[:1] + 1)
    with pytest.raises(CalibrationError, match="max_bytes=10"):
        BaseLogits(tiny_llama(), max_bytes=10).release(windows)


def test_a_base_that_caps_its_logits_is_run_again(windows):
    counting = Counting(FAMILIES["gemma2"]())
    remembered, near = BaseLogits(counting), tiny_llama()
    want = score(near, windows, counting.model)
    assert [score(near, windows, remembered) for _ in range(2)] == [want] * 2
    assert (counting.calls, remembered.nbytes) == (2 * len(windows), 0)
    with pytest.raises(CalibrationError, match="transforms its logits after the output head"):
        BaseLogits(counting).release(windows)


def test_base_logits_of_a_function(windows):
    logits = torch.randn(1, 24, VOCABULARY)
    assert torch.equal(BaseLogits(lambda ids: logits)(windows.ids[:1]), logits)
