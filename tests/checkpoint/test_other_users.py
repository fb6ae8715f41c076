"""Unfinished files of another user: refused, and left as they are."""

import os
from pathlib import Path

import pytest

import quantkit
from quantkit.checkpoint import INCOMPLETE
from quantkit.errors import FormatError
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("names", [[INCOMPLETE], [INCOMPLETE, "notes.txt"], ["model.safetensors"], []])
def test_unfinished_files_of_another_user_stay(tmp_path: Path, names: list[str]) -> None:
    stage = tmp_path / "out" / "incomplete"
    stage.mkdir(parents=True)
    for name in names:
        (stage / name).write_text("{}")
    os.chown(stage, 12345, 12345)
    with pytest.raises(FormatError, match=r"incomplete belongs to another user \(12345"):
        quantkit.quantize(tiny_llama(), "w8a16", method="rtn", tokenizer=tiny_tokenizer(), out=tmp_path / "out")
    assert sorted(file.name for file in stage.iterdir()) == sorted(names)
