"""record, call and finish: a model taken apart at its blocks computes what it computes whole."""

from collections import UserDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.errors import CalibrationError, SpecError
from quantkit.hf.structure import describe
from quantkit.nn.block_calls import BlockCalls, call_block, cast_call, check_chain, finish, record_block_calls, why_entangled
from quantkit.nn.sites import Structure
from tests.tiny import FAMILIES, VOCAB, build, tiny_llama

T = 20  # longer than the sliding windows


def ids_and_mask(batch: int, padding: str) -> tuple[Tensor, Tensor | None]:
    ids = torch.randint(3, VOCAB, (batch, T), generator=torch.Generator().manual_seed(batch))
    if padding == "none":
        return ids, None
    mask = torch.ones(batch, T, dtype=torch.bool)
    mask[-1, 13:] = False
    return ids, mask.flip(1) if padding == "left" else mask


def run_chain(model: PreTrainedModel, structure: Structure, calls: BlockCalls) -> Tensor:
    hidden = calls.hidden
    for block, (args, kwargs) in zip(structure.blocks, calls.calls, strict=True):
        hidden = call_block(model.get_submodule(block.name), hidden, args, kwargs)
    return hidden


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_chain_of_blocks_is_the_model(family: str, attention: str, padding: str) -> None:
    if attention == "sdpa" and not FAMILIES[family]()._supports_sdpa:
        with pytest.raises(ValueError, match="does not support"):  # transformers refuses; nothing to walk
            FAMILIES[family](attn_implementation=attention)
        return
    model = FAMILIES[family](attn_implementation=attention)
    assert model.config._attn_implementation == attention
    structure = describe(model)
    for batch in (1, 3):
        ids, mask = ids_and_mask(batch, padding)
        with torch.no_grad():
            want = model(ids, attention_mask=mask, use_cache=False).logits
            hidden = run_chain(model, structure, record_block_calls(model, structure, ids, mask))
            got = finish(model, structure, hidden)
        assert got.shape == (batch, T, VOCAB)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_recording_runs_no_block_leaves_the_model_alone_and_shares_tensors(family: str) -> None:
    model = FAMILIES[family]()
    structure = describe(model)
    before = [dict(module.__dict__) for module in model.modules()]
    ran: list[int] = []
    hooks = [
        child.register_forward_hook(lambda *_: ran.append(1))
        for b in structure.blocks
        for child in model.get_submodule(b.name).children()
    ]
    calls = record_block_calls(model, structure, *ids_and_mask(3, "left"))
    for hook in hooks:
        hook.remove()
    assert not ran
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert len(calls.calls) == len(structure.blocks)

    def tensors(value: object) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
        return [tensor for item in items for tensor in tensors(item)]

    per_block = [tensors(call) for call in calls.calls]
    distinct = {id(tensor) for tensors_ in per_block for tensor in tensors_}
    kinds = len(set(getattr(model.config, "layer_types", None) or ["all"]))
    assert len(distinct) <= kinds * max(len(tensors_) for tensors_ in per_block)
    assert all(tensor is not calls.hidden for tensors_ in per_block for tensor in tensors_)


def test_recording_does_not_read_the_blocks_weights() -> None:
    model = tiny_llama()
    structure = describe(model)
    ids, _ = ids_and_mask(2, "none")
    want = record_block_calls(model, structure, ids).hidden
    model.model.layers.to("meta")
    torch.testing.assert_close(record_block_calls(model, structure, ids).hidden, want)


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_a_model_of_one_block(family: str) -> None:
    check_chain(model := FAMILIES[family](num_hidden_layers=1), describe(model), *ids_and_mask(2, "right"))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "falcon", "qwen3_moe"])
def test_a_bfloat16_model_walked_in_float32(family: str) -> None:
    model = FAMILIES[family]().to(torch.bfloat16)
    structure = describe(model)
    ids, mask = ids_and_mask(3, "left")
    calls = record_block_calls(model, structure, ids, mask)
    assert calls.hidden.dtype == torch.bfloat16
    hidden = calls.hidden.float()
    for block, call in zip(structure.blocks, calls.calls, strict=True):
        with torch.no_grad():
            hidden = call_block(model.get_submodule(block.name).float(), hidden, *cast_call(*call, torch.float32, "cpu"))
    assert hidden.dtype == torch.float32
    want = FAMILIES[family]().to(torch.bfloat16).float()(ids, attention_mask=mask).logits
    got = finish(model, structure, hidden)
    assert got.dtype == torch.bfloat16
    assert mask is not None
    error = (got.float() - want)[mask].std() / want[mask].std()
    assert error < 0.03


def test_cast_call_changes_floats_only_keeps_sharing_and_stays_finite() -> None:
    cos, positions = torch.randn(1, 4, 8), torch.arange(4)
    mask = torch.full((1, 1, 4, 4), torch.finfo(torch.float32).min)
    args, kwargs = cast_call(
        (None, mask), {"cos": (cos, cos), "p": positions, "flag": True, "n": [{"c": cos}]}, torch.bfloat16, "cpu"
    )
    assert args[0] is None
    assert args[1].dtype == torch.bfloat16
    assert torch.isfinite(args[1]).all()
    assert kwargs["cos"][0] is kwargs["cos"][1] is kwargs["n"][0]["c"]
    assert kwargs["cos"][0].dtype == torch.bfloat16
    assert kwargs["p"] is positions
    assert kwargs["flag"] is True
    same_args, same = cast_call((mask,), {"cos": (cos, cos)}, torch.float32, "cpu")
    assert same_args[0] is mask
    assert same["cos"][0] is cos


