"""What mkdocstrings must be told about our sources: settings are dataclasses, and roles of docstrings become Markdown."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):`~?([^`]+)`")


def plain(text: str) -> str:
    """Return a docstring's text as Markdown: roles and double backticks become code."""
    return ROLE.sub(lambda found: f"`{found[1].rpartition('.')[2]}`", text).replace("``", "`")


class Docstrings(griffe.Extension):
    """Applied to every object before its page is made."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Write the docstring as Markdown."""
        if obj.docstring:
            obj.docstring.value = plain(obj.docstring.value)

    def on_class_instance(self, *, cls: griffe.Class, **_: Any) -> None:
        """Show the arguments of a class decorated with ``settings`` as those of a dataclass."""
        if any(one.callable_path == "quantkit.system.settings.settings" for one in cls.decorators):
            found = griffe.Decorator(griffe.ExprName("dataclasses.dataclass"), lineno=None, endlineno=None)
            cls.decorators.append(found)
