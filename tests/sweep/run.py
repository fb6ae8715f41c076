"""Run trials, each in a process of its own, and collect one record per architecture."""

import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LIMIT_S = 120
_MEMORY_BYTES = 12 << 30
Record = dict[str, Any]


def records(names: Iterable[str], limit_s: float = LIMIT_S) -> Iterator[Record]:
    """Yield what came of each name, in order; see :func:`tests.sweep.trial.trial`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.sweep.trial"])  # torch and transformers are imported once
    for name in names:
        started, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="sweep-"))
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(name, folder, sender))
        process.start()
        sender.close()
        record: Record = {"name": name}
        try:
            for found in _received(receiver, started + limit_s):
                record |= found
            process.join(max(0.0, started + limit_s - time.monotonic()))
            if process.is_alive():
                record["died"] = f"took longer than {limit_s} s"
            elif process.exitcode:
                record["died"] = f"exit code {process.exitcode}"
        finally:
            process.kill()
            process.join()
            shutil.rmtree(folder, ignore_errors=True)
        yield {**record, "seconds": round(time.monotonic() - started, 1)}


def _received(receiver: Connection, deadline: float) -> Iterator[Record]:
    while receiver.poll(max(0.0, deadline - time.monotonic())):
        try:
            yield json.loads(receiver.recv())
        except EOFError:
            return


def _child(name: str, folder: Path, sender: Connection) -> None:
    import logging
    import os
    import warnings

    import torch
    import transformers

    from tests.sweep.trial import trial

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # progress bars of libraries that know no other way to be silent
    os.dup2(nowhere, 2)
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    trial(name, folder, lambda found: sender.send(json.dumps(found, default=str)))
