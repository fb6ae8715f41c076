"""What a sweep returns: a table, the rows that are worth their bytes, a picture and a page."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError, nearest
from quantkit.sweeps.rows import COLUMNS, SweepRow
from quantkit.sweeps.store import Store
from quantkit.system.figures import self_showing

COSTS = {
    "bytes": "tensors of the checkpoint, MB",
    "bits": "bits per quantized weight",
    "ms": "decode, ms per token",
}
"""What a row can cost, with what it is called."""

LOSSES = {"kl": "KL from the float model, nats per token", "perplexity": "perplexity"}
"""What a row can lose."""


@dataclass(frozen=True, repr=False)
class SweepResult:
    """The table of a sweep.

    Attributes:
        rows: the float model's, then the others in the order of the axes.
        directory: where the sweep is, or None.
    """

    rows: tuple[SweepRow, ...]
    directory: Path | None = None

    @classmethod
    def load(cls, directory: str | Path) -> "SweepResult":
        """Return the table of a sweep on the disk, finished or not.

        Raises:
            FormatError: there is none, or it is damaged.
        """
        return cls(tuple(row for _, row in Store(Path(directory)).rows()), Path(directory))

    @property
    def done(self) -> list[SweepRow]:
        """The quantized rows that are measured."""
        return [row for row in self.rows if row.status == "done" and not row.is_float]

    @property
    def float_row(self) -> SweepRow | None:
        """The model as it is, once it is measured."""
        return next((row for row in self.rows if row.is_float and row.status == "done"), None)

    def __getitem__(self, name: str) -> SweepRow:
        """Return the row of this name.

        Raises:
            QuantkitError: there is none, naming the nearest.
        """
        known = {row.name: row for row in self.rows}
        if name not in known:
            raise QuantkitError(f"no row {name!r}; {nearest(name, known)}")
        return known[name]

    def frontier(self, x: str = "bytes", y: str = "kl") -> list[SweepRow]:
        """Return the rows that no other row beats in both cost and loss, cheapest first.

        Args:
            x: the cost: ``"bytes"``, ``"bits"`` or ``"ms"``.
            y: the loss: ``"kl"`` or ``"perplexity"``.
        """
        found = [(row, *place_of(row, x, y)) for row in placed(self.done, x, y)]
        best = [
            row for row, cost, loss in found if not any(c <= cost and v <= loss and (c, v) != (cost, loss) for _, c, v in found)
        ]
        return sorted(best, key=lambda row: place_of(row, x, y))

    def best(self, x: str, limit: float, y: str = "kl") -> SweepRow | None:
        """Return the row that loses least and costs at most ``limit``; None if there is none."""
        found = [row for row in placed(self.done, x, y) if place_of(row, x, y)[0] <= limit]
        return min(found, key=lambda row: place_of(row, x, y)[::-1], default=None)

    def to_pandas(self) -> Any:
        """Return the table as a pandas data frame, one row each, with the float model's.

        Raises:
            QuantkitError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise QuantkitError(f"to_pandas() needs pandas: pip install pandas ({error})") from error
        rows = [[getattr(row, name) for name in COLUMNS] for row in self.rows]
        return pandas.DataFrame(rows, columns=list(COLUMNS))

    def plot(self, x: str = "bytes", y: str = "kl") -> Any:
        """Draw loss against cost, with the frontier as a line through its rows and the float model as a dashed one.

        Returns:
            A matplotlib figure: a notebook shows it, ``figure.savefig("sweep.png")`` writes it.

        Raises:
            QuantkitError: fewer than two rows have both numbers.
        """
        from quantkit.report.trade_off import figure_of
        from quantkit.sweeps.show import trade_off

        picture = trade_off(self, x, y)
        if picture is None:
            raise QuantkitError(f"plot: fewer than two rows have {x} and {y}" + ("; sweep with latency" if x == "ms" else ""))
        return self_showing(figure_of(picture))

    def save_html(self, path: str | Path, title: str = "Sweep") -> None:
        """Write the table, the pictures and how it was measured as one page that loads nothing."""
        from quantkit.sweeps.show import write_page

        write_page(self, path, title)

    def __repr__(self) -> str:
        counts = {status: sum(row.status == status for row in self.rows if not row.is_float) for status in _SAID}
        said = ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "no rows"
        base = self.float_row
        head = f"SweepResult: {said}"
        head += (
            f"; float: perplexity {base.perplexity:.2f}, {megabytes(base.bytes)} MB"
            if base and base.perplexity and base.bytes
            else ""
        )
        best, shown = self.frontier(), 7
        width = max((len(row.name) for row in best), default=0)
        lines = [
            f"  {row.name:{width}}  {megabytes(row.bytes or 0):>9} MB  {row.bits:6.2f} bits  KL {row.kl:.4f}"
            for row in best[:shown]
        ]
        more = [f"  and {len(best) - shown} more"] if len(best) > shown else []
        return "\n".join([head, *(["frontier:"] if best else []), *lines, *more])

    def _repr_html_(self) -> str:
        """Return the table for a notebook, rows of the frontier in bold."""
        from quantkit.sweeps.show import cells

        heads, rows = cells(self)
        left = 'style="text-align:left"'
        head = "".join(f"<th {left}>{html.escape(one)}</th>" for one in heads)
        body = "".join(
            "<tr>" + "".join(f"<td {left}>{'<b>' * marked}{html.escape(cell)}{'</b>' * marked}</td>" for cell in row) + "</tr>"
            for marked, row in rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_SAID = ("done", "failed", "skipped", "pending")


def placed(rows: Sequence[SweepRow], x: str, y: str) -> list[SweepRow]:
    """Return the rows that have both numbers."""
    for name, known in ((x, COSTS), (y, LOSSES)):
        if name not in known:
            raise QuantkitError(f"{name!r} is no {'cost' if known is COSTS else 'loss'} of a row; {nearest(name, known)}")
    return [row for row in rows if getattr(row, x) is not None and getattr(row, y) is not None]


def place_of(row: SweepRow, x: str, y: str) -> tuple[float, float]:
    """Return cost and loss of a row that has both."""
    return float(getattr(row, x)), float(getattr(row, y))


def megabytes(nbytes: int) -> str:
    """Return bytes in millions, with four digits where there are not more."""
    return f"{nbytes / 1e6:,.1f}" if nbytes >= 1e8 else f"{nbytes / 1e6:.4g}"
