"""What has to be mended in transformers before a model of one of its classes can run."""

from typing import Any

from torch import nn

_ABSENT = {"Llama4ForConditionalGeneration": ("language_model", "image_outputs")}
"""Class name to a part whose output lacks a field that the class reads from it: it cannot finish a forward (5.24)."""


def mend(model: nn.Module) -> None:
    """Let ``model`` run where its class has a fault that keeps it from running; nothing it computes is changed.

    A config may say that a model returns plain tuples, in which nothing has a name: what runs it here asks for the logits.
    """
    config: Any = getattr(model, "config", None)
    for one in (config, config.get_text_config()) if hasattr(config, "get_text_config") else ():
        if not getattr(one, "return_dict", True):
            one.return_dict = True
    part, _ = _ABSENT.get(type(model).__name__, (None, None))
    if part is not None and _add_field not in model.get_submodule(part)._forward_hooks.values():
        model.get_submodule(part).register_forward_hook(_add_field)


def _add_field(_module: nn.Module, _arguments: Any, output: Any) -> None:
    for _, field in _ABSENT.values():
        if not isinstance(output, tuple) and not hasattr(output, field):
            setattr(output, field, None)
