"""compute="auto": int8 activations where the checkpoint records that they cost next to nothing, exact products elsewhere."""

import json
import logging
import shutil

import pytest
import torch

import quantkit
from quantkit import checkpoint
from quantkit.checkpoint import activations
from quantkit.checkpoint.activations import choose
from quantkit.errors import KernelError, QuantkitError
from quantkit.evaluation import evaluate
from quantkit.hf import cache, paged
from quantkit.hf.backend import make_backend
from quantkit.kernels import build
from quantkit.nn.install import describe_compute
from tests.tiny import FAMILIES, tiny_llama

IDS = torch.randint(3, 190, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def as_users_have_it(exact_unless_asked_for, monkeypatch):
    monkeypatch.setattr(activations, "SHARE", exact_unless_asked_for)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny llama in 4 bits, its checkpoint, and the float model."""
    result = quantkit.quantize(tiny_llama(), "w4a16-g32", method="rtn", out=tmp_path_factory.mktemp("auto") / "w4")
    return result, tiny_llama()


def record(own, added, **more):
    return {"quality": {"kl_mean": own, "int8_activations": {"kl_mean": added, "tokens": 256, **more}}}


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.double()


def kl(p, q):
    return float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean())


def test_the_share_decides():
    assert choose(record(0.1, 0.0049)).compute == "int8"
    assert "4.9 % of the quantization's 0.1 (256 tokens), below 5%" in str(choose(record(0.1, 0.0049)))
    assert choose(record(0.1, 0.0051)).compute == "float"
    assert "would add a KL of 0.0051 nats, 5.1 %" in str(choose(record(0.1, 0.0051)))
    assert choose(record(0.0, 0.001)).compute == "float"
    assert choose(record(0.1, 0.0049), on_cpu=False).compute == "float"
    assert (choose(record(0.1, 0.0), "exact").compute, choose({}, "int8").compute) == ("float", "int8")


@pytest.mark.parametrize(
    "odd",
    [{}, {"quality": 3}, {"quality": {"kl_mean": 0.1}}, record(0.1, float("nan")), record(0.1, float("inf")), record("0", 0.0),
     record(0.1, -1.0), record(True, 0), record(0.1, 0.0, tokens=0), record(0.1, [0]), {"quality": {"int8_activations": []}}],
    ids=str,
)  # fmt: skip
def test_what_is_not_recorded_is_exact_and_said(odd):
    found = choose(odd)
    assert found.compute == "float"
    assert "was not measured when this was written" in found.reason


def test_words_that_mean_nothing_are_refused(saved):
    for call in (checkpoint.load, quantkit.open_model):
        with pytest.raises(KernelError, match="compute='float'; want one of auto, exact, int8"):
            call(saved[0].path, compute="float")
    with pytest.raises(KernelError, match="rounds activations on a CPU"):
        choose({}, "int8", on_cpu=False)


def test_what_is_recorded_is_what_int8_activations_add(saved):
    """Measured here again with nothing but the logits of the two ways to load it."""
    result, _ = saved
    noted = json.loads((result.path / "config.json").read_text())["quantkit"]["quality"]
    assert result.metadata["quality"] == noted
    exact, rounded = (logits(checkpoint.load(result.path, compute=how)) for how in ("exact", "int8"))
    added = kl(exact, rounded)
    assert added > 0
    assert 0.3 * added < noted["int8_activations"]["kl_mean"] < 3 * added  # on other tokens
    assert noted["int8_activations"]["layers"] == 14
    assert noted["int8_activations"]["tokens"] == noted["tokens"]
    assert noted["int8_activations"]["kl_to_float"] == pytest.approx(noted["kl_mean"], rel=0.3)


def test_auto_takes_it_and_says_so_everywhere(saved, caplog):
    result, floating = saved
    with caplog.at_level(logging.INFO, logger="quantkit"):
        model = checkpoint.load(result.path)
    assert "int8 activations: they add a KL of" in caplog.text
    assert "in 14 layers" in caplog.text
    assert describe_compute(model) == "int8 activations"
    assert torch.equal(logits(model), logits(checkpoint.load(result.path, compute="int8")))
    assert not torch.equal(logits(model), logits(checkpoint.load(result.path, compute="exact")))
    assert quantkit.inspect(result.path)["compute"].startswith("int8 activations: they add a KL of")
    assert result.facts()["loaded on a CPU"] == quantkit.inspect(result.path)["compute"]
    report = evaluate(model, floating, data=IDS, latency=False, windows=None, length=20)
    assert report.compute == report.summary()["measured with"] == "int8 activations"
    assert evaluate(result.model, data=IDS, latency=False, windows=None, length=20).compute == "exact"
    assert evaluate(floating, data=IDS, latency=False, windows=None, length=20).compute == ""


def test_the_engine_does_what_was_loaded_unless_told_otherwise(saved):
    rounding, exact = (checkpoint.load(saved[0].path, compute=how) for how in ("auto", "exact"))
    for engine in ("native", "modules"):
        assert make_backend(rounding, engine=engine).engine == f"{engine}, int8 activations"
        assert make_backend(exact, engine=engine).engine == engine
    assert make_backend(rounding, compute="exact").engine == "native"
    assert make_backend(exact, compute="int8").engine == "native, int8 activations"
    with pytest.raises(QuantkitError, match=r"quantkit.load\(..., compute='exact'\)"):
        make_backend(rounding, engine="modules", compute="exact")


def test_a_checkpoint_whose_own_loss_is_small_stays_exact(tmp_path):
    result = quantkit.quantize(tiny_llama(), "w8a16-g32", method="rtn", out=tmp_path / "w8")
    assert "int8 activations would add a KL of" in result.facts()["loaded on a CPU"]
    assert describe_compute(checkpoint.load(result.path)) == "exact"


def test_layers_that_no_kernel_rounds_for(tmp_path):
    """All of them: it is exact and says why; some: the others round."""
    model, output = tiny_llama(intermediate_size=128), quantkit.Output(tmp_path / "fp8", format="native")
    fully = quantkit.quantize(model, "fp8", method="rtn", output=output)
    assert "could not be measured: no kernel can run" in fully.facts()["loaded on a CPU"]
    assert describe_compute(checkpoint.load(fully.path)) == "exact"
    with pytest.raises(KernelError, match="no kernel can run"):
        checkpoint.load(fully.path, compute="int8")
    rules = [quantkit.Rule("*.mlp.down_proj", "fp8")]
    output = quantkit.Output(tmp_path / "mixed", format="native")
    mixed = quantkit.quantize(tiny_llama(intermediate_size=128), "w4a16-g32", method="rtn", rules=rules, output=output)
    model = checkpoint.load(mixed.path, compute="int8")
    assert describe_compute(model) == "int8 activations in 12 of 14 layers"
    assert logits(model).isfinite().all()


def test_without_a_compiler_auto_is_exact(saved, monkeypatch):
    def fails():
        raise KernelError("no compiler")

    monkeypatch.setattr(build, "library", fails)
    model = checkpoint.load(saved[0].path, cache=False)
    assert describe_compute(model) == "exact"
    assert logits(model).isfinite().all()


def test_a_damaged_record_does_not_keep_a_checkpoint_from_loading(saved, tmp_path):
    shutil.copytree(saved[0].path, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    config["quantkit"]["quality"] = ["int8_activations"]
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    assert describe_compute(checkpoint.load(tmp_path / "x")) == "exact"
    assert "was not measured" in quantkit.inspect(tmp_path / "x")["compute"]


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "gemma2", "qwen3"])
def test_families_with_experts_biases_and_tied_weights_are_measured_too(family, tmp_path):
    model = FAMILIES[family]()
    result = quantkit.quantize(
        model, "w4a16-asym-channel", method="rtn", output=quantkit.Output(tmp_path / "x", format="native")
    )
    cost = result.metadata["quality"]["int8_activations"]
    assert cost["layers"] > 0
    assert 0 < cost["kl_mean"] < result.metadata["quality"]["kl_mean"]


def test_how_a_model_can_run_is_found_out_with_exact_products(saved, monkeypatch):
    """Rounded ones differ with the order of sums, in a deep model by more than the checks allow: it then ran one by one."""
    seen = {}
    for module, name in ((paged, "_verify"), (cache, "_find_way")):
        plain = getattr(module, name)

        def watched(model, *arguments, name=name, plain=plain):
            seen[name] = describe_compute(model)
            return plain(model, *arguments)

        monkeypatch.setattr(module, name, watched)
    model = checkpoint.load(saved[0].path)
    assert isinstance(make_backend(model, engine="modules"), paged.PagedBackend)
    cache.TransformersStep(model)
    assert seen == {"_verify": "exact", "_find_way": "exact"}
    assert describe_compute(model) == "int8 activations"


def test_a_model_that_leaves_the_cpu_is_exact_there(saved):
    """The meta device stands for a GPU: no layer rounds there, and none fails because no kernel of it would."""
    model = checkpoint.load(saved[0].path)
    layer = next(part for part in model.modules() if part is not model and getattr(part, "compute", "") == "int8")
    moved = layer.to("meta")
    assert describe_compute(moved) == "exact"
    assert moved(torch.empty(1, layer.in_features, device="meta")).shape == (1, layer.out_features)
