"""Traces and what is measured on them, with a clock that the test turns."""

import itertools

import pytest

from quantkit.engine.request import Limits
from quantkit.errors import QuantkitError
from quantkit.evaluation.trace import Arrival, poisson_trace, read_lengths, serve_trace
from quantkit.generation.engine import Engine
from tests.tiny import VOCAB, tiny_llama


class Clock:
    """Time passes when the engine steps (a second each) or somebody sleeps."""

    def __init__(self, engine) -> None:
        self.now = 100.0
        step = engine.step

        def slow_step():
            self.now += 1
            return step()

        engine.step = slow_step

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def engine_of(**limits) -> Engine:
    return Engine(tiny_llama(), limits=Limits(**{"running": 2, "kv_tokens": 512, **limits}))


def test_what_users_feel_is_measured_on_their_own_time():
    engine = engine_of()
    clock = Clock(engine)
    trace = [Arrival(0.0, [1, 2], 3), Arrival(1.5, [3], 2), Arrival(10.0, [4], 1)]
    served = serve_trace(engine, trace, clock=clock, sleep=clock.sleep)
    # steps end at 1, 2, 3 | the second arrival is seen at 2 and answered at 3, 4 | the third at 11
    assert served.seconds == pytest.approx(11.0)
    assert (served.requests, served.prompt_tokens, served.new_tokens, served.steps) == (3, 4, 6, 5)
    assert served.first_token_ms.median == pytest.approx(1000)
    assert served.first_token_ms.p99 == pytest.approx(1490)
    assert served.token_ms.median == pytest.approx(1000)
    assert served.answer_s.median == pytest.approx(2.5)
    assert served.tokens_per_s == pytest.approx(6 / 11)
    assert served.cost_per_million_tokens(0.6) == pytest.approx(0.6 / 3600 * 11 / 6 * 1e6)


def test_continuous_batching_needs_fewer_steps_than_static_on_the_issues_trace():
    trace = poisson_trace(64, prompt_tokens=(4, 12), new_tokens=(4, 60), vocabulary=VOCAB, seed=1)
    rows, steps = {}, {}
    for name, batching in (("padded", "static"), ("static", "static"), ("continuous", "continuous")):
        model = tiny_llama(num_hidden_layers=1)
        engine = Engine(model, limits=Limits(running=8, kv_tokens=4096, batching=batching))
        served = serve_trace(engine, trace, padded=name == "padded")
        assert served.new_tokens == sum(arrival.new_tokens for arrival in trace)
        rows[name], steps[name] = engine.stats["rows"], served.steps
    assert steps["continuous"] < 0.6 * steps["padded"]
    assert steps["padded"] == steps["static"]
    assert rows["continuous"] == pytest.approx(rows["static"], rel=0.01)  # shared prefixes differ
    assert rows["static"] < 0.7 * rows["padded"]


def test_a_trace_is_a_poisson_process_and_repeats():
    trace = poisson_trace(4000, rate_per_s=8.0, prompt_tokens=(1, 5), new_tokens=(2, 3), vocabulary=10, even=True, seed=3)
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(trace)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 8, rel=0.08)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)
    assert {len(arrival.prompt) for arrival in trace} == {1, 2, 3, 4, 5}
    assert {arrival.new_tokens for arrival in trace} == {2, 3}
    assert trace == poisson_trace(
        4000, rate_per_s=8.0, prompt_tokens=(1, 5), new_tokens=(2, 3), vocabulary=10, even=True, seed=3
    )
    skewed = [a.new_tokens for a in poisson_trace(2000, new_tokens=(20, 300), vocabulary=10)]
    assert (min(skewed), max(skewed)) == (20, 300)
    assert sorted(skewed)[1000] == pytest.approx((20 * 300) ** 0.5, rel=0.1)
    assert {a.at_s for a in poisson_trace(5, vocabulary=10)} == {0.0}


def test_lengths_from_a_file(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("# prompt, new\n12, 40\n\n3 7  # short\n")
    assert read_lengths(path) == [(12, 40), (3, 7)]
    trace = poisson_trace(3, lengths=read_lengths(path), vocabulary=9)
    assert [(len(a.prompt), a.new_tokens) for a in trace] == [(12, 40), (3, 7), (12, 40)]
    path.write_text("12, 40\n5\n")
    with pytest.raises(QuantkitError, match="line 2: '5'; want two positive numbers"):
        read_lengths(path)
    path.write_text("\n")
    with pytest.raises(QuantkitError, match="no lengths"):
        read_lengths(path)
    with pytest.raises(QuantkitError, match="No such file"):
        read_lengths(tmp_path / "none")
    with pytest.raises(QuantkitError, match="want positive numbers"):
        poisson_trace(3, new_tokens=(0, 4), vocabulary=9)
