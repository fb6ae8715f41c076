"""YAML whose every key remembers its place, so that an error can name file, line and column."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantkit.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Located:
    """A YAML mapping and the tree it was read from."""

    path: str
    data: dict[str, Any]
    root: yaml.Node | None

    def place(self, keys: Sequence[Any]) -> str:
        """Return ``file:line:column`` of the deepest node along ``keys`` (of a mapping's key, where the path ends at one)."""
        node = self.root
        for position, key in enumerate(keys):
            if isinstance(node, yaml.MappingNode):
                pair = next((pair for pair in node.value if pair[0].value == str(key)), None)
                if pair is None:
                    break
                node = pair[0] if position == len(keys) - 1 else pair[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(key, int):
                node = node.value[key]
        return _place(self.path, node)


def read_located(path: str | Path) -> Located:
    """Read a YAML file that holds one mapping.

    Raises:
        RecipeError: the file cannot be read, is not YAML, is no mapping, or gives a key twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_duplicates(root, str(path))
        data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping that names at least model and output; got {type(data).__name__}")
    return Located(str(path), data, root)


def _refuse_duplicates(node: yaml.Node | None, path: str) -> None:
    """YAML lets the last of two equal keys win in silence; a recipe must not."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, child in node.value:
            if key.value in seen:
                raise RecipeError(f"{_place(path, key)}: key {key.value!r} is given twice; keep one")
            seen.add(key.value)
            _refuse_duplicates(child, path)
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_duplicates(child, path)


def _place(path: str, node: yaml.Node | None) -> str:
    return f"{path}:{node.start_mark.line + 1}:{node.start_mark.column + 1}" if node is not None else path
