"""Fixtures that several test files share: a float directory and a quantized checkpoint of one tiny model."""

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def tiny_float(tmp_path_factory) -> Path:
    """A directory with a tiny float llama and its tokenizer, as transformers writes it."""
    path = tmp_path_factory.mktemp("float")
    tiny.tiny_llama(tie_word_embeddings=True, max_position_embeddings=512).save_pretrained(path)
    tiny.tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> Path:
    """A text file that the tiny tokenizer knows."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.TEXT * 4)
    return path


@pytest.fixture(scope="session")
def tiny_quantized(tiny_float, tmp_path_factory) -> Path:
    """A compressed-tensors checkpoint of the tiny model, 4 bits, rounded to nearest."""
    from quantkit.pipeline.quantize import quantize

    path = tmp_path_factory.mktemp("quantized") / "w4"
    quantize(tiny_float, "w4a16", out=path, method="rtn")
    return path
