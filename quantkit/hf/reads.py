"""Find linear layers whose ``weight`` is read by code outside themselves.

Some models multiply by ``self.dt_proj.weight`` themselves, or ask for ``self.weights_proj.weight.dtype``. A quantized layer has
no such tensor, so such a layer cannot be replaced. Whether a model does this shows in its source: the methods that a module's
``forward`` reaches are read, and every ``<layer>.weight`` in them is noted. Branches that this module cannot take (``if
self.training``, ``if self.config.pretraining_tp > 1``) are left out, which is decided by evaluating their conditions as far as
they consist of the module's own plain attributes that only its constructor sets. A condition that cannot be evaluated counts as
possible, so the answer is the same before and after a model has run.

Nothing is run, so the model may be on the meta device. Source that is not to be had (a class made at run time) says nothing.
Cost: parsing a family's file once, some tens of milliseconds.
"""

import ast
import functools
import inspect
import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_PLAIN = (bool, int, float, str, type(None))


class _Unknown(Exception):
    """A condition that cannot be evaluated."""


def weights_read_elsewhere(model: nn.Module) -> dict[str, str]:
    """Return the path of every module whose ``weight`` other code reads, and who reads it ("MambaMixer.slow_forward")."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if not _mentions(type(module)) or not any(True for _ in module.children()):  # type: ignore[arg-type]
            continue
        reader = _Reader(module)
        reader.method("forward")
        for inner, where in reader.found.items():
            found.setdefault(f"{path}.{inner}" if path else inner, where)
    return found


@functools.cache
def _methods(kind: type) -> dict[str, tuple[str, ast.FunctionDef]]:
    """Return the methods of a class, with those it inherits from models' own classes: name to (class name, syntax tree)."""
    found: dict[str, tuple[str, ast.FunctionDef]] = {}
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins") or base.__name__ == "PreTrainedModel":
            continue
        for name, tree in _classes(base.__module__).get(base.__qualname__, {}).items():
            found.setdefault(name, (base.__name__, tree))
    return found


