"""Texts, windows, masks and fingerprints."""

import importlib
import logging
import subprocess
import sys
from types import SimpleNamespace

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.calibrate.data import Batch, fingerprint, from_ids, token_batches
from quantkit.calibrate.texts import encoder, load_texts, text_default
from quantkit.errors import CalibrationError
from tests.tiny import TEXT, tiny_tokenizer


def spell(text: str) -> list[int]:
    return [ord(letter) for letter in text]


# the text every Python carries


def test_default_text_is_large_and_split():
    calibration, evaluation = text_default()
    assert sum(map(len, calibration)) > 230_000
    assert sum(map(len, evaluation)) > 80_000
    assert all(text.strip() and "\n***" not in text and "\n===" not in text for text in calibration + evaluation)
    assert (calibration, evaluation) == text_default()


def test_default_halves_share_no_paragraph_and_hardly_a_phrase():
    calibration, evaluation = text_default()
    paragraphs = [[" ".join(p.split()) for text in half for p in text.split("\n\n")] for half in (calibration, evaluation)]
    assert not set(paragraphs[0]) & set(paragraphs[1])
    assert all(len(half) == len(set(half)) for half in paragraphs)
    phrases = [
        {tuple(words[i : i + 12]) for text in half for words in [text.split()] for i in range(len(words) - 11)}
        for half in (calibration, evaluation)
    ]
    assert len(phrases[0] & phrases[1]) < 0.003 * len(phrases[1])


def test_default_split_depends_on_the_topic_name_alone(monkeypatch):
    topics = importlib.import_module("pydoc_data.topics").topics
    before = text_default()
    names = sorted(topics)
    monkeypatch.setattr("pydoc_data.topics.topics", {name: f"All about {name}." for name in names})
    halves = [{text.removeprefix("All about ").removesuffix(".\n") for text in half} for half in text_default()]
    assert halves[0] | halves[1] == set(names)
    assert {"compound", "types"} <= halves[0]  # fixed for ever: moving a topic would leak evaluation text
    assert {"typesseq", "formatstrings"} <= halves[1]
    assert any("with_item" in text for text in before[0])


@pytest.mark.parametrize("lacks", ["module", "table"])
def test_a_python_without_the_topics_says_so(monkeypatch, lacks):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None if lacks == "module" else SimpleNamespace())
    with pytest.raises(CalibrationError, match=r"no pydoc_data\.topics.*name a text file"):
        text_default()


# texts of the user


def test_load_list_file_and_sorted_folder(tmp_path):
    assert load_texts(["a", " ", "b"]) == ["a", "b"]
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("zed é", encoding="utf-8")
    (tmp_path / "skip.bin").write_bytes(b"\xff\xff")
    assert load_texts(tmp_path / "b.txt") == ["bee"]
    assert load_texts(str(tmp_path)) == ["zed é", "bee"]


def test_load_errors_name_the_place(tmp_path):
    with pytest.raises(CalibrationError, match=r"nowhere\.txt: no such file"):
        load_texts(str(tmp_path / "nowhere.txt"))
    with pytest.raises(CalibrationError, match="no such file or folder"):
        load_texts(tmp_path / "nowhere")
    with pytest.raises(CalibrationError, match=r"no \.txt, \.md, \.rst, \.jsonl, .* file in this folder"):
        load_texts(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"good \xff bad")
    with pytest.raises(CalibrationError, match=r"bad\.txt: not UTF-8 text \(byte 5 is 0xff\)"):
        load_texts(tmp_path)
    (tmp_path / "bad.txt").write_text(" \n")
    with pytest.raises(CalibrationError, match=r"bad\.txt: there is no text in it"):
        load_texts(tmp_path / "bad.txt")
    with pytest.raises(CalibrationError, match="list of texts: there is no text"):
        load_texts([])
    with pytest.raises(CalibrationError, match="use from_ids"):
        load_texts([[1, 2]])
    with pytest.raises(CalibrationError, match="looks like text itself"):
        load_texts("The first line.\nThe second.")
    with pytest.raises(CalibrationError, match="looks like text itself"):
        load_texts("x " * 3000)