def test_call_block_refuses_what_is_no_hidden_state() -> None:
    class Odd(nn.Module):
        def forward(self, hidden: Tensor) -> dict[str, Tensor]:
            return {"hidden": hidden}

    with pytest.raises(SpecError, match=r"Odd returned dict; want a hidden state of shape \(1, 2, 3\)"):
        call_block(Odd(), torch.zeros(1, 2, 3), (), {})
    with pytest.raises(SpecError, match=r"Linear returned \(1, 2, 5\)"):
        call_block(nn.Linear(3, 5), torch.zeros(1, 2, 3), (), {})


def test_training_mode_is_refused() -> None:
    model = tiny_llama().train()
    with pytest.raises(CalibrationError, match=r"training mode.*eval\(\)"):
        record_block_calls(model, describe(model), torch.zeros(1, 4, dtype=torch.int64))


def test_weights_that_are_not_finite_are_reported_before_the_chain_is_blamed() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="logits are not finite"):
        check_chain(model, describe(model))


def _broken(change: object) -> PreTrainedModel:
    """Return a tiny llama whose inner forward walks the layers as ``change(layers, hidden, kwargs)`` says."""
    model = tiny_llama()

    class Stack(nn.ModuleList):
        def __getitem__(self, index: object) -> object:
            return [self] if isinstance(index, slice) else super().__getitem__(index)

        def __call__(self, hidden: Tensor, **kwargs: object) -> Tensor:
            return change(list(self), hidden, kwargs)  # type: ignore[operator]

    model.model.layers = Stack(model.model.layers)
    return model


def twice(layers: list[nn.Module], hidden: Tensor, kwargs: dict[str, object]) -> Tensor:
    return layers[1](layers[0](layers[0](hidden, **kwargs), **kwargs), **kwargs)


def skipping(layers: list[nn.Module], hidden: Tensor, kwargs: dict[str, object]) -> Tensor:
    return layers[0](hidden, **kwargs)


def backwards(layers: list[nn.Module], hidden: Tensor, kwargs: dict[str, object]) -> Tensor:
    return layers[0](layers[1](hidden, **kwargs), **kwargs)


def changed(layers: list[nn.Module], hidden: Tensor, kwargs: dict[str, object]) -> Tensor:
    return layers[1](layers[0](hidden, **kwargs) * 2, **kwargs)


class Sharing:
    """A block's forward that leaves its input in a container and, unless ``unused``, adds what it finds there."""

    def __init__(self, inner: Callable[..., Tensor], unused: bool) -> None:
        self.inner, self.unused = inner, unused

    def __call__(self, hidden: Tensor, shared: UserDict[str, Tensor], **kwargs: object) -> Tensor:
        found = 0 if self.unused else shared.get("left", 0)
        shared["left"] = hidden
        return self.inner(hidden, **kwargs) + found


def residual(layers: list[nn.Module], hidden: Tensor, kwargs: dict[str, object]) -> Tensor:
    return layers[1](layers[0](hidden, **kwargs), **kwargs) + hidden


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (twice, r"layers\.0 is called as number 1 of the blocks"),
        (skipping, r"layers\.1 is never called"),
        (backwards, r"layers\.1 is called as number 0 of the blocks"),
        (changed, r"layers\.1: its input is not the output of model\.layers\.0"),
        (residual, r"running the 2 blocks one by one changes the logits by"),
    ],
)
def test_models_whose_blocks_are_no_chain_are_refused(change: object, message: str) -> None:
    model = _broken(change)
    with pytest.raises(SpecError, match=message):
        check_chain(model, describe(model))


def test_a_narrow_model_may_add_its_blocks_up_in_float32() -> None:
    sizes = {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 8}
    model = build("mamba2", **sizes, num_key_value_heads=None, num_attention_heads=None, max_position_embeddings=None)
    assert why_entangled(model.to(torch.bfloat16), describe(model)) is None


def test_what_is_exchanged_through_a_container_shows() -> None:
    model = tiny_llama()
    first, second = model.model.layers
    structure = describe(model)
    plain = model.model.forward

    def forward(*args: object, **kwargs: object) -> object:
        return plain(*args, shared=UserDict(), **kwargs)

    model.model.forward = forward
    for unused in (False, True):
        inner = [type(layer).forward.__get__(layer) for layer in (first, second)]
        first.forward, second.forward = (Sharing(one, unused) for one in inner)
        reason = why_entangled(model, structure)
        assert (reason is None) == unused


def test_state_left_behind_by_one_batch_for_another_shows() -> None:
    model = tiny_llama()
    first, second = model.model.layers
    structure = describe(model)

    def leaves(hidden: Tensor, **kwargs: object) -> Tensor:
        first.left = hidden
        return hidden

    def reads(hidden: Tensor, **kwargs: object) -> Tensor:
        return hidden + first.left

    first.forward, second.forward = leaves, reads
    with pytest.raises(SpecError, match="exchange more than the hidden state"):
        check_chain(model, structure)
    assert (first.forward, second.forward) == (leaves, reads)  # an instance's own forward is put back


def test_a_block_that_cannot_run_by_itself_is_named() -> None:
    model = tiny_llama()
    first, second = model.model.layers
    first.forward = lambda hidden, **kwargs: setattr(second, "token", hidden) or hidden
    second.forward = lambda hidden, **kwargs: hidden + second.__dict__.pop("token")
    with pytest.raises(SpecError, match=r"layers\.1 cannot run by itself"):
        check_chain(model, describe(model))
