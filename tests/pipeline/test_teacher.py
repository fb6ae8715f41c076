"""Training towards blocks' outputs and stored predictions; adapters; blocks first."""

import dataclasses
from pathlib import Path

import pytest
import torch

import quantkit
from quantkit.errors import CalibrationError
from quantkit.hf.structure import describe
from quantkit.nn.fake import FakeModule
from quantkit.nn.hooks import outputs_of
from quantkit.numerics.divergence import bucket_divergence_gradient, divergence_gradient
from quantkit.pipeline.plan import resolve
from quantkit.pipeline.training import blocks
from quantkit.pipeline.training.cost import state_bytes, trained_numbers
from quantkit.pipeline.training.loss import Objective
from quantkit.pipeline.training.settings import Training
from quantkit.pipeline.training.teacher import Live, Stored
from quantkit.pipeline.training.updates import Updates
from tests.pipeline.test_train import SETTINGS, TEXT, Killed, digests, kill, trained
from tests.tiny import FAMILIES, tiny_llama

WINDOWS = list(TEXT.data[0])
STORED = dataclasses.replace(SETTINGS, teacher="stored", top_k=32)


def test_the_gradient_of_the_distance_of_blocks_is_that_of_torch() -> None:
    teacher, model, want = tiny_llama(seed=3), tiny_llama(), tiny_llama()
    blocks, ids = ("model.layers.0", "model.layers.1"), TEXT.data[0][:2]
    losses = Objective(Live(teacher, blocks), 0.0, 2, 0.25, blocks).add_gradient(model, list(ids))
    with outputs_of(want, blocks) as mine:
        log_q = want(input_ids=ids).logits.log_softmax(-1)
    with torch.no_grad(), outputs_of(teacher, blocks) as theirs:
        p = teacher(input_ids=ids).logits.softmax(-1)
    hidden = sum(((a - b).square().sum(-1) / b.square().sum(-1)).mean() for a, b in zip(mine, theirs, strict=True)) / 2
    (0.75 * (p * (p.log() - log_q)).sum(-1).mean() + 0.25 * hidden).backward()
    assert losses.hidden == pytest.approx(float(hidden.detach()), rel=1e-4)
    assert losses.total(0.0, 0.25) == pytest.approx(0.75 * losses.kl + 0.25 * losses.hidden)
    for (name, one), (_, other) in zip(model.named_parameters(), want.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_outputs_of_blocks_come_closer_when_they_are_asked_for() -> None:
    text = dataclasses.replace(TEXT, data=[torch.randint(3, 190, (32, 24), generator=torch.Generator().manual_seed(1))])
    training = dataclasses.replace(SETTINGS, steps=24, windows=4, hidden=0.9, loss="next-token")
    found = trained(None, training, calibration=text).metadata["training"]["hidden"]
    assert len(found) == 24
    assert sum(found[-4:]) < 0.95 * sum(found[:4])
    assert "hidden" not in trained(None, dataclasses.replace(SETTINGS, steps=1)).metadata["training"]


def test_blocks_of_a_rotated_start_are_not_compared() -> None:
    with pytest.raises(CalibrationError, match="as after a rotation"):
        trained(None, dataclasses.replace(SETTINGS, hidden=0.5), steps=["rotate"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divergence_of_stored_predictions(dtype: torch.dtype) -> None:
    """All tokens known: the whole divergence. Some: torch's gradient, and never more than the whole."""
    logits, teacher = torch.randn(2, 12, 40, generator=torch.Generator().manual_seed(0)).unbind()
    logits = (3 * logits).to(dtype)
    log_p = (3 * teacher).to(dtype).float().log_softmax(-1)
    whole, gradient = divergence_gradient(logits, (3 * teacher).to(dtype))
    for known in (40, 7):
        kept, tokens = log_p.topk(known, -1)
        rest = log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1)
        total, found = bucket_divergence_gradient(logits, tokens.int(), kept, rest)
        x = logits.float().clone().requires_grad_()
        log_q = x.log_softmax(-1)
        want = (kept.exp() * (kept - log_q.gather(-1, tokens))).sum()
        if known < 40:
            outside = torch.ones_like(log_q).scatter(-1, tokens, 0.0)
            want = want + (rest.exp() * (rest - (log_q.exp() * outside).sum(-1).log())).sum()
        want.backward()
        assert total == pytest.approx(float(want.detach()), rel=1e-4)
        torch.testing.assert_close(found.float(), x.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)
        assert total <= whole * (1 + 1e-5)
    kept, tokens = log_p.topk(40, -1)
    full = bucket_divergence_gradient(logits, tokens, kept, torch.full((12,), -torch.inf))
    assert full[0] == pytest.approx(whole, rel=1e-4)
    torch.testing.assert_close(full[1].float(), gradient.float(), rtol=1e-2, atol=1e-4)


def test_stored_predictions_stand_for_the_float_model(tmp_path: Path) -> None:
    teacher, model = tiny_llama(seed=3), tiny_llama()
    stored = Stored(WINDOWS, 10**6, tmp_path / "teacher")
    stored.make(teacher)
    del teacher
    live = Objective(Live(tiny_llama(seed=3)), 0.0, 2).evaluate(model, WINDOWS[2:6])
    assert Objective(stored, 0.0, 2).evaluate(model, WINDOWS[2:6]).kl == pytest.approx(live.kl, rel=1e-4)
    with pytest.raises(KeyError):
        Objective(stored, 0.0, 1).evaluate(model, [WINDOWS[0] + 1])


def test_the_float_model_runs_once_over_the_text_and_never_again(tmp_path: Path) -> None:
    runs: list[int] = []
    tiny = tiny_llama()
    tiny.register_forward_hook(lambda *_: runs.append(1))
    stored = Stored(WINDOWS, 32, tmp_path / "a", {"run": 1})
    stored.make(tiny)
    assert len(runs) == len(WINDOWS)
    again = Stored(WINDOWS, 32, tmp_path / "a", {"run": 1})
    again.make(tiny)
    assert len(runs) == len(WINDOWS)
    file = next((tmp_path / "a").iterdir())
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert Stored(WINDOWS, 32, tmp_path / "a", {"run": 1}).missing() == [0]
    assert Stored(WINDOWS, 32, tmp_path / "a", {"run": 2}).missing() == [0]


@pytest.fixture(scope="module")
def stored_whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("stored") / "out", STORED).path


@pytest.mark.parametrize("moment", ["while predictions are written", "after they are", "in a step"])
def test_a_run_with_stored_predictions_that_is_killed_ends_in_the_same_bytes(
    moment: str, stored_whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.pipeline.training.teacher.PART_WINDOWS", 3)
    place, name, call = {
        "while predictions are written": ("quantkit.pipeline.training.teacher", "write_tensors", 2),
        "after they are": ("quantkit.pipeline.train", "prepare", 1),
        "in a step": (Objective, "add_gradient", 6),
    }[moment]
    with monkeypatch.context() as patch:
        kill(patch, place, name, call)
        with pytest.raises(Killed):
            trained(tmp_path / "out", STORED)
    parts = len(list((tmp_path / "out/training/teacher").iterdir()))
    assert parts == (1 if moment == "while predictions are written" else 3)
    trained(tmp_path / "out", STORED)
    assert digests(tmp_path / "out") == digests(stored_whole)
    assert not (tmp_path / "out/training").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher": "stored", "hidden": 0.5}, "outputs of blocks are not stored"),
        ({"teacher": "stored", "loss": "next-token"}, "asks no teacher"),
        ({"hidden": 1.0}, "hidden"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        Training(**values)


ADAPTED = dataclasses.replace(SETTINGS, adapters=4)
IDS = TEXT.data[0][:2]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("llama", "w3a16-asym-g32"),
        ("llama", "mxfp4"),
        ("llama", "nvfp4"),
        ("llama", "w4a8-asym-g32"),
        ("mixtral", "w4a16-asym-g32"),
    ],
)
def test_adapters_are_folded_in_bit_for_bit(family: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_KERNEL", "reference")
    plain = logits(quantkit.prepare(FAMILIES[family](), scheme))
    model = quantkit.prepare(FAMILIES[family](), scheme, adapters=4)
    assert torch.equal(logits(model), plain)
    layers = [part for part in model.modules() if isinstance(part, FakeModule)]
    weights = [layer.weight.detach().clone() for layer in layers]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, weights, strict=True))
    want = logits(model)
    assert not torch.equal(want, plain)
    assert torch.equal(logits(quantkit.convert(model)), want)


