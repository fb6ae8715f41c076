"""Layers whose weight is read by other code are found in the source, as far as that code can be reached."""

import torch
from torch import Tensor, nn

from quantkit.hf.reads import weights_read_elsewhere
from quantkit.hf.structure import describe
from tests.tiny import FAMILIES, build


class Reads(nn.Module):
    """Reads the weights of its layers in every way that counts, and in some that do not."""

    def __init__(self, extra: bool = False) -> None:
        super().__init__()
        first, second = ["plain", "called", "dtype", "shape", "alias", "trained"], ["helper", "both", "never", "early", "late"]
        names = [*first, *second, "configured", "once"]
        for name in names:
            setattr(self, name, nn.Linear(4, 4))
        self.members = nn.ModuleList(nn.ModuleDict({"inner": nn.Linear(4, 4)}) for _ in range(2))
        self.extra, self.threshold, self.ran = extra, 3, False

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x) + self.called.weight @ x.to(self.dtype.weight.dtype)
        size = self.shape.weight.shape
        one = self.alias
        x = x @ one.weight
        if self.training and size:
            x = x @ self.trained.weight
        if self.extra or self.threshold > 5:
            x = x @ self.configured.weight
        if self.extra and self.early.weight.sum() > 0:
            x = x + 1
        if not self.ran and self.once.weight.sum() > 0:
            self.ran = True
        if x.sum() > 0 or self.late.weight.sum() > 0:
            x = x + 1
        for index, member in enumerate(self.members):
            x = x @ member.inner.weight * index
        return self._more(x)

    def _more(self, x: Tensor) -> Tensor:
        return x @ self.helper.weight if x.sum() > 0 else x @ self.both.weight

    def unreached(self) -> Tensor:
        return self.never.weight


def test_every_way_in_which_forward_reads_a_weight_is_found_and_no_other() -> None:
    always = {"called", "dtype", "shape", "alias", "helper", "both", "late", "once", "members.0.inner", "members.1.inner"}
    found = weights_read_elsewhere(Reads())
    assert set(found) == always
    assert found["helper"] == "Reads._more"
    assert set(weights_read_elsewhere(Reads(extra=True))) == always | {"configured", "early"}


def test_a_model_that_has_run_is_read_as_one_that_has_not() -> None:
    fresh, used = Reads(), Reads()
    used.ran = True
    assert weights_read_elsewhere(used) == weights_read_elsewhere(fresh)


def test_a_layer_inside_a_model_has_its_whole_path() -> None:
    assert "0.called" in weights_read_elsewhere(nn.Sequential(Reads()))


def test_families_that_read_no_weight_lose_no_layer() -> None:
    for family in ("llama", "gpt2", "mixtral", "gemma3", "falcon"):
        structure = describe(FAMILIES[family]())
        assert not structure.unreachable, family


def test_a_state_space_model_keeps_the_layer_that_it_multiplies_by_itself() -> None:
    sizes = {"state_size": 8, "time_step_rank": 32, "num_attention_heads": None, "num_key_value_heads": None, "head_dim": None}
    structure = describe(build("mamba", **sizes))
    kept = {name: reason for name, reason in structure.skipped.items() if name in structure.unreachable}
    assert kept["backbone.layers.0.mixer.dt_proj.weight"] == "MambaMixer.forward reads its weight"
    assert {site.name.rpartition(".")[2] for site in structure.sites} >= {"in_proj", "out_proj"}


def test_a_branch_that_the_config_rules_out_does_not_count() -> None:
    plain = {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None}
    assert not describe(build("bloom", **plain)).unreachable
    exact = describe(build("bloom", **plain, pretraining_tp=2, slow_but_exact=True))
    assert {name.rpartition(".mlp.")[2] for name in exact.unreachable if ".mlp." in name} == {"dense_4h_to_h.weight"}


def test_nothing_is_run(monkeypatch) -> None:
    monkeypatch.setattr(Reads, "__call__", None)
    with torch.device("meta"):
        assert weights_read_elsewhere(Reads())
