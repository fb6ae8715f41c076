"""YAML whose every key remembers its place, so that an error can name file, line and column.

A recipe is small and plain, and what is not is refused before it can cost anything: text that is too long or nested too deeply,
an anchor that stands for thousands of values or for itself, keys that are no text, values that Python cannot hold. Dates are
text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantkit.errors import RecipeError
from quantkit.system.files import named_path


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


MOST_DIGITS = 40
"""Longest integer."""

MOST_BYTES, MOST_DEPTH, MOST_VALUES = 1 << 20, 40, 100_000
"""Largest recipe, deepest nesting in it, and most values that it may stand for with its anchors written out."""


class _Loader(yaml.SafeLoader):
    """YAML's plain types without dates, which no recipe has and which fail for days that do not exist."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class has it
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_located(path: str | Path) -> Located:
    """Read a YAML file that holds one mapping.

    Raises:
        RecipeError: the file cannot be read, is not YAML, is no mapping, is too large, or gives a key twice.
    """
    try:
        text = named_path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no path at all
        raise RecipeError(f"{path}: cannot read the recipe: {error}") from None
    root, data = _parse(text, str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping that names at least model and output; got {type(data).__name__}")
    return Located(str(path), data, root)


def read_value(text: str, where: str) -> Any:
    """Return the value of a piece of YAML, such as one given on the command line; ``where`` names it in errors.

    Raises:
        RecipeError: it is not YAML, or cannot be held.
    """
    return _parse(text, where)[1]


def _parse(text: str, where: str) -> tuple[yaml.Node | None, Any]:
    """Return the tree of a YAML document and its value."""
    if len(text) > MOST_BYTES:
        raise RecipeError(f"{where}: {len(text)} characters, a recipe has at most {MOST_BYTES}; put long lists into files")
    try:
        _check_depth(text, where)
        root = yaml.compose(text, Loader=_Loader)
        if root is not None:
            _check_nodes(root, where)
        return root, _construct(root, where)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {error}") from None


def _check_depth(text: str, where: str) -> None:
    """Follow the document piece by piece, and stop where it is nested too deeply for the recursion of what comes after."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            line = event.start_mark.line + 1 if event.start_mark else "?"
            raise RecipeError(f"{where}:{line}: nested deeper than {MOST_DEPTH} levels, which no recipe needs")


def _construct(root: yaml.Node | None, where: str) -> Any:
    """Return the value of a tree; an explicit tag whose text does not fit it fails in many ways."""
    if root is None:
        return None
    loader = _Loader("")
    try:
        return loader.construct_document(root)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise RecipeError(
            f"{where}: a value cannot be read: {error}; leave tags (!!) out, and give numbers of usual size"
        ) from None
    finally:
        loader.dispose()


def _check_nodes(root: yaml.Node, where: str) -> None:
    """Refuse keys that are no text or given twice (YAML lets the last win in silence), and anchors that multiply."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def visit(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise RecipeError(f"{_place(where, node)}: an anchor that stands for itself; write the value out")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            if isinstance(node, yaml.MappingNode):
                _check_keys(node, where)
            if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MOST_DIGITS:
                raise RecipeError(f"{_place(where, node)}: a number of {len(node.value)} digits; want at most {MOST_DIGITS}")
            sizes[id(node)] = 1 + sum(visit(child) for child in _children(node))
            open_nodes.discard(id(node))
            if sizes[id(node)] > MOST_VALUES:
                raise RecipeError(f"{_place(where, node)}: anchors that stand for more than {MOST_VALUES} values; write it out")
        return sizes[id(node)]

    visit(root)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for _, child in node.value]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _check_keys(node: yaml.MappingNode, where: str) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise RecipeError(f"{_place(where, key)}: a list or mapping as a key; keys are words")
        if key.value in seen:
            raise RecipeError(f"{_place(where, key)}: key {key.value!r} is given twice; keep one")
        seen.add(key.value)


def _place(path: str, node: yaml.Node | None) -> str:
    return f"{path}:{node.start_mark.line + 1}:{node.start_mark.column + 1}" if node is not None else path
