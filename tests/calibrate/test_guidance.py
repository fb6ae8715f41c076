"""How much tokens count: against plain automatic differentiation, however a model can run, and what GPTQ makes of it."""

import dataclasses

import pytest
import torch

import quantkit
from quantkit.calibrate.backward import Backward, drawn_gradient
from quantkit.calibrate.chain import collect_statistics
from quantkit.calibrate.guidance import token_weights
from quantkit.hf.structure import describe
from quantkit.nn.sites import sharing_copy
from quantkit.pipeline.checks import prepare_blocks
from quantkit.quantizers.gptaq import GPTAQ
from quantkit.quantizers.gptq import GPTQ
from quantkit.system.compute import Compute
from quantkit.system.progress import ignore
from tests import tiny

SEED = 5


def batches(model):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, model.config.vocab_size - 1, shape, generator=generator) for shape in ((2, 12), (1, 30))]


def by_autograd(model, texts, counted=(None, None)):
    """Return the length of the gradient of every token's output, by layer, and the layers' inputs, from the whole model."""
    generator, found, inputs = torch.Generator().manual_seed(SEED), {}, {}
    names = [site.name for site in describe(model).sites if len(site.shape) == 2]
    for ids, marks in zip(texts, counted, strict=True):
        outputs, hooks = {}, []
        for name in names:

            def keep(_module, args, output, name=name, outputs=outputs):
                output.retain_grad()
                outputs[name] = output
                inputs.setdefault(name, []).append(args[0].detach())

            hooks.append(model.get_submodule(name).register_forward_hook(keep))
        logits = model(input_ids=ids).logits
        for hook in hooks:
            hook.remove()
        for row in range(len(ids)):  # drawn one row after the other
            own = None if marks is None else marks[row : row + 1]
            one = logits[row : row + 1]
            one.backward(drawn_gradient(one, generator, own), retain_graph=True)
        for name in names:
            found.setdefault(name, []).append(outputs[name].grad.norm(dim=-1))
    return found, inputs


def test_what_is_drawn_has_the_gradient_of_its_probability():
    logits = torch.randn(2, 400, 30, generator=torch.Generator().manual_seed(2)).requires_grad_(True)
    marks = torch.arange(800).view(2, 400) % 3 > 0
    found = drawn_gradient(logits, torch.Generator().manual_seed(SEED), marks)
    predicted = logits.log_softmax(-1)
    drawn = (predicted.exp() - found).detach()[marks].argmax(-1)  # the one place where one was taken away
    (-predicted[marks].gather(-1, drawn.unsqueeze(-1)).sum()).backward()
    torch.testing.assert_close(found, logits.grad)
    assert not found[~marks].any()
    shares = torch.bincount(drawn_of(torch.arange(6.0).expand(1, 20_000, 6)), minlength=6) / 20_000
    torch.testing.assert_close(shares, torch.arange(6.0).softmax(-1), rtol=0, atol=0.01)


def drawn_of(logits):
    gradient = drawn_gradient(logits, torch.Generator().manual_seed(SEED))
    return (logits.softmax(-1) - gradient).flatten(0, 1).argmax(-1)


def weights_of(model, texts, **settings):
    structure, compute = prepare_blocks(model, describe(model), Compute(torch.device("cpu"), torch.float32))
    return token_weights(model, structure, texts, compute=compute, progress=ignore, seed=SEED, **settings)


@pytest.mark.parametrize("kind", ["llama", "counted", "whole"])
def test_weights_are_lengths_of_gradients(kind):
    model = tiny.tiny_llama(seed=3)
    texts = batches(model)
    counted = [torch.arange(12).repeat(2, 1) > 5, None] if kind == "counted" else [None, None]
    if kind == "whole":
        structure, compute = prepare_blocks(model, describe(model), Compute(torch.device("cpu"), torch.float32))
        structure = dataclasses.replace(structure, entangled="for this test")
        texts = [texts[1]]  # a whole model draws for all rows of a batch at once
        found = token_weights(model, structure, texts, compute=compute, progress=ignore, seed=SEED)
    else:
        found = weights_of(model, texts, counted=counted)
    wanted, _ = by_autograd(model, texts, counted[: len(texts)])
    assert found.keys() == wanted.keys()
    for name, lengths in wanted.items():
        mean = torch.cat([one.flatten() for one in lengths]).mean()
        for one, want in zip(found[name], lengths, strict=True):
            assert torch.allclose(one, want / mean, rtol=1e-3, atol=1e-4), name


