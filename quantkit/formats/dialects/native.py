"""``native``: the dialect of quantkit's own format, which lists the modules of every scheme and can say them all."""

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.errors import FormatError, SpecError
from quantkit.formats.base import Held, Matcher, Stored, group_by_scheme
from quantkit.formats.codecs.native import codec_of
from quantkit.spec import Scheme

VERSION = 1


class Native:
    """The dialect; its ``quant_method`` is ``quantkit``."""

    quant_method = "quantkit"
    codec = staticmethod(codec_of)
    conv1d = True
    embeddings = True

    def rejects(self, scheme: Scheme, shape: tuple[int, ...], dtype: str | None = None) -> str | None:
        """Reject only a block that does not divide the shape, and those of GGUF files."""
        if scheme.weight.blocks is not None:
            return f"blocks {scheme.weight.blocks} go into GGUF files; use format gguf"
        return scheme.weight.rejects(shape)

    def dump_config(self, plan: Mapping[str, Scheme], ignore: Sequence[str], dtype: str) -> dict[str, Any]:
        """List the modules of every scheme."""
        groups = [{"scheme": scheme.to_dict(), "modules": names} for scheme, names in group_by_scheme(plan).items()]
        return {"quant_method": self.quant_method, "version": VERSION, "groups": groups, "ignore": list(ignore)}

    def load_config(self, config: Mapping[str, Any], dtype: str, tensors: Mapping[str, Held]) -> Matcher:
        """Reverse :meth:`dump_config`; every scheme names the dtype of its scales."""
        if config.get("version") != VERSION:
            raise FormatError(
                f"quantization_config.version is {config.get('version')!r}, this quantkit reads {VERSION}; update it"
            )
        stored: dict[str, Stored] = {}
        try:
            for group in config["groups"]:
                scheme = Scheme.from_dict(group["scheme"])
                entry = Stored(scheme, self.codec(scheme))
                stored.update(dict.fromkeys(group["modules"], entry))
        except (KeyError, TypeError, AttributeError, SpecError) as error:
            raise FormatError(f"quantization_config.groups is malformed: {error!r}") from error
        return stored.get
