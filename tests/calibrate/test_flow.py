"""Models whose blocks exchange more than the hidden state: calibrated as a whole, with the statistics that are right."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.calibrate.chain import collect_statistics, visit_statistics
from quantkit.calibrate.data import Calibration
from quantkit.calibrate.flow import Flow, Passes, run_order
from quantkit.hf.structure import describe
from quantkit.nn.block_calls import why_entangled
from quantkit.nn.sites import Site, SiteStatistics, Structure
from quantkit.numerics import grid
from quantkit.pipeline.quantize import quantize
from quantkit.pipeline.settings import Output, Run
from quantkit.qtensor import GridTensor
from quantkit.quantizers.autoround import AutoRound
from quantkit.quantizers.base import Quantizer
from quantkit.spec import QuantSpec
from quantkit.system.compute import Compute
from quantkit.system.progress import Progress
from quantkit.transforms.distill import Distill
from tests.tiny import build, tiny_llama

EXACT = Compute(torch.device("cpu"), torch.float32)


def token_ids(count: int = 3) -> list[Tensor]:
    return [torch.randint(3, 190, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def stacked(change: Callable[[list[nn.Module], Tensor, dict[str, Any]], Tensor]) -> PreTrainedModel:
    """Return a tiny llama whose inner forward runs its three layers as ``change(layers, hidden, kwargs)`` says."""
    model = tiny_llama(num_hidden_layers=3)

    class Stack(nn.ModuleList):
        def __getitem__(self, index: object) -> object:
            return [self] if isinstance(index, slice) else super().__getitem__(index)

        def __call__(self, hidden: Tensor, **kwargs: Any) -> Tensor:
            return change(list(self), hidden, kwargs)

    model.model.layers = Stack(model.model.layers)
    return model


def stream(layers: list[nn.Module], hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """A second residual stream, mixed in between the layers."""
    first = layers[0](hidden, **kwargs)
    second = layers[1](first + 0.5 * hidden, **kwargs)
    return layers[2](second - 0.25 * first, **kwargs)


def loop(layers: list[nn.Module], hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The layer in the middle runs twice."""
    first = layers[0](hidden, **kwargs)
    return layers[2](layers[1](layers[1](first, **kwargs) * 0.5, **kwargs), **kwargs)


