"""Threads of a server do not wait long for each other."""

import gc
import sys

from quantkit.system.turns import TURN_S, short_turns


def test_what_was_there_before_is_left_out_of_collections_and_back_in_afterwards():
    kept = [[] for _ in range(1000)]
    before, frozen = sys.getswitchinterval(), gc.get_freeze_count()
    with short_turns():
        assert gc.get_freeze_count() >= frozen + len(kept)
        assert len(gc.get_objects()) < len(kept)
        assert sys.getswitchinterval() == TURN_S < before
    assert sys.getswitchinterval() == before
    assert gc.get_freeze_count() == 0