def test_dataset_names(monkeypatch):
    rows = {"text": ["one", "", None, "two"], "label": [0, 1, 2, 3], "title": ["a", "b", "c", "d"]}
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_texts("corpus") == ["one", "two"]
    assert load_texts("org/corpus:raw:test[:10]:title") == ["a", "b", "c", "d"]
    assert load_texts("org/corpus::validation") == ["one", "two"]
    assert asked == [("corpus", None, "train"), ("org/corpus", "raw", "test[:10]"), ("org/corpus", None, "validation")]
    with pytest.raises(CalibrationError, match="no column of text 'label'; known: text, title"):
        load_texts("corpus:::label")
    del rows["text"]
    assert load_texts("corpus") == ["a", "b", "c", "d"]
    rows["body"] = rows["title"]
    with pytest.raises(CalibrationError, match="which column is the text is not clear"):
        load_texts("corpus")


def test_dataset_out_of_reach_or_not_installed(monkeypatch):
    def unreachable(name, config, split):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        CalibrationError, match=r"neither a file nor a folder, and the dataset 'corpus'.*ConnectionError: no route"
    ):
        load_texts("corpus")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="pip install datasets"):
        load_texts("corpus")


def test_heavy_libraries_are_imported_only_when_asked_for():
    code = "import sys, quantkit.calibrate.data, quantkit.engine.engine; print({'datasets', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# windows


def test_packed_windows_do_not_overlap_and_spread_over_the_stream():
    texts = ["abcdefghij", "klmnop", "qrstuvwxyz"]
    batches = token_batches(texts, spell, samples=None, length=4, batch_size=4)
    rows = ["".join(map(chr, row)) for batch in batches for row in batch.rows()]
    assert rows == ["abcd", "efgh", "ijkl", "mnop", "qrst", "uvwx"]
    assert [tuple(batch.ids.shape) for batch in batches] == [(4, 4), (2, 4)]
    assert all(batch.mask is None for batch in batches)
    assert sum(batch.tokens for batch in batches) == 24
    three = token_batches(texts, spell, samples=3, length=4)
    assert ["".join(map(chr, row)) for row in three[0].rows()] == ["abcd", "ijkl", "qrst"]


@settings(max_examples=60, deadline=None)
@given(
    available=st.integers(1, 40),
    samples=st.integers(1, 40),
    length=st.integers(2, 6),
    batch_size=st.integers(1, 9),
)
def test_any_cut_keeps_its_promises(available, samples, length, batch_size):
    text = "".join(chr(100 + i) for i in range(available * length))
    options = {"samples": samples, "length": length, "batch_size": batch_size}
    if samples > available:
        with pytest.raises(CalibrationError, match=f"samples={available}"):
            token_batches([text], spell, **options)
        return
    rows = [row.tolist() for batch in token_batches([text], spell, **options) for row in batch.rows()]
    assert len(rows) == samples
    assert all(len(row) == length for row in rows)
    content = [token for row in rows for token in row]
    assert len(set(content)) == len(content)
    assert content == sorted(content)
    assert (content[0] - 100) % length == 0


def test_ragged_rows_are_padded_on_the_right_and_masked():
    batches = token_batches(["abcdef", "", "xy", "pqr"], spell, samples=3, length=4, mode="ragged", batch_size=2)
    assert batches[0].ids.tolist() == [[97, 98, 99, 100], [120, 121, 0, 0]]
    assert batches[0].mask is not None
    assert batches[0].mask.tolist() == [[True] * 4, [True] * 2 + [False] * 2]
    assert batches[1].mask is None
    assert [batch.tokens for batch in batches] == [6, 3]


