"""``torch-export``: a program of ``torch.export`` (``model.pt2``) that runs with torch alone, weights in their packed form.

Every quantized layer becomes a module of plain torch operations that unpacks its codes when it is asked to multiply, so that
the file is as small as the checkpoint, and whatever compiles such programs (AOTInductor, and what is built on ``torch.export``)
sees no operator of quantkit's. The program takes ``input_ids`` int64 (1, tokens) and returns logits (1, tokens, vocabulary): a
whole text at once, without keys and values.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quantkit import checkpoint
from quantkit.errors import FormatError
from quantkit.exports.base import TARGETS, compare
from quantkit.nn.linear import QuantLinear, QuantModule
from quantkit.qtensor import QTensor

_FILE = "model.pt2"


class PlainLinear(nn.Module):
    """A linear layer that dequantizes its weight with torch's own operations each time; its buffers are the QTensor's parts."""

    def __init__(self, qtensor: QTensor, bias: Tensor | None) -> None:
        super().__init__()
        self._empty = qtensor.to("meta")
        self._names = list(qtensor.parts())
        for name, part in qtensor.parts().items():
            self.register_buffer(name, part)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ w.T + bias`` for x (..., in)."""
        qtensor = self._empty.with_parts({name: self.get_buffer(name) for name in self._names})
        return functional.linear(x, qtensor.dequantize(x.dtype), self.bias)


class Logits(nn.Module):
    """A causal language model as a function of its tokens alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits (1, tokens, vocabulary) of ``input_ids`` (1, tokens)."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


@TARGETS.register("torch-export")
@torch.no_grad()
def torch_export(source: Path, out: Path) -> dict[str, Any]:
    """See :data:`quantkit.exports.base.Target`."""
    model: Any = checkpoint.load(source, dtype=torch.float32, compute="exact", cache=False)
    ids = torch.arange(8)[None]
    want = model(input_ids=ids).logits
    program = torch.export.export(
        Logits(_plain(model)), (ids,), dynamic_shapes={"input_ids": {1: torch.export.Dim("tokens", min=2, max=_longest(model))}}
    )
    torch.export.save(program, out / _FILE)
    theirs = torch.export.load(out / _FILE).module()(torch.arange(8)[None])
    difference = compare(float((theirs - want).norm() / want.norm()), out, "the exported program")
    return {"version": torch.__version__, "difference": difference, "bytes": (out / _FILE).stat().st_size}


def _longest(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048)


def _plain(model: nn.Module) -> nn.Module:
    """Put a plain module in place of every quantized one.

    Raises:
        FormatError: a layer that is more than a weight.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, QuantModule):
            continue
        if not isinstance(module, QuantLinear) or module.activation is not None:
            raise FormatError(f"{name}: {type(module).__name__} {module.spec.describe()} is not exported, only linear layers")
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, PlainLinear(module.qtensor, module.bias))
    return model