def backwards(layers: list[nn.Module], hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    for layer in reversed(layers):
        hidden = layer(hidden, **kwargs)
    return hidden


def sharing() -> PreTrainedModel:
    """A gemma 3n with three streams, whose last layers read keys and values of earlier ones."""
    return build(
        "gemma3n_text",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=8,
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=192,
        activation_sparsity_pattern=[0.0] * 4,
        altup_num_inputs=3,
        laurel_rank=8,
    )


MODELS = {
    "stream": lambda: stacked(stream),
    "loop": lambda: stacked(loop),
    "backwards": lambda: stacked(backwards),
    "sharing": sharing,
}


def inputs_of(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Return what reaches the modules called ``names`` in plain forwards, (rows, in), of all their calls."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for ids in token_ids():
            model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def tried(model: nn.Module) -> Structure:
    structure = describe(model)
    reason = why_entangled(model, structure)
    assert reason is not None
    return replace(structure, entangled=reason)


@pytest.mark.parametrize("kind", MODELS)
def test_statistics_are_those_of_plain_forwards(kind: str) -> None:
    model = MODELS[kind]()
    structure = tried(model)
    order = run_order(model, structure, token_ids()[0])
    assert (order == sorted(set(order))) == (kind in ("stream", "sharing"))
    found = collect_statistics(model, structure, token_ids(), ["mean_square"], compute=EXACT, progress=lambda _: None)
    want = inputs_of(model, [site.module for site in structure.sites])
    assert found.keys() == {site.name for site in structure.sites}
    for name, rows in want.items():
        assert found[name].tokens == (len(rows),)
        torch.testing.assert_close(found[name].results["mean_square"], rows.double().square().mean(0))


@pytest.mark.parametrize("walk", [Flow, Passes])
def test_a_model_that_can_be_walked_gives_the_same_as_a_whole(walk: type) -> None:
    model = tiny_llama()
    structure = describe(model)
    want = collect_statistics(model, structure, token_ids(), ["hessian"], compute=EXACT, progress=lambda _: None)
    found: dict[str, SiteStatistics] = {}
    whole = walk(model, structure, token_ids())
    with torch.no_grad():
        for index, block in enumerate(structure.blocks):
            whole.advance(index, block.sites, lambda site, gather: found.update({site.name: gather(["hessian"])}))
    assert list(found) == list(want)
    for name, one in found.items():
        assert torch.equal(one.results["hessian"], want[name].results["hessian"])
    assert found["model.layers.0.self_attn.q_proj"] is found["model.layers.0.self_attn.k_proj"]


SEEN: dict[str, Tensor] = {}


@dataclass(frozen=True)
class Noting(Quantizer):
    """Rounds, and notes the statistics it was given in the order of its calls."""

    needs = ("mean_square",)

    def quantize(
        self, weight: Tensor, spec: QuantSpec, statistics: SiteStatistics | None
    ) -> tuple[GridTensor, tuple[str, ...]]:
        assert statistics is not None
        SEEN[str(len(SEEN))] = statistics.results["mean_square"]
        qparams = grid.choose_qparams(weight, spec)
        return GridTensor.from_codes(grid.quantize(weight, *qparams, spec), *qparams, spec), ()


@pytest.mark.parametrize("kind", MODELS)
def test_layers_see_what_the_quantized_blocks_before_them_make(kind: str) -> None:
    SEEN.clear()
    done: list[str] = []
    run = Run(progress=lambda progress: done.append(progress.detail))
    result = quantize(MODELS[kind](), "w3a16", method=Noting(), calibration=Calibration(data=token_ids()), run=run)
    got = dict(zip([name for name in done if name in result.plan], SEEN.values(), strict=True))
    assert got.keys() == result.plan.keys()
    # Of a block that runs as a whole each time, only the first layer sees all others before it quantized.
    apart = {"loop": ("layers.0", "layers.2"), "backwards": ("layers.2",)}.get(kind)
    names = [name for name in got if apart is None or ("q_proj" in name and any(part in name for part in apart))]
    want = inputs_of(result.model, names)
    for name in names:
        torch.testing.assert_close(got[name], want[name].double().square().mean(0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "dtype", "method", "steps"),
    [
        ("stream", torch.float32, "gptaq", ("smoothquant",)),
        ("loop", torch.float32, AutoRound(iters=2), ("awq",)),
        ("backwards", torch.bfloat16, "gptaq", (Distill(steps=2, windows=2),)),
        ("sharing", torch.bfloat16, AutoRound(iters=2), (Distill(steps=2, windows=2),)),
    ],
)
def test_every_calibrated_method_takes_them(kind: str, dtype: torch.dtype, method: Any, steps: tuple[Any, ...]) -> None:
    model = MODELS[kind]().to(dtype)
    result = quantize(model, "w8a16", method=method, steps=steps, calibration=Calibration(data=token_ids()))
    assert not result.metadata["fell_back"]
    assert result.metadata["quality"]["kl_mean"] < (1e-3 if dtype == torch.float32 else 0.02)


def test_gptq_is_better_than_rounding_on_a_loop() -> None:
    kl = {
        method: quantize(stacked(loop), "w3a16-g32", method=method, calibration=Calibration(data=token_ids(8)))
        for method in ("rtn", "gptq")
    }
    assert kl["gptq"].metadata["quality"]["kl_mean"] < 0.8 * kl["rtn"].metadata["quality"]["kl_mean"]


def test_without_calibration_blocks_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.pipeline.checks.why_entangled", lambda *_: pytest.fail("nothing wants the blocks to run"))
    for method in ("rtn", "hqq"):
        assert quantize(stacked(loop), "w4a16-g32", method=method).coverage


def dory() -> PreTrainedModel:
    """A model whose middle layer runs twice."""
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    layers = {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1}
    return build("dory", num_hidden_layers=3, layer_types=kinds, sliding_window=8, **layers)


def test_rounding_that_a_model_amplifies_does_not_rule_a_rewrite_out() -> None:
    model = dory().to(torch.bfloat16)
    result = quantize(model, "w8a16", method="rtn", steps=["awq"], calibration=Calibration(data=token_ids()))
    assert result.metadata["quality"]["kl_mean"] < 0.05


@pytest.mark.parametrize(("make", "method"), [(sharing, "gptaq"), (dory, "gptq")])
def test_an_interrupted_run_gives_the_same_files(make: Callable[[], PreTrainedModel], method: str, tmp_path: Path) -> None:
    def run(name: str, progress: Callable[[Progress], None]) -> None:
        data, output = Calibration(data=token_ids()), Output(format="native")
        quantize(
            make(), "w4a16", out=tmp_path / name, method=method, calibration=data, output=output, run=Run(progress=progress)
        )

    def interrupt(progress: Progress) -> None:
        if progress.stage == "quantize" and progress.detail.endswith("layers.2"):
            raise KeyboardInterrupt

    run("whole", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        run("interrupted", interrupt)
    run("interrupted", lambda _: None)
    files = [sorted((tmp_path / name).glob("*.safetensors")) for name in ("whole", "interrupted")]
    assert [one.read_bytes() for one in files[0]] == [one.read_bytes() for one in files[1]]


def test_the_reason_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    quantize(stacked(loop), "w8a16-g32", calibration=Calibration(data=token_ids()))
    said = [record.getMessage() for record in caplog.records if "block by block" in record.getMessage()]
    assert len(said) == 1
    assert "the whole model stays in memory" in said[0]
    assert "is called as number" in said[0]


def test_a_failure_inside_leaves_the_model_usable() -> None:
    model = stacked(stream)
    structure = tried(model)

    def visit(site: Site, statistics: SiteStatistics) -> None:
        if "layers.1" in site.name:
            raise KeyboardInterrupt

    ids = token_ids()[0]
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(KeyboardInterrupt):
            visit_statistics(model, structure, token_ids(), ["mean"], visit, compute=EXACT, progress=lambda _: None)
        assert torch.equal(model(ids).logits, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
