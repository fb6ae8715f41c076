"""What a backward pass finds out about layers, against plain automatic differentiation of the whole model."""

import pytest
import torch

from quantkit.calibrate.backward import Backward, drawn_gradient
from quantkit.calibrate.data import Calibration
from quantkit.errors import SpecError
from quantkit.hf.structure import describe
from quantkit.mixed.scores import compensation, rounding_error, score, seen_rows
from quantkit.mixed.search import Scoring, search
from quantkit.mixed.shares import shares
from quantkit.mixed.watch import Watch
from quantkit.nn.sites import SiteStatistics, read_weight, sharing_copy, write_weight
from quantkit.numerics import grid
from quantkit.presets import preset
from quantkit.quantizers.gptq import GPTQ
from quantkit.spec import ActivationSpec, QuantSpec
from quantkit.system.compute import Compute
from quantkit.system.progress import ignore
from tests import tiny

SEED = 5


def windows(model, count=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, model.config.vocab_size - 1, (count, 40), generator=generator)


def run(model, stacks, noises, compensates):
    found = {}
    compute = Compute(torch.device("cpu"), torch.float32)
    structure = describe(model)
    Backward(model, structure, stacks, noises, lambda products: Watch(noises, compensates, products), compute, ignore).run(
        lambda site, parts: found.setdefault(site.name, parts), SEED
    )
    return found


def by_autograd(model, rows, names):
    """Return for every layer the gradients of each window, and all its inputs, from the whole model."""
    generator, gradients, inputs = torch.Generator().manual_seed(SEED), {n: [] for n in names}, {n: [] for n in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: inputs[name].append(args[0].detach()))
        for name in names
    ]
    for row in rows:
        model.zero_grad()
        logits = model(input_ids=row[None]).logits
        logits.backward(drawn_gradient(logits, generator))
        for name in names:
            gradients[name].append(model.get_submodule(name).weight.grad.clone())
    for hook in hooks:
        hook.remove()
    return gradients, {name: torch.cat([x.flatten(0, -2) for x in found]) for name, found in inputs.items()}


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("compensates", [False, True])
def test_windows_gradients_are_squared_as_a_whole(together, compensates):
    model = tiny.tiny_llama(seed=3)
    rows = windows(model)
    names = [site.name for site in describe(model).sites]
    found = run(model, list(rows.split(together)), dict.fromkeys(names, ()), compensates)
    gradients, inputs = by_autograd(model, rows, names)
    for name in names:
        ((_, sensitivity),) = found[name]
        moment = inputs[name].T @ inputs[name] / len(inputs[name])
        change = compensation(moment) if compensates else torch.eye(len(moment))
        want = sum((g[seen_rows(len(g))] @ change).square() for g in gradients[name]) / rows.numel()
        assert torch.allclose(sensitivity.fisher[False], want, rtol=2e-3, atol=1e-3 * float(want.mean())), name


def test_expected_kl_is_what_small_errors_cost():
    model = tiny.tiny_llama(seed=3)
    rows = windows(model, 24)
    names = [site.name for site in describe(model).sites]
    found = run(model, list(rows.split(8)), dict.fromkeys(names, ()), False)
    scheme, expected = preset("w6a16-asym-g32", (32,)), 0.0
    with torch.no_grad():
        before = model(input_ids=rows).logits.log_softmax(-1)
        for site in describe(model).sites:
            weight = read_weight(model, site)
            expected += score(site.name, weight, [scheme], found[site.name][0][1])[0]
            generator = torch.Generator().manual_seed(len(site.name))
            size = rounding_error(site.name, weight.float(), scheme.weight).abs()
            sign = torch.randint(0, 2, size.shape, generator=generator) * 2 - 1
            weight.add_(size * sign)
        after = model(input_ids=rows).logits.log_softmax(-1)
    measured = float((before.exp() * (before - after)).sum(-1).mean())
    assert expected == pytest.approx(measured, rel=0.3)


def test_compensated_errors_are_those_of_the_algorithm():
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(64, 64, generator=generator)
    x = torch.randn(512, 64, generator=generator) @ mix
    moment, weight = x.T @ x / 512, torch.randn(128, 64, generator=generator)
    spec = preset("w4a16-asym-g32", (64,)).weight
    rounded, _ = GPTQ(rounds=0, clip="absmax").quantize(weight, spec, SiteStatistics({"hessian": moment}, (512,)))
    error = rounded.dequantize() - weight
    change = compensation(moment)
    steps = error @ torch.linalg.inv(change.T)  # the roundings that add up to this error
    assert float(steps.square().mean() / weight.sub(nearest(weight, spec)).square().mean()) == pytest.approx(1, rel=0.15)
    gradient = torch.randn(200, 64, generator=generator) @ mix
    told = (gradient @ change).square().mean(0).sum() * steps.square().mean()
    assert float((gradient @ error.T).square().mean(0).mean()) == pytest.approx(float(told), rel=0.2)


def nearest(weight, spec):
    qparams = grid.choose_qparams(weight, spec)
    return grid.dequantize(grid.quantize(weight, *qparams, spec), *qparams, spec)


def test_rotated_inputs_have_a_sensitivity_of_their_own():
    model = tiny.tiny_llama(seed=3)
    names = [site.name for site in describe(model).sites]
    spec = ActivationSpec(QuantSpec("int8", (1, -1), symmetric=True), dynamic=True, rotated=True)
    found = run(model, [windows(model)], dict.fromkeys(names, (spec,)), True)
    for ((_, one),) in found.values():
        assert set(one.fisher) == {False, True}
        assert set(one.noise) == {spec}


def test_shares_of_layers_add_up_to_the_divergence():
    model, rows = tiny.tiny_llama(seed=3), windows(tiny.tiny_llama(seed=3))
    changed, changes = sharing_copy(model), {}
    for number, site in enumerate(describe(model).sites):
        weight = read_weight(model, site).detach()
        generator = torch.Generator().manual_seed(number)
        changes[site] = 0.01 * torch.randn(weight.shape, generator=generator) * weight.std()
        write_weight(changed, site, weight + changes[site])
    found, kl = shares(model, changed, changes, [rows], ignore)
    with torch.no_grad():
        before, after = (one(input_ids=rows).logits.log_softmax(-1) for one in (model, changed))
    assert kl == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-3)
    assert sum(found.values()) == pytest.approx(kl, rel=0.05)


def test_rounds_change_what_layers_are_expected_to_cost():
    settings = {"calibration": Calibration([tiny.TEXT] * 20, samples=4, length=64), "tokenizer": tiny.tiny_tokenizer()}
    choices = ["w2a16-asym-g32", "w3a16-asym-g32", "w4a16-asym-g32"]
    found = [search(tiny.tiny_llama(seed=3), "3.6 bpw", choices, scoring=Scoring(rounds=n), **settings) for n in (0, 1)]
    assert found[1].point.bits_per_weight <= 3.6
    assert found[0].scores.losses != found[1].scores.losses
    with pytest.raises(SpecError, match="'w8a8' rounds inputs"):
        search(tiny.tiny_llama(), "8.5 bpw", ["w4a16-g32", "w8a8"], scoring=Scoring(rounds=1), **settings)
