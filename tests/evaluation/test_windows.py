"""Windows: every token is scored at most once, with the context that was asked for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.calibrate.data import Batch
from quantkit.errors import CalibrationError
from quantkit.evaluation.windows import Windows, cut_windows, from_batches

BOS = 999


def scored_places(windows: Windows) -> list[int]:
    """Places in the text of all scored tokens, where the text is 0, 1, 2, ..."""
    return windows.ids[windows.scored].tolist()


@given(n=st.integers(2, 60), length=st.integers(2, 12), stride=st.integers(1, 12), bos=st.booleans())
def test_overlapping_windows_score_every_token_once_with_enough_context(n, length, stride, bos):
    body = length - bos
    if stride > body or n < body:
        return
    windows = cut_windows(torch.arange(n), length=length, stride=stride, bos_id=BOS if bos else None)
    end = (len(windows) - 1) * stride + body
    unseen = [] if bos else [w * stride for w in range(len(windows)) if stride == body or w == 0]
    assert sorted(scored_places(windows)) == [t for t in range(end) if t not in unseen]
    assert n - end < stride, "the tail left out is shorter than one more window needs"
    for ids, scored in zip(windows.ids, windows.scored, strict=True):
        assert bool(ids[0] == BOS) == bos
        for position in scored.nonzero().flatten().tolist():
            context = position - bos
            assert context >= length - bos - stride or ids[int(bos)] == 0


def test_the_drawing_in_the_docstring():
    windows = cut_windows(torch.arange(8), length=4, stride=2)
    assert windows.ids.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
    assert windows.scored.int().tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_fewer_windows_are_spread_evenly_over_the_text():
    windows = cut_windows(torch.arange(100), length=10, count=3)
    assert windows.ids[:, 0].tolist() == [0, 40, 90]
    assert cut_windows(torch.arange(100), length=10, count=1).ids[:, 0].tolist() == [0]
    assert (windows.available, windows.tokens, windows.stride, windows.bos) == (10, 27, 10, False)
    assert len(cut_windows(torch.arange(100), length=10, count=30)) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "length=1"),
        ({"length": 8, "stride": 9}, "stride=9"),
        ({"length": 8, "stride": 0}, "stride=0"),
        ({"length": 8, "count": 0}, "windows=0"),
        ({"length": 40}, "needs 40.*smaller length"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options, message):
    with pytest.raises(CalibrationError, match=message):
        cut_windows(torch.arange(32), **options)


def test_batches_of_different_widths_score_only_real_tokens():
    ragged = Batch(torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool))
    windows = from_batches([ragged, Batch(torch.tensor([[1, 2, 3, 4]]))])
    assert windows.ids.shape == (3, 4)
    assert scored_places(windows) == [6, 7, 9, 2, 3, 4]


def test_nothing_to_score_is_refused():
    with pytest.raises(CalibrationError, match="no batches"):
        from_batches([])
    with pytest.raises(CalibrationError, match="no token is scored"):
        from_batches([Batch(torch.tensor([[5]]))])
    with pytest.raises(CalibrationError, match="position 0"):
        Windows(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(CalibrationError, match="int64"):
        Windows(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))


def test_the_fingerprint_knows_ids_and_scored_positions():
    windows = cut_windows(torch.arange(40), length=10)
    other = Windows(windows.ids, windows.scored.clone().index_fill_(1, torch.tensor([5]), False))
    assert windows.fingerprint() == cut_windows(torch.arange(40), length=10).fingerprint()
    assert len({windows.fingerprint(), other.fingerprint(), windows.first(2).fingerprint()}) == 3
