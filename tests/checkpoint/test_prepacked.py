"""The cache of prepacked weights: the same model out of it, and never another one than the checkpoint's."""

import contextlib
import logging
import os
import shutil
import time

import pytest
import torch
from typer.testing import CliRunner

from quantkit import checkpoint
from quantkit.checkpoint import prepacked
from quantkit.cli import app
from quantkit.kernels.cpu import huge_pages, layout
from quantkit.nn.linear import QuantLinear
from quantkit.spec import QuantSpec
from quantkit.system import files
from tests.checkpoint.test_checkpoint import W4_ASYM, logits, round_to_nearest
from tests.tiny import FAMILIES, tiny_llama

SPECS = {
    "w4-asym": W4_ASYM,
    "w3-channel": QuantSpec("int3", (1, -1), scale_dtype="float32"),
    "w8-asym": QuantSpec("int8", (1, 32), symmetric=False, scale_dtype="float32"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, that takes checkpoints of any size."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prepacked, "WORTH_BYTES", 0)
    monkeypatch.setattr(files, "_SETTLED_NS", -(10**12))  # digests are remembered at once


def save(tmp_path, model=None, spec=W4_ASYM, name="model"):
    model = tiny_llama() if model is None else model
    round_to_nearest(model, spec)
    return model, checkpoint.save(model, tmp_path / name, format="native")


def forbid_prepacking(monkeypatch):
    def prepack(qtensor):
        raise AssertionError("made again")

    monkeypatch.setattr(layout, "prepack", prepack)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mixtral", "gpt2"])
def test_a_cached_load_is_the_checkpoint(family, tmp_path, monkeypatch):
    model, path = save(tmp_path, FAMILIES[family]())
    want = logits(model)
    plain, first = checkpoint.load(path, cache=False), checkpoint.load(path)
    assert len(prepacked.files()) == 1
    forbid_prepacking(monkeypatch)
    second = checkpoint.load(path)
    for loaded in (plain, first, second):
        assert torch.equal(logits(loaded), want)
        held, state = model.state_dict(), loaded.state_dict()
        assert held.keys() == state.keys()
        for name, tensor in held.items():
            assert tensor.dtype == state[name].dtype, name
            assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_every_grid_comes_back(spec, tmp_path):
    model, path = save(tmp_path, spec=spec)
    checkpoint.load(path)
    loaded = checkpoint.load(path)
    for module, own in zip(model.modules(), loaded.modules(), strict=True):
        if isinstance(module, QuantLinear):
            assert torch.equal(module.qtensor.packed, own.qtensor.packed)
            assert torch.equal(module.qtensor.scale, own.qtensor.scale)


@pytest.mark.parametrize(
    "spec",
    [QuantSpec("nf4", (1, 32), scale_dtype="float32"), QuantSpec("fp4_e2m1", (1, 32), scale_dtype="float8_e8m0fnu")],
    ids=str,
)
def test_tables_and_narrow_scales_are_kept_too(tmp_path, spec):
    model, path = save(tmp_path, spec=spec)
    wanted = logits(model)
    for _ in range(2):
        assert torch.equal(logits(checkpoint.load(path)), wanted)
    assert len(prepacked.files()) == 1


def test_a_changed_checkpoint_is_never_served_stale(tmp_path):
    _, path = save(tmp_path)
    checkpoint.load(path)
    other = tiny_llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    _, elsewhere = save(tmp_path, other, name="other")
    for file in path.glob("*.safetensors"):  # the same names, sizes and times; other content
        times = file.stat()
        shutil.copyfile(elsewhere / file.name, file)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert torch.equal(logits(checkpoint.load(path)), logits(other))
    assert len(prepacked.files()) == 2


def test_the_key_knows_config_and_dtype(tmp_path):
    _, path = save(tmp_path)
    checkpoint.load(path)
    assert checkpoint.load(path, dtype=torch.bfloat16).model.norm.weight.dtype == torch.bfloat16
    config = path / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    checkpoint.load(path)
    assert len(prepacked.files()) == 3


@pytest.mark.parametrize("damage", ["a byte", "the end", "everything"])
def test_a_damaged_file_is_refused_and_made_again(damage, tmp_path, caplog):
    model, path = save(tmp_path)
    checkpoint.load(path)
    (file,) = prepacked.files()
    checkpoint.load(path)  # its digest is remembered now
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes({"a byte": bytes(content), "the end": content[:-100], "everything": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(checkpoint.load(path)), logits(model))
    assert "damaged" in caplog.text
    (again,) = prepacked.files()
    assert again.name == file.name
    assert again.stat().st_size == len(content)


def test_the_switch_keeps_away_from_the_disk(tmp_path, monkeypatch):
    model, path = save(tmp_path)
    monkeypatch.setattr(prepacked, "find", None)
    monkeypatch.setattr(prepacked, "write", None)
    assert torch.equal(logits(checkpoint.load(path, cache=False)), logits(model))
    assert not prepacked.directory().exists()


def test_the_command_turns_it_off_for_good_and_clears_it(tmp_path):
    _, path = save(tmp_path)
    checkpoint.load(path)
    run = CliRunner()
    assert "off, 1 files" in run.invoke(app, ["cache", "--off"]).output
    checkpoint.load(path, dtype=torch.bfloat16)
    assert len(prepacked.files()) == 1
    assert "off, 0 files" in run.invoke(app, ["cache", "--clear"]).output
    run.invoke(app, ["cache", "--on"])
    checkpoint.load(path)
    assert len(prepacked.files()) == 1


def test_a_cache_that_cannot_be_written_is_said_and_not_needed(tmp_path, monkeypatch, caplog):
    model, path = save(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(checkpoint.load(path)), logits(model))
    assert "cannot keep" in caplog.text


def test_loaded_weights_belong_to_the_process(tmp_path):
    _, path = save(tmp_path)
    first = checkpoint.load(path)
    before = first.model.norm.weight.clone()
    with torch.no_grad():
        first.model.norm.weight.add_(1)
    second = checkpoint.load(path)
    assert torch.equal(second.model.norm.weight, before)
    want = logits(second)
    shutil.rmtree(path)
    assert prepacked.clear() > 0
    assert not prepacked.files()
    assert torch.equal(logits(second), want)


def test_the_oldest_files_make_room(tmp_path, monkeypatch):
    _, path = save(tmp_path)
    checkpoint.load(path)
    (old,) = prepacked.files()
    os.utime(old, (0, 0))
    monkeypatch.setattr(prepacked, "LIMIT_BYTES", int(1.5 * old.stat().st_size))
    checkpoint.load(path, dtype=torch.bfloat16)
    (new,) = prepacked.files()
    assert new.name != old.name


def test_a_digest_is_remembered_only_for_a_settled_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SETTLED_NS", 10**10)
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    assert files.known_sha256(file) == files.sha256_file(file)
    monkeypatch.setattr(files, "sha256_file", lambda path: "read again")
    assert files.known_sha256(file) == "read again"  # too young to trust its times
    later = time.time_ns() + 10**11
    monkeypatch.setattr(files.time, "time_ns", lambda: later)
    assert files.known_sha256(file) == "read again"
    monkeypatch.setattr(files, "sha256_file", lambda path: "and again")
    assert files.known_sha256(file) == "read again"  # remembered
    file.write_bytes(b"two")
    assert files.known_sha256(file) == "and again"


def test_an_arena_keeps_tensors_apart_and_aligned():
    place = huge_pages.Arena()
    given = [torch.randn(3, 5), torch.arange(7, dtype=torch.uint8), torch.randn(huge_pages.CHUNK_BYTES // 4), torch.ones(2)]
    kept = [place.copy(tensor) for tensor in given]
    del place
    for tensor, copy in zip(given, kept, strict=True):
        assert torch.equal(tensor, copy)
        assert copy.data_ptr() % huge_pages.ALIGNMENT == 0
    kept[0].zero_()
    assert torch.equal(kept[1], given[1])


@pytest.mark.parametrize("rows", [5, 4096, 2 * 4096 + 21])
def test_a_float_weight_is_laid_out_piece_by_piece(rows):
    weight = torch.randn(rows, 12)
    place = huge_pages.Arena()
    for dtype in (torch.float32, torch.bfloat16):
        for empty in (None, place.empty):
            found = layout.prepack_float(weight.to(dtype), empty)
            assert torch.equal(layout.dequantize(*found), weight.to(dtype).float())


def test_two_at_once_do_not_take_each_others_file(tmp_path, monkeypatch, caplog):
    """Another process writes the same between two steps of this one: both have their file in the end, and nobody complains."""
    model, path = save(tmp_path)
    checkpoint.load(path)
    (file,) = prepacked.files()
    key, content = file.name.partition("-")[0], file.read_bytes()
    found = prepacked.find(key)
    prepacked.clear()

    @contextlib.contextmanager
    def followed_by_another(target):
        with files.atomic_path(target) as temporary:
            yield temporary
        monkeypatch.setattr(prepacked, "atomic_path", files.atomic_path)
        prepacked.write(key, found.sites.items(), found.floats.items())

    monkeypatch.setattr(prepacked, "atomic_path", followed_by_another)
    with caplog.at_level(logging.WARNING):
        prepacked.write(key, found.sites.items(), found.floats.items())
    assert file.read_bytes() == content
    assert [one.name for one in prepacked.directory().iterdir()] == [file.name]
    assert torch.equal(logits(checkpoint.load(path)), logits(model))
    assert not caplog.text


def test_what_killed_processes_left_is_counted_and_goes_when_it_is_old(tmp_path):
    _, path = save(tmp_path)
    prepacked.directory().mkdir(parents=True)
    young, old = prepacked.directory() / ".young.tmp", prepacked.directory() / ".old.tmp"
    for left in (young, old):
        left.write_bytes(bytes(3 << 20))
    os.utime(old, (0, 0))
    assert "0 files, 6.3 MB" in prepacked.describe()
    checkpoint.load(path)
    assert young.exists()
    assert not old.exists()
    assert prepacked.clear() > 3 << 20


def test_what_would_fill_the_whole_cache_is_not_kept(tmp_path, monkeypatch, caplog):
    model, path = save(tmp_path)
    size = sum(one.stat().st_size for one in path.glob("*.safetensors"))
    monkeypatch.setattr(prepacked, "LIMIT_BYTES", size - 1)
    monkeypatch.setattr(prepacked, "write", None)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(checkpoint.load(path)), logits(model))
    assert not caplog.text