@functools.cache
def _classes(module_name: str) -> dict[str, dict[str, ast.FunctionDef]]:
    """Return class name to method name to syntax tree, for the classes of a Python module; empty without source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module_name]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return {}
    return {
        node.name: {one.name: one for one in node.body if isinstance(one, ast.FunctionDef)}
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


@functools.cache
def _mentions(kind: type) -> bool:
    """Return whether any method of a class mentions the weight of something."""
    trees = [tree for _, tree in _methods(kind).values()]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return any(isinstance(n, ast.Attribute) and n.attr == "weight" and isinstance(n.value, ast.Attribute) for n in nodes)


@functools.cache
def _changing(kind: type) -> frozenset[str]:
    """Return the names of attributes that a class changes after its construction."""
    trees = [tree for name, (_, tree) in _methods(kind).items() if name != "__init__"]
    stored = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return frozenset(node.attr for node in stored if isinstance(node.ctx, ast.Store))


@dataclass
class _Reader:
    """Walks through the methods that one module's forward reaches.

    Attributes:
        module: the module that ``self`` is.
        found: path below the module to who reads its weight.
    """

    module: nn.Module
    found: dict[str, str] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)
    _changing: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self._changing = _changing(type(self.module))  # type: ignore[arg-type]

    def method(self, name: str) -> None:
        """Read a method, unless it was read already or is not the model's own."""
        methods = _methods(type(self.module))  # type: ignore[arg-type]
        if name in self._seen or name not in methods:
            return
        self._seen.add(name)
        owner, tree = methods[name]
        names: dict[str, list[str]] = {tree.args.args[0].arg: [""]} if tree.args.args else {}
        for node in self._reached(tree.body):
            self._bind(node, names)
            if not isinstance(node, ast.Attribute):
                continue
            if node.attr == "weight":
                for path in self._paths(node.value, names):
                    if path:
                        self.found.setdefault(path, f"{owner}.{name}")
            elif isinstance(node.value, ast.Name) and names.get(node.value.id) == [""]:
                self.method(node.attr)

    def _reached(self, body: list[Any]) -> Iterator[ast.AST]:
        """Yield every node of statements, in order, but those of branches that this module cannot take."""
        for node in body:
            yield node
            if isinstance(node, ast.If | ast.IfExp):
                yield from self._reached([node.test])
                chosen = self._chosen(node.test)
                for taken, branch in ((True, node.body), (False, node.orelse)):
                    if chosen in (taken, None):
                        yield from self._reached(branch if isinstance(branch, list) else [branch])
            elif isinstance(node, ast.BoolOp):
                yield from self._reached(self._needed(node))
            else:
                yield from self._reached(list(ast.iter_child_nodes(node)))

    def _needed(self, node: ast.BoolOp) -> list[ast.expr]:
        """Return the operands of ``and`` / ``or`` up to the one that is known to decide."""
        decides, operands = isinstance(node.op, ast.Or), []
        for value in node.values:
            operands.append(value)
            if self._chosen(value) is decides:
                break
        return operands

    def _chosen(self, test: ast.expr) -> bool | None:
        try:
            return bool(self._value(test))
        except _Unknown:
            return None

    def _value(self, node: ast.expr) -> Any:
        """Evaluate an expression of constants and plain attributes of the module or its config; a model is never in training.

        Raises:
            _Unknown: it has other parts.
        """
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return not self._value(node.operand)
        if isinstance(node, ast.BoolOp):
            return self._bool(node)
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
            left, right = self._value(node.left), self._value(node.comparators[0])
            try:
                return _COMPARE[type(node.ops[0])](left, right)
            except TypeError as error:
                raise _Unknown from error
        chain = _chain(node)
        if chain is None or chain[0] != "self" or len(chain) < 2:
            raise _Unknown
        if chain[1:] == ["training"]:
            return False
        if chain[1] in self._changing:
            raise _Unknown
        value: Any = self.module
        for name in chain[1:]:
            value = vars(value).get(name, _Unknown)
        if not isinstance(value, _PLAIN):
            raise _Unknown
        return value

    def _bool(self, node: ast.BoolOp) -> bool:
        """Evaluate ``and`` / ``or``, which one operand may decide though another is not known."""
        decides = isinstance(node.op, ast.Or)
        known = [self._chosen(value) for value in node.values]
        if decides in known:
            return decides
        if None in known:
            raise _Unknown
        return not decides

    def _bind(self, node: ast.AST, names: dict[str, list[str]]) -> None:
        """Note what a local name stands for: ``proj = self.o_proj``, ``for index, layer in enumerate(self.layers)``."""
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            if paths := self._paths(node.value, names):
                names[node.targets[0].id] = paths
        elif isinstance(node, ast.For):
            target = node.target.elts[-1] if isinstance(node.target, ast.Tuple) else node.target
            parts = [part for part in ast.walk(node.iter) if isinstance(part, ast.Attribute)]
            lists = [path for part in parts for path in self._paths(part, names)]
            members = [f"{path}.{name}" for path in lists for name, _ in self.module.get_submodule(path).named_children()]
            if isinstance(target, ast.Name) and members:
                names[target.id] = members

    def _paths(self, node: ast.AST, names: dict[str, list[str]]) -> list[str]:
        """Return the paths of the submodules that an expression may stand for."""
        chain = _chain(node)
        if chain is None:
            return []
        found = []
        for start in names.get(chain[0], []):
            path = ".".join(part for part in (start, *chain[1:]) if part)
            try:
                self.module.get_submodule(path)
            except AttributeError:
                continue
            found.append(path)
        return found


def _chain(node: ast.AST) -> list[str] | None:
    """Return the names of ``a.b.c``; None for anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        start = _chain(node.value)
        return None if start is None else [*start, node.attr]
    return None
