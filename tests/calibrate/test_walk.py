"""The suspended walk through a block, on small hand-made blocks."""

import pytest
import torch
from torch import Tensor, nn

from quantkit.calibrate.collect import Inputs, collect
from quantkit.calibrate.walk import record_inputs, walk_block
from quantkit.errors import CalibrationError
from quantkit.nn.sites import Site, SiteStatistics


class Block(nn.Module):
    """q and k read one tensor, o reads what they make; ``pair`` is only reached by batches with an even first number."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o, self.pair = (nn.Linear(8, 8, bias=False) for _ in range(4))
        for i, linear in enumerate((self.q, self.k, self.o, self.pair)):
            linear.weight.data = torch.randn(8, 8, generator=torch.Generator().manual_seed(i))

    def forward(self, x: Tensor, even: bool = True) -> Tensor:
        h = torch.tanh(x)
        y = self.o(self.q(h) * self.k(h))
        return y + self.pair(y) if even else y


def sites() -> list[Site]:
    return [Site(f"b.{name}", f"b.{name}", "weight", (8, 8)) for name in ("q", "k", "o", "pair")]


def inputs(count: int = 3) -> list[Tensor]:
    return [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(10 + i)) for i in range(count)]


@torch.no_grad()
def test_every_site_sees_what_the_changed_sites_before_it_make() -> None:
    block, plain, xs = Block(), Block(), inputs()
    seen: dict[str, Tensor] = {}

    def visit(site: Site, statistics: object) -> None:
        seen[site.name] = statistics(["hessian"]).results["hessian"]  # type: ignore[operator]
        block.get_submodule(site.name[2:]).weight.mul_(2)

    outputs = walk_block(block, "b", sites(), [lambda x=x: block(x) for x in xs], visit)
    assert list(seen) == ["b.q", "b.k", "b.o", "b.pair"]
    for linear in (plain.q, plain.k, plain.o, plain.pair):
        linear.weight.mul_(2)
    for out, x in zip(outputs, xs, strict=True):
        assert torch.equal(out, plain(x))
    h = torch.tanh(torch.cat(xs)).reshape(-1, 8)
    torch.testing.assert_close(seen["b.q"], h.T @ h / len(h))
    between = plain.q(h) * plain.k(h)
    torch.testing.assert_close(seen["b.o"], between.T @ between / len(h))


@torch.no_grad()
def test_drift_compares_with_what_the_float_block_has_at_the_same_place() -> None:
    block, plain, xs = Block(), Block(), inputs()
    found: dict[str, SiteStatistics] = {}

    def visit(site: Site, statistics: object) -> None:
        found[site.name] = statistics(["drift", "hessian"])  # type: ignore[operator]
        block.get_submodule(site.name[2:]).weight.mul_(1.5)

    moved = [x + 0.1 for x in xs]
    outputs, float_inputs = record_inputs(block, "b", sites(), [lambda x=x: block(x) for x in xs])
    assert float_inputs[0]["b.q"] is float_inputs[0]["b.k"]
    for out, x in zip(outputs, xs, strict=True):
        assert torch.equal(out, plain(x))
    walk_block(block, "b", sites(), [lambda x=x: block(x) for x in moved], visit, float_inputs)
    assert found["b.q"] is found["b.k"]
    assert not any(float_inputs)  # let go
    h, g = (torch.tanh(torch.cat(part)).reshape(-1, 8) for part in (moved, xs))
    torch.testing.assert_close(found["b.q"].results["drift"], (g - h).T @ h / len(h))
    between, float_x = 2.25 * plain.q(h) * plain.k(h), plain.q(g) * plain.k(g)
    torch.testing.assert_close(found["b.o"].results["drift"], (float_x - between).T @ between / len(h))
    without = collect(sites()[0], ["drift", "hessian"], [Inputs(h)])
    assert list(without.results) == ["hessian"]


@torch.no_grad()
def test_sites_that_read_one_tensor_share_their_statistics() -> None:
    block, found = Block(), {}
    walk_block(
        block,
        "b",
        sites(),
        [lambda x=x: block(x) for x in inputs()],
        lambda s, stats: found.update({s.name: stats(["hessian"])}),
    )
    assert found["b.q"] is found["b.k"]
    assert found["b.q"] is not found["b.o"]


@torch.no_grad()
def test_a_site_that_only_some_batches_reach_is_served_by_those() -> None:
    block, tokens = Block(), {}
    runs = [lambda x=x, even=i % 2 == 0: block(x, even) for i, x in enumerate(inputs(3))]
    outputs = walk_block(block, "b", sites(), runs, lambda s, stats: tokens.update({s.name: stats(["mean_square"]).tokens}))
    assert tokens == {"b.q": (30,), "b.k": (30,), "b.o": (30,), "b.pair": (20,)}
    assert len(outputs) == 3


@torch.no_grad()
def test_a_failure_leaves_no_hook_and_no_suspended_batch() -> None:
    block, unwound = Block(), []

    def run(x: Tensor) -> Tensor:
        try:
            return block(x)
        finally:
            unwound.append(1)

    def fail(site: Site, statistics: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk_block(block, "b", sites(), [lambda x=x: run(x) for x in inputs()], fail)
    assert len(unwound) == 3
    assert not any(module._forward_pre_hooks for module in block.modules())

    def broken() -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        walk_block(block, "b", sites(), [lambda: run(inputs()[0]), broken], lambda s, stats: None)
    assert len(unwound) == 4


def test_infinite_inputs_are_named() -> None:
    with pytest.raises(CalibrationError, match=r"b\.q: calibration inputs hold NaN or infinity"):
        collect(sites()[0], ["hessian"], [Inputs(torch.full((2, 8), torch.inf))])


def test_experts_are_counted_apart() -> None:
    site = Site("e.up", "e", "up", (3, 4, 8))
    x = inputs(1)[0].reshape(-1, 8)
    ids = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2, 2, 2])
    found = collect(site, ["hessian"], [Inputs(x, ids)])
    assert found.tokens == (4, 0, 6)
    torch.testing.assert_close(found.expert(2).results["hessian"], x[4:].T @ x[4:] / 6)
    assert (found.results["hessian"][1] == 0).all()
    assert isinstance(found.expert(0), SiteStatistics)
    with pytest.raises(CalibrationError, match="no token reached any expert"):
        collect(site, ["hessian"], [Inputs(x[:0], ids[:0])])
