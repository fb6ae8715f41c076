"""The dialect of format ``gguf``: config.json says which modules have blocks of which type, the file says it again.

The config is there for the model's class and for quantkit; llama.cpp reads the file alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.errors import FormatError, SpecError
from quantkit.formats.base import Held, Matcher, Stored, group_by_scheme
from quantkit.formats.gguf.codec import codec_of, spec_of, type_of
from quantkit.spec import BLOCK_GRIDS, Scheme

VERSION = 1


class Gguf:
    """The dialect; its ``quant_method`` is ``gguf``."""

    quant_method = "gguf"
    conv1d = False
    embeddings = True

    def rejects(self, scheme: Scheme, shape: tuple[int, ...], dtype: str | None = None) -> str | None:
        """Reject everything but blocks of ggml, and rounded inputs."""
        if type_of(scheme.weight) is None:
            return (
                f"a GGUF file holds blocks ({', '.join(BLOCK_GRIDS)}, MXFP4), not {scheme.weight.describe()}; "
                "use a scheme such as Q4_K_M, or format native or compressed-tensors"
            )
        if scheme.activation is not None:
            return f"a GGUF file says nothing of inputs ({scheme.describe()}); use a scheme with float activations"
        return scheme.weight.rejects(shape)

    def dump_config(self, plan: Mapping[str, Scheme], ignore: Sequence[str], dtype: str) -> dict[str, Any]:
        """List the modules of every type of blocks."""
        types = {str(type_of(scheme.weight)): names for scheme, names in group_by_scheme(plan).items()}
        return {"quant_method": self.quant_method, "version": VERSION, "types": types}

    def load_config(self, config: Mapping[str, Any], dtype: str, tensors: Mapping[str, Held]) -> Matcher:
        """Reverse :meth:`dump_config`."""
        if config.get("version") != VERSION:
            raise FormatError(
                f"quantization_config.version is {config.get('version')!r}, this quantkit reads {VERSION}; update it"
            )
        stored: dict[str, Stored] = {}
        try:
            for name, modules in config["types"].items():
                scheme = Scheme(spec_of(name))
                stored.update(dict.fromkeys(modules, Stored(scheme, codec_of(scheme))))
        except (KeyError, TypeError, AttributeError, SpecError) as error:
            raise FormatError(f"quantization_config.types is malformed: {error!r}") from error
        return stored.get
