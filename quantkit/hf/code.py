"""Python code that a model's directory brings with it: run where somebody has said so, and then known like transformers' own.

What a config's ``auto_map`` names is anybody's program. It is run by :func:`trust_code` and by nothing else. From then on, in
this process, transformers knows the classes under the model's type, so that whatever builds a model from a config (a plan, a
checkpoint that is read back) finds them without running code of another directory.
"""

from pathlib import Path
from typing import Any, Final

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from quantkit.errors import QuantkitError
from quantkit.hf.guard import names_source
from quantkit.hf.source import directory_of, locate
from quantkit.system.files import read_json

_HOME: Final = "transformers_modules"
"""Package in which transformers keeps classes that come from a directory's code."""


@names_source("cannot run the code of")
def trust_code(source: str | Path) -> None:
    """Run the code of a model's directory and make its classes known.

    Nothing is run where the directory brings none, or where transformers itself knows models of its type.

    Args:
        source: hub id or directory, of a float model or of a quantized one. A GGUF file has no code.

    Raises:
        QuantkitError: the code cannot be run, or its classes are not those of the config.
    """
    place = Path(locate(source))
    if place.is_file():
        return
    directory = directory_of(source, trust_remote_code=True)
    values: dict[str, Any] = read_json(directory / "config.json")
    wanted, kind = values.get("auto_map"), values.get("model_type")
    if not wanted or kind in CONFIG_MAPPING:
        return
    if not isinstance(wanted, dict) or not {"AutoConfig", "AutoModelForCausalLM"} <= wanted.keys():
        raise QuantkitError(
            f"{source}: auto_map in its config.json names {wanted}, want AutoConfig and AutoModelForCausalLM; "
            "other classes are no language models"
        )
    config, model = (
        get_class_from_dynamic_module(wanted[name], str(directory)) for name in ("AutoConfig", "AutoModelForCausalLM")
    )
    _register(str(kind), config, model)


def know_code(model: PreTrainedModel) -> None:
    """Make the classes of a model known that somebody has loaded with code of its own."""
    config = type(model.config)
    if runs_own_code(model) and config.model_type not in CONFIG_MAPPING:
        _register(config.model_type, config, type(model))


def runs_own_code(model: PreTrainedModel) -> bool:
    """Say whether a model's class comes from the code of a directory."""
    return type(model).__module__.split(".")[0] == _HOME


def _register(kind: str, config: type[PretrainedConfig], model: type[PreTrainedModel]) -> None:
    AutoConfig.register(kind, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
