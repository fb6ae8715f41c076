"""``gguf``: one file that llama.cpp, Ollama and LM Studio read, beside the config and tokenizer that everything else reads.

- :mod:`.file` is the container's file: the header of any GGUF file, and a writer;
- :mod:`.architectures` knows which models llama.cpp runs the way transformers does: names, turned rows, hyper-parameters;
- :mod:`.tokenizer` writes the vocabulary;
- :mod:`.mixes` are llama.cpp's own choices of a type for every tensor, ``Q4_K_M`` and its like;
- :mod:`.container`, :mod:`.codec`, :mod:`.dialect` are the format's three parts.
"""

from quantkit.formats.base import FORMATS, Format
from quantkit.formats.gguf.architectures import refuse_model
from quantkit.formats.gguf.codec import codec_of
from quantkit.formats.gguf.container import GgufFile
from quantkit.formats.gguf.dialect import Gguf

FORMATS.register("gguf")(Format(codec_of, GgufFile(), Gguf(), blocks=True, floats=True, refuses=refuse_model))