def test_gradients_of_adapters_and_scales_are_those_of_the_whole_weight() -> None:
    """A weight made of them by torch's own graph, behind the rounding of a layer without adapters."""
    model = quantkit.prepare(tiny_llama(), "w4a16-asym-g32", adapters=3)
    layer = model.model.layers[0].mlp.down_proj
    generator = torch.Generator().manual_seed(0)
    layer.adapter_out.data = 0.1 * torch.randn(layer.adapter_out.shape, generator=generator)
    slope = torch.randn(layer.shape, generator=generator)
    layer.tensor(torch.float32).backward(slope)
    scale = layer.scale.detach().clone().requires_grad_()
    inner, outer = (p.detach().clone().requires_grad_() for p in (layer.adapter_in, layer.adapter_out))
    wide = scale.repeat_interleave(32, -1)
    steps = layer.weight.detach() / layer.first_scale.repeat_interleave(32, -1) + outer @ inner
    zero = layer.zero_point.float().repeat_interleave(32, -1)
    levels = (steps.detach().round() + zero).clamp(0, 15) - zero
    inside = (steps.detach() >= -0.5 - zero) & (steps.detach() <= 15.5 - zero)
    (wide * (levels + torch.where(inside, steps - steps.detach(), 0.0)) * slope).sum().backward()
    torch.testing.assert_close(layer.scale.grad, scale.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.adapter_in.grad, inner.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(layer.adapter_out.grad, outer.grad, rtol=1e-3, atol=1e-5)
    assert layer.weight.grad is None


def test_training_adapters_alone_lowers_the_loss_and_goes_on_when_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = dataclasses.replace(ADAPTED, steps=24, rate=0.1)
    whole = trained(tmp_path / "whole", training)
    found = whole.metadata["training"]["kl"]
    assert sum(found[-4:]) < 0.9 * sum(found[:4])
    with monkeypatch.context() as patch:
        kill(patch, Objective, "add_gradient", 6)
        with pytest.raises(Killed):
            trained(tmp_path / "out", training)
    trained(tmp_path / "out", training)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("training", [SETTINGS, ADAPTED, dataclasses.replace(SETTINGS, learn_zero=True)])
def test_the_size_of_a_state_is_known_before(training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill(patch, Objective, "add_gradient", 6)
        with pytest.raises(Killed):
            trained(tmp_path / "out", training)
    (file,) = (tmp_path / "out/training").glob("step-*.safetensors")
    sites = describe(tiny_llama()).sites
    plan = quantkit.quantize(tiny_llama(), "w2a16-asym-g32", method="rtn").plan
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == pytest.approx(state_bytes(training, sites, plan), rel=0.03)


@pytest.mark.parametrize(
    ("family", "scheme", "training"),
    [
        ("llama", "w4a16-asym-g32", Training(learn_zero=True)),
        ("llama", "mxfp4", Training(adapters=4)),
        ("mixtral", "w4a16-asym-g32", Training(adapters=4)),
        ("mixtral", "w4a16-asym-g32", Training()),
    ],
)
def test_numbers_that_are_learned_are_counted_exactly(family: str, scheme: str, training: Training) -> None:
    structure = describe(FAMILIES[family]())
    plan = resolve(structure, scheme, (), "float16").plan
    model = quantkit.prepare(FAMILIES[family](), scheme, learn_zero=training.learn_zero, adapters=training.adapters)
    layers = [part for part in model.modules() if isinstance(part, FakeModule)]
    counted = trained_numbers(training, [site for site in structure.sites if site.name in plan], plan)
    assert counted == sum(parameter.numel() for parameter in Updates(layers, training).parameters)


def test_adapters_that_are_no_smaller_than_a_weight_are_refused() -> None:
    with pytest.raises(quantkit.SpecError, match="rank 64 for a weight"):
        quantkit.prepare(tiny_llama(), "w4a16-asym-g32", adapters=64)


BLOCKS = dataclasses.replace(SETTINGS, steps=4, block_steps=12, rate=0.02)


STATE = "quantkit.pipeline.training.state"
KILLS = [
    (blocks.__name__, "_add_gradient", 20),
    (STATE, "write_json", 2),
    (Objective, "add_gradient", 2),
    (Objective, "evaluate", 2),
]


@pytest.fixture(scope="module")
def blockwise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("blocks") / "out", BLOCKS).path


@pytest.mark.parametrize("adapters", [0, 4])
def test_every_block_comes_closer_before_the_first_update(adapters: int) -> None:
    facts = trained(None, dataclasses.replace(BLOCKS, adapters=adapters, block_steps=24)).metadata["training"]
    assert len(facts["blocks"]) == 2
    assert all(after < 0.95 * before for before, after in facts["blocks"])
    first, second = facts["evaluations"][:2]
    assert first["steps"] == second["steps"] == 0
    assert adapters or second["kl"] < first["kl"]


def test_a_block_that_gets_no_closer_stays_what_it_was() -> None:
    facts = trained(None, dataclasses.replace(BLOCKS, rate=0.99, scale_rate=0.99, steps=1)).metadata["training"]
    assert all(after <= before for before, after in facts["blocks"])
    assert any(after == before for before, after in facts["blocks"])


@pytest.mark.parametrize(("place", "name", "call"), KILLS)
def test_a_run_that_is_killed_among_its_blocks_ends_in_the_same_bytes(
    place: object, name: str, call: int, blockwise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill(patch, place, name, call)
        with pytest.raises(Killed):
            trained(tmp_path / "out", BLOCKS)
    trained(tmp_path / "out", BLOCKS)
    assert digests(tmp_path / "out") == digests(blockwise)
