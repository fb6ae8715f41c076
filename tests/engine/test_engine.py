"""The generation loop on a toy step whose answers can be worked out by hand."""

import pytest
import torch

from quantkit.engine.engine import decode_one_token, generate_ids, prefill, stream_ids
from quantkit.engine.sampling import Sampling
from quantkit.errors import QuantkitError

VOCAB = 10


class SumStep:
    """Predicts (sum of everything read) mod 10; records the shape and position of every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.total = 99  # rubbish until reset

    def reset(self) -> None:
        self.calls.clear()
        self.total = 0

    def __call__(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        assert position == sum(length for length, _ in self.calls)
        self.calls.append((ids.shape[1], position))
        self.total += int(ids.sum())
        return torch.nn.functional.one_hot(torch.tensor([self.total % VOCAB]), VOCAB).float() * 5


def follow(prompt: list[int], count: int) -> list[int]:
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(sum(sequence) % VOCAB)
    return sequence[len(prompt) :]


PROMPT = torch.tensor([1, 2, 4])


def test_prefill_and_decode_feed_positions():
    step = SumStep()
    step.reset()
    assert int(prefill(step, PROMPT).argmax()) == 7
    assert int(decode_one_token(step, torch.tensor([7]), 3).argmax()) == 4
    assert step.calls == [(3, 0), (1, 3)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 9])
def test_prefill_in_chunks_reads_the_same(chunk):
    step = SumStep()
    done = generate_ids(step, PROMPT, max_new_tokens=5, chunk=chunk)
    assert done.ids == follow([1, 2, 4], 5)
    assert max(length for length, _ in step.calls) == min(chunk, 3)


def test_generate_counts_calls_and_times():
    step = SumStep()
    done = generate_ids(step, PROMPT, max_new_tokens=6)
    assert done.ids == follow([1, 2, 4], 6)
    assert done.finish_reason == "length"
    assert step.calls == [(3, 0), (1, 3), (1, 4), (1, 5), (1, 6), (1, 7)]  # the last token is not read
    assert done.prefill_ms > 0
    assert len(done.token_ms) == 5
    assert all(ms > 0 for ms in done.token_ms)


def test_stop_token_is_kept_and_ends():
    answer = follow([1, 2, 4], 6)
    assert answer[2] not in answer[:2]
    done = generate_ids(SumStep(), PROMPT, max_new_tokens=6, stop_tokens=[answer[2]])
    assert (done.ids, done.finish_reason) == (answer[:3], "stop")


def test_stop_wins_over_length_on_the_last_token():
    answer = follow([1, 2, 4], 3)
    assert generate_ids(SumStep(), PROMPT, max_new_tokens=3, stop_tokens=answer[2:]).finish_reason == "stop"


def test_callback_sees_every_token_once_and_can_stop():
    seen: list[int] = []
    done = generate_ids(SumStep(), PROMPT, max_new_tokens=5, callback=seen.append)
    assert seen == done.ids
    done = generate_ids(SumStep(), PROMPT, max_new_tokens=5, callback=lambda token: True)
    assert (len(done.ids), done.finish_reason) == (1, "stop")


def test_stream_is_lazy_and_its_clock_stops_with_the_consumer():
    step = SumStep()
    stream = stream_ids(step, PROMPT, max_new_tokens=3)
    assert not step.calls
    assert (next(stream).id, len(step.calls)) == (7, 1)
    assert (next(stream).id, len(step.calls)) == (4, 2)
    last = next(stream)
    assert last.finish == "length"
    assert list(stream) == []


def test_interrupt_in_callback_leaves_the_step_usable():
    step = SumStep()

    def interrupt(token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_ids(step, PROMPT, max_new_tokens=5, callback=interrupt)
    assert generate_ids(step, PROMPT, max_new_tokens=5).ids == follow([1, 2, 4], 5)


def test_seed_repeats_and_repetition_penalty_sees_the_answer():
    hot = Sampling(20.0, seed=1)
    first = generate_ids(SumStep(), PROMPT, max_new_tokens=30, sampling=hot)
    assert first.ids == generate_ids(SumStep(), PROMPT, max_new_tokens=30, sampling=hot).ids
    assert first.ids != generate_ids(SumStep(), PROMPT, max_new_tokens=30, sampling=Sampling(20.0, seed=2)).ids
    five = torch.tensor([5])  # 5, 10 -> 0, 0, ...: without a penalty the 0 repeats for ever
    logits = generate_ids(SumStep(), five, max_new_tokens=4).ids
    assert logits == [5, 0, 0, 0]
    never_again = generate_ids(SumStep(), five, max_new_tokens=4, sampling=Sampling(repetition_penalty=1e9)).ids
    assert never_again[0] == 5  # a penalty on a positive logit shrinks it but 5 / 1e9 is still above 0


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (torch.tensor([], dtype=torch.int64), {}, "at least one token"),
        (torch.tensor([[1]]), {}, r"want int64 \(T,\)"),
        (torch.tensor([1.0]), {}, "float32"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens=0"),
        (PROMPT, {"chunk": 0}, "chunk=0"),
    ],
)
def test_bad_requests_fail_before_the_model_runs(prompt, options, message):
    step = SumStep()
    with pytest.raises(QuantkitError, match=message):
        stream_ids(step, prompt, **{"max_new_tokens": 2, **options})
    assert not step.calls
