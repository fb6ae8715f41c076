"""Fixtures that several test files share, and what tests that run in parallel (``pytest -n auto``) share beside them."""

import fcntl
import os
import signal
import sys
from pathlib import Path

import pytest

IN_PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
if IN_PARALLEL:  # before torch is imported: workers that all use every core hinder each other
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(share, 1)))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so begins what a shell starts with "&"; programs under test inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give each worker its share of the files, and who is done first a part of the others': shared fixtures are made once."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(config, items):
    """Leave the sweep out unless it is asked for, and begin with what takes a minute: at the end of a parallel run there is
    little left that one worker could wait for."""
    if "sweep" not in (config.option.markexpr or ""):
        left_out = [item for item in items if item.get_closest_marker("sweep")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("sweep")]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(tmp_path_factory):
    """Let one worker compile a library, and the others wait for it."""
    if not IN_PARALLEL:
        yield
        return
    from quantkit.kernels import build

    find_or_make = build.find_or_make

    def one_at_a_time(path, make):
        with (tmp_path_factory.getbasetemp().parent / f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            find_or_make(path, make)

    build.find_or_make = one_at_a_time
    yield
    build.find_or_make = find_or_make


@pytest.fixture(scope="session", autouse=True)
def exact_unless_asked_for():
    """Let ``compute="auto"`` multiply exactly: tests compare what was loaded with what was saved, to the last bit.

    Yields:
        The share below which activations are rounded where no test runs.
    """
    from quantkit.checkpoint import activations

    share, activations.SHARE = activations.SHARE, 0.0
    yield share
    activations.SHARE = share


@pytest.fixture(autouse=True)
def _console_of_its_own():
    """Let a test make its own console, as a process does: one that another test has made has the width of its output."""
    if (module := sys.modules.get("quantkit.cli.console")) is not None:
        module.console.cache_clear()


@pytest.fixture(scope="session")
def tiny_float(tmp_path_factory) -> Path:
    """A directory with a tiny float llama and its tokenizer, as transformers writes it."""
    from tests import tiny

    path = tmp_path_factory.mktemp("float")
    tiny.tiny_llama(tie_word_embeddings=True, max_position_embeddings=512).save_pretrained(path)
    tiny.tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> Path:
    """A text file that the tiny tokenizer knows."""
    from tests import tiny

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.TEXT * 4)
    return path


@pytest.fixture(scope="session")
def tiny_quantized(tiny_float, tmp_path_factory) -> Path:
    """A compressed-tensors checkpoint of the tiny model, 4 bits, rounded to nearest."""
    from quantkit.pipeline.quantize import quantize

    path = tmp_path_factory.mktemp("quantized") / "w4"
    quantize(tiny_float, "w4a16", method="rtn", out=path)
    return path


@pytest.fixture(scope="session")
def first_blocks(tmp_path_factory):
    """The real model up to its second block: real weights, tokenizer and text at a fraction of the time."""
    from quantkit.checkpoint.open import open_model

    path = tmp_path_factory.mktemp("real") / "model"
    model, tokenizer = open_model("demo")
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    model.config.layer_types = getattr(model.config, "layer_types", None) and model.config.layer_types[:2]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
