"""Fill the templates of pages; all of them extend ``base.html``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, *, title: str, headline: str, protocol: Sequence[str] = (), reload_s: int = 0, **content: Any) -> str:
    """Return a page as HTML; text is escaped unless it is markup already, and a name that a template does not get is an error.

    Args:
        template: file name.
        title: of the page.
        headline: what it says, in a sentence.
        protocol: lines at its end, on how things were measured.
        reload_s: seconds after which browsers load it again; 0 never does.
        content: what else the template names.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        title=title, headline=headline, protocol=protocol, reload_s=reload_s, **content
    )
