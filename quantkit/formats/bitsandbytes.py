"""``bitsandbytes``: NF4 and int8 checkpoints that transformers has saved with it; they are only read."""

from quantkit.formats.base import FORMATS, Format
from quantkit.formats.codecs.bitsandbytes import Int8
from quantkit.formats.containers.directory import SafetensorsDirectory
from quantkit.formats.dialects.bitsandbytes import BitsAndBytes

FORMATS.register("bitsandbytes")(Format(lambda scheme: Int8(), SafetensorsDirectory("model"), BitsAndBytes()))