def test_too_little_text_says_how_much_and_the_way_out(caplog):
    with pytest.raises(
        CalibrationError, match=r"5 windows of 4 tokens need 20 tokens, the 2 text\(s\) have 14.*samples=3.*length=2"
    ):
        token_batches(["abcdefg", "hijklmn"], spell, samples=5, length=4)
    with pytest.raises(CalibrationError, match=r"have 3.*no whole window fits.*length=3"):
        token_batches(["abc"], spell, samples=1, length=4)
    with pytest.raises(CalibrationError, match=r"have 0.*no length is short enough"):
        token_batches([], spell, samples=None, length=4)
    with pytest.raises(CalibrationError, match="3 rows need 3 texts with tokens, there are 1 among 2"):
        token_batches(["abc", ""], spell, samples=3, length=4, mode="ragged")
    with caplog.at_level(logging.WARNING):
        few = token_batches(["abcdefg", "hijklmn"], spell, samples=5, length=4, shortfall="warn")
    assert sum(len(batch.ids) for batch in few) == 3
    assert "have 14" in caplog.text
    assert "going on with the 3 there are" in caplog.text
    with pytest.raises(CalibrationError, match="no whole window"):
        token_batches(["abc"], spell, samples=1, length=4, shortfall="warn")


@pytest.mark.parametrize(
    "options",
    [
        {"samples": 0},
        {"length": 0},
        {"mode": "loose"},
        {"batch_size": 0},
        {"shortfall": "no"},
    ],
)
def test_arguments_out_of_range_are_named(options):
    with pytest.raises(CalibrationError, match=f"{next(iter(options))}=.*want"):
        token_batches(["abcdefgh"], spell, **options)


def test_encoder_of_a_tokenizer_adds_nothing():
    tokenizer = tiny_tokenizer()
    batch = token_batches([TEXT], encoder(tokenizer), samples=2, length=16)[0]
    assert tokenizer.bos_token_id not in batch.ids
    assert tokenizer.decode(batch.ids[0]) in TEXT


# batches


def test_batch_refuses_what_a_collector_could_not_read():
    ids = torch.ones(2, 3, dtype=torch.int64)
    for bad in (ids[0], ids.int(), ids[:0]):
        with pytest.raises(CalibrationError, match="batch ids"):
            Batch(bad)
    for bad in (torch.ones(2, 3), torch.ones(2, 2, dtype=torch.bool)):
        with pytest.raises(CalibrationError, match="batch mask"):
            Batch(ids, bad)
    for row in ([False, True, True], [True, False, True], [False, False, False]):
        with pytest.raises(CalibrationError, match="must begin with real tokens"):
            Batch(ids, torch.tensor([[True, True, True], row]))


def test_from_ids_takes_lists_and_tensors_and_names_bad_rows():
    (batch,) = from_ids([[1, 2, 3], torch.tensor([4], dtype=torch.int32)], pad_id=9)
    assert batch.ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch.tokens == 4
    assert from_ids(torch.arange(6).view(3, 2))[0].mask is None
    with pytest.raises(CalibrationError, match="no row"):
        from_ids([])
    for bad in ([], [1.5], [[1]]):
        with pytest.raises(CalibrationError, match="row 1"):
            from_ids([[1], bad])


def test_fingerprint_sees_tokens_and_row_borders_but_not_batching_or_padding():
    rows = [[1, 2, 3], [4, 5], [6]]
    one = fingerprint(from_ids(rows))
    assert one == fingerprint(from_ids(rows, batch_size=1)) == fingerprint(from_ids(rows, batch_size=2, pad_id=8))
    others = [[[1, 2, 3], [4, 5], [7]], [[1, 2], [3, 4, 5], [6]], [[4, 5], [1, 2, 3], [6]], [[1, 2, 3, 4, 5, 6]], rows[:2]]
    assert len({one, *(fingerprint(from_ids(other)) for other in others)}) == 6
    assert one == "95549cab7b167da9583f3385081fbc1895f65982b4c12a708251f8b6e70bfecc"  # resume compares it with a file