def test_a_long_text_is_passed_in_parts(monkeypatch):
    model = tiny.tiny_llama(seed=3)
    texts = batches(model)
    begins = []
    monkeypatch.setattr("quantkit.calibrate.guidance.CHUNK_BYTES", 1)
    monkeypatch.setattr(
        Backward, "run", lambda self, visit, seed, run=Backward.run: (begins.append(seed), run(self, visit, seed))
    )
    found = weights_of(model, texts)
    assert begins == [SEED, SEED + 1]
    assert all([one.shape for one in weights] == [ids.shape for ids in texts] for weights in found.values())
    assert len(found) == len(describe(model).sites)


def test_guided_moments_weigh_every_token():
    model = tiny.tiny_llama(seed=3)
    texts = batches(model)
    structure, compute = prepare_blocks(model, describe(model), Compute(torch.device("cpu"), torch.float32))
    found = collect_statistics(model, structure, texts, ("guided_hessian", "hessian"), compute=compute, progress=ignore)
    weights = token_weights(model, structure, texts, compute=compute, progress=ignore)
    _, inputs = by_autograd(model, texts)
    for name, one in found.items():
        x, w = torch.cat([x.flatten(0, 1) for x in inputs[name]]), torch.cat([w.flatten() for w in weights[name]])
        assert torch.allclose(one.results["guided_hessian"], (x * w[:, None]).T @ x / len(x), rtol=1e-3, atol=1e-4)
        assert torch.allclose(one.results["hessian"], x.T @ x / len(x), rtol=1e-3, atol=1e-4)
    query, key = (found[f"model.layers.0.self_attn.{one}_proj"] for one in "qk")
    assert not torch.equal(query.results["guided_hessian"], key.results["guided_hessian"])  # read alike, count differently


def test_experts_count_all_tokens_alike():
    model = tiny.FAMILIES["mixtral"]()
    texts = batches(model)
    found = weights_of(model, texts)
    assert found
    assert not any("experts" in name for name in found)
    structure, compute = prepare_blocks(model, describe(model), Compute(torch.device("cpu"), torch.float32))
    moments = collect_statistics(model, structure, texts, ("guided_hessian", "hessian"), compute=compute, progress=ignore)
    for name, one in moments.items():
        assert torch.equal(one.results["guided_hessian"], one.results["hessian"]) == ("experts" in name), name


@pytest.mark.parametrize("method", [GPTQ(guided=True), GPTAQ(guided=True)])
def test_a_guided_quantizer_is_another_and_the_same_twice(method):
    model = tiny.tiny_llama(seed=3)
    texts = batches(model)
    calibration = quantkit.Calibration(texts)
    plain = type(method)()
    one, two, other = (
        quantkit.quantize(sharing_copy(model), "w3a16-asym-g32", method=how, calibration=calibration).model.state_dict()
        for how in (method, method, plain)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_statistics_that_are_not_guided_are_refused():
    model = tiny.tiny_llama(seed=3)
    texts = batches(model)
    statistics, _ = quantkit.collect(model, calibration=quantkit.Calibration(texts))
    with pytest.raises(quantkit.CalibrationError, match="hold hessian, not guided_hessian, which gptq needs"):
        quantkit.quantize(model, "w4a16", method=GPTQ(guided=True), calibration=quantkit.Calibration(statistics=statistics))
    found, _ = quantkit.collect(model, ["guided_hessian"], calibration=quantkit.Calibration(texts))
    known = quantkit.Calibration(statistics=found)
    assert quantkit.quantize(model, "w4a16-g32", method=GPTQ(guided=True), calibration=known).model is model
