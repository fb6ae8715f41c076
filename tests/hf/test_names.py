"""Checkpoint names are transformers' own: compared with what save_pretrained writes, names and values."""

from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.checkpoint.contents import contents_of, float_tensor, restore
from quantkit.errors import FormatError
from quantkit.hf import names
from quantkit.hf.load import empty_model
from quantkit.hf.names import Piece, checkpoint_names
from tests.tiny import FAMILIES, MOE_FAMILIES, build


def with_class(model: PreTrainedModel) -> PreTrainedModel:
    model.config.architectures = [type(model).__name__]
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_that_save_pretrained_writes_and_its_values(family: str, tmp_path) -> None:
    model = with_class(FAMILIES[family]())
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    contents = contents_of(model.config)
    assert {entry.name for entry in contents.entries} == set(written)
    for entry in contents.entries:
        ours = float_tensor(model, entry, contents.transposed)
        assert tuple(ours.shape) == entry.shape
        assert torch.equal(ours, written[entry.name]), entry.name


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", *MOE_FAMILIES])
def test_parameters_come_back(family: str) -> None:
    model = with_class(FAMILIES[family]())
    contents = contents_of(model.config)
    entries_of: dict[str, list] = {}
    for entry in contents.entries:
        for piece in entry.source.pieces:
            entries_of.setdefault(piece.parameter, []).append(entry)
    state = {name: t for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys}
    assert set(entries_of) == set(state)
    for name, tensor in state.items():
        stored = [(entry, float_tensor(model, entry, contents.transposed)) for entry in entries_of[name]]
        assert torch.equal(restore(name, tuple(tensor.shape), stored, name in contents.transposed), tensor)


def test_mixtral_by_hand() -> None:
    config = with_class(FAMILIES["mixtral"]()).config
    found, size = checkpoint_names(empty_model(config)), config.intermediate_size
    one = found["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    assert one.pieces == (Piece("model.layers.1.mlp.experts.gate_up_proj", 2, size, 2 * size),)
    assert not one.transposed
    assert found["model.layers.0.block_sparse_moe.gate.weight"].pieces == (Piece("model.layers.0.mlp.gate.weight", None, 0, 4),)


def converted_by(monkeypatch: pytest.MonkeyPatch, change) -> dict:
    """Run the tracer through a conversion of our own on a one-layer model of one 2-D and one 3-D parameter."""

    class Model(nn.Module):
        all_tied_weights_keys: ClassVar[dict[str, str]] = {}

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros(6, 5))
            self.e = nn.Parameter(torch.zeros(2, 4, 5))

    monkeypatch.setattr(names, "revert_weight_conversion", lambda model, state: change(state))
    return checkpoint_names(Model())


def test_joins_reorderings_and_transpositions(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        order = torch.tensor([3, 4, 0, 1, 2, 5])
        return {"t": state["a"][order].T.contiguous(), "join": torch.cat([state["e"][1], state["a"][:2]])}

    found = converted_by(monkeypatch, change)
    assert found["t"].transposed
    assert found["t"].pieces == (Piece("a", None, 3, 5), Piece("a", None, 0, 3), Piece("a", None, 5, 6))
    assert found["join"].pieces == (Piece("e", 1, 0, 4), Piece("a", None, 0, 2))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {"a": state["a"].reshape(3, -1)},
        lambda state: {"a": state["a"].flip(-1)},
        lambda state: {"e": torch.stack([state["e"][0], state["e"][0]]).flip(1)},
        lambda state: {"e": state["missing"]},
    ],
)
def test_what_is_not_made_of_rows_is_refused(monkeypatch: pytest.MonkeyPatch, change) -> None:
    with pytest.raises(FormatError, match=r"cannot (write|convert)"):
        converted_by(monkeypatch, change)


def test_a_stack_whose_rows_change_places_keeps_its_name_in_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    found = converted_by(monkeypatch, lambda state: {"a": state["a"], "stored": state["e"][:, [0, 2, 1, 3]].contiguous()})
    assert found["e"].pieces == (Piece("e", None, 0, 4),)
    assert not found["e"].transposed
    assert "stored" not in found


def test_a_stack_is_cut_in_whole_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    found = converted_by(monkeypatch, lambda state: {"one": state["e"][1:].contiguous(), "two": state["e"].flip(0)})
    assert found["one"].pieces == (Piece("e", None, 0, 4, (1, 2)),)
    assert found["two"].pieces == (Piece("e", None, 0, 4, (1, 2)), Piece("e", None, 0, 4, (0, 1)))


def test_one_column_weights_are_traced() -> None:
    model = with_class(build("llama", hidden_size=64, intermediate_size=1))
    contents = contents_of(model.config)
    down = next(e for e in contents.entries if e.name == "model.layers.0.mlp.down_proj.weight")
    assert torch.equal(float_tensor(model, down, contents.transposed), model.model.layers[0].mlp.down_proj.weight)
