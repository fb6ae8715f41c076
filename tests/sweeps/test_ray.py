"""Rows as tasks of a local Ray cluster with two workers. Skipped where the extra ``ray`` is not installed."""

import secrets

import pytest

import quantkit
from quantkit.sweeps import cluster
from tests.sweeps.test_sweep_rows import SCHEMES, Deadly, sweep, table

ray = pytest.importorskip("ray", reason="the extra ray is not installed")


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    token = tmp_path_factory.mktemp("ray") / "token"  # Ray would make one in the home directory
    token.write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def test_a_cluster_makes_the_same_files_and_a_worker_that_dies_loses_its_row_alone(two_workers, tiny_float, tmp_path):
    alone = sweep(tiny_float, tmp_path / "alone", SCHEMES[:1], ["rtn", "gptq"])
    events = []
    found = sweep(tiny_float, tmp_path / "ray", SCHEMES[:1], ["rtn", "gptq", Deadly()], ray=True, progress=events.append)
    assert table(found)[:3] == table(alone)
    assert [path.name for path in sorted((tmp_path / "alone" / "rows").iterdir())] == sorted(
        path.name for path in (tmp_path / "ray" / "rows").iterdir() if "deadly" not in path.name
    )
    assert found.rows[3].status == "failed"
    assert found.rows[3].reason.startswith("WorkerCrashedError: "), found.rows[3].reason
    assert sorted(event.detail for event in events if event.stage == "sweep")[1:3] == [
        "row 1 of 4: float",
        "row 2 of 4: w4a16-asym-g32 rtn",
    ]
    again = sweep(tiny_float, tmp_path / "ray", SCHEMES[:1], ["rtn", "gptq"], ray={"num_cpus": 2})
    assert table(again) == table(alone)
    assert not cluster._opened, "only workers open what they are sent"


def test_names_are_sent_not_models(tmp_path, tiny_float):
    with pytest.raises(quantkit.SpecError, match="ray with a loaded model"):
        sweep(quantkit.open_model(tiny_float)[0], tmp_path, ray=True)
