"""Tables as notebooks show them, without anything to draw them with."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

_LEFT = 'style="text-align:left"'


def facts_html(facts: Mapping[str, str], caption: str = "") -> str:
    """Return names and texts as an HTML table."""
    head = f"<caption {_LEFT}>{html.escape(caption)}</caption>" if caption else ""
    rows = (f"<tr><th {_LEFT}>{html.escape(k)}</th><td {_LEFT}>{html.escape(v)}</td></tr>" for k, v in facts.items())
    return f"<table>{head}{''.join(rows)}</table>"


def table_html(heads: Sequence[str], rows: Sequence[Sequence[Any]], *, most: int = 200) -> str:
    """Return rows of cells as an HTML table; of more than ``most`` rows it says how many are left out.

    A cell of None is empty, a number that is not whole has four digits.
    """
    head = "".join(f"<th {_LEFT}>{html.escape(one)}</th>" for one in heads)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:most])
    more = f"<caption>{len(rows) - most} more rows</caption>" if len(rows) > most else ""
    return f"<table>{more}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"<td {_LEFT}>{html.escape(text)}</td>"


class Rows(list[dict[str, Any]]):
    """A table as a list of mappings, one per row and all with the same keys; notebooks show it as a table."""

    def _repr_html_(self) -> str:
        return table_html(list(self[0]) if self else [], [list(row.values()) for row in self])


def frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return rows as a pandas data frame where pandas is installed, else as :class:`Rows`."""
    try:
        import pandas
    except ImportError:
        return Rows(dict(row) for row in rows)
    return pandas.DataFrame(list(rows))
