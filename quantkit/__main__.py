"""``python -m quantkit`` is the command ``quantkit``."""

from quantkit.cli import app

app(prog_name="quantkit")
