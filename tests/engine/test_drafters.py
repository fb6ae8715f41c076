"""What drafters guess, and how many guesses they are asked for."""

import random
from collections.abc import Sequence

import pytest

from quantkit.engine.drafters import DRAFTERS, DrafterContext, DraftRequest
from quantkit.engine.drafters.length import DraftCosts, DraftLength
from quantkit.engine.drafters.model import ModelDrafter
from quantkit.engine.drafters.ngram import NgramDrafter
from quantkit.engine.sampling import Sampling
from quantkit.errors import QuantkitError
from quantkit.generation.engine import Engine, make_drafter
from quantkit.generation.generate import generate
from quantkit.hf.backend import make_backend
from tests.tiny import build, tiny_llama


def ask(ids, count, number=0, slot=0) -> DraftRequest:
    return DraftRequest(number, slot, ids, count, Sampling(), 0)


@pytest.mark.parametrize(
    ("ids", "count", "want"),
    [
        ([1, 2, 3, 4, 9, 1, 2], 3, [3, 4, 9]),
        ([1, 2, 5, 1, 2, 6, 1, 2], 2, [6, 1]),  # the most recent occurrence
        ([7, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2], 1, [5]),  # a longer match before a more recent one
        ([4, 5, 4, 5], 5, [4, 5, 4, 5, 4]),  # what repeats goes on repeating
        ([3, 3, 3], 4, [3, 3, 3, 3]),
        ([1, 2, 3, 4], 3, []),
        ([1], 3, []),
        ([1, 9, 1], 3, []),  # one token alone is no n-gram
    ],
)
def test_ngrams_are_looked_up_at_once_or_as_the_text_grows(ids, count, want):
    assert NgramDrafter().propose([ask(ids, count)]) == [want]
    growing = NgramDrafter()
    for end in range(1, len(ids)):
        growing.propose([ask(ids[:end], 1)])
    assert growing.propose([ask(ids, count)]) == [want]


def test_sequences_do_not_mix_and_are_forgotten():
    drafter = NgramDrafter()
    texts = {0: [1, 2, 3, 1, 2], 1: [1, 2, 4, 1, 2]}
    assert drafter.propose([ask(ids, 1, number) for number, ids in texts.items()]) == [[3], [4]]
    drafter.forget(0)
    assert drafter.propose([ask([1, 2, 5, 1, 2], 1, 0)]) == [[5]]
    with pytest.raises(QuantkitError, match="n-grams of 3 to 2 tokens"):
        NgramDrafter(2, 3)


def linear(ratio: float) -> list[float]:
    return [1 + k * ratio for k in range(8)]


def run(length: DraftLength, ratio: float, right: float, steps: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Decode where each draft is right with chance ``right``; return tokens and cost, in steps without drafts."""
    chance, tokens, cost = random.Random(seed), 0, 0.0
    for _ in range(steps):
        count, accepted = length.choose(linear(ratio)), 0
        while accepted < count and chance.random() < right:
            accepted += 1
        if count:
            length.observe(count, accepted)
        tokens, cost = tokens + accepted + 1, cost + 1 + count * ratio
    return tokens, cost


@pytest.mark.parametrize("ratio", [0.02, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("right", [0.0, 0.3, 0.6, 0.8, 0.95, 1.0])
def test_drafting_is_nearly_as_good_as_knowing_the_best_length_and_hardly_worse_than_none(ratio, right):
    tokens, cost = run(DraftLength(7), ratio, right)
    best = max(sum(right**i for i in range(k + 1)) / (1 + k * ratio) for k in range(8))
    assert tokens / cost > max(0.95, 0.9 * best)


def test_draft_lengths_follow_what_was_right_and_what_it_costs():
    length = DraftLength(7)
    assert length.choose(linear(0.01)) > length.choose(linear(0.5)) >= 1
    for _ in range(20):
        length.observe(4, 4)
    assert length.choose(linear(0.01)) == 7
    assert length.acceptance > 0.95
    for _ in range(20):
        length.observe(4, 0)
    assert length.acceptance < 0.4
    assert [length.choose(linear(0.5)) for _ in range(DraftLength.FIRST_PAUSE + 1)] == [0] * (DraftLength.FIRST_PAUSE + 1)
    assert [length.choose(linear(0.5)) for _ in range(3)] == [1, 1, 1]  # until there was something to try
    length.observe(1, 1)
    assert length.acceptance > 0.5  # the text has changed: back to work at once
    assert length.choose(linear(0.5)) >= 1
    assert DraftLength(7, 0.0).choose(linear(0.5)) == 0  # what others were guessed like is where a request starts


def test_text_that_cannot_be_guessed_is_hardly_drafted():
    length, drafted = DraftLength(7), 0
    for _ in range(1000):
        count = length.choose(linear(0.5))
        if count:
            drafted += count
            length.observe(count, 0)
    assert drafted < 12


def test_costs_are_medians_by_how_many_decode_and_are_verified():
    costs = DraftCosts()
    assert costs.curve(1, 3) is None
    for step_s in (1.0, 99.0, 1.0):
        costs.observe(1, 0, 0, 0.0, step_s)
    each = DraftCosts.UNKNOWN_DRAFT + DraftCosts.UNKNOWN_ROW
    assert costs.curve(1, 2) == pytest.approx([1, 1 + each, 1 + 2 * each])
    assert costs.curve(2, 2) is None
    for drafting_s in (0.6, 0.6, 80.0):
        costs.observe(1, 2, 2, drafting_s, 1.2)  # 0.3 to draft one, 0.2 to verify two
    costs.observe(1, 4, 4, 1.2, 1.8)
    assert costs.curve(1, 5) == pytest.approx([1, 1.4, 1.8, 2.4, 3.0, 3.5])
    costs.observe(1, 5, 5, 1.5, 1.6)  # five cannot cost less than four: it was a bad moment
    assert costs.curve(1, 5) == pytest.approx([1, 1.4, 1.8, 2.3, 2.8, 3.1])
    for _ in range(2):
        costs.observe(4, 0, 0, 0.0, 2.0)
        costs.observe(4, 8, 2, 0.4, 2.8)
    assert costs.curve(4, 2) == pytest.approx([1, 1.3, 1.6])


def test_a_model_that_drafts_for_itself_is_always_right_across_slots_and_rewinds():
    model = tiny_llama()
    drafter = ModelDrafter(make_backend(model), 2, 64, step_tokens=4)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13]]
    want = [generate(model, prompt, max_new_tokens=6).ids for prompt in prompts]
    asks = [ask(prompt, 6, number, slot=number) for number, prompt in enumerate(prompts)]
    assert drafter.propose(asks) == want
    partly = [*prompts[0], *want[0][:2], 50]  # two guesses were right, the third was not
    assert drafter.propose([ask(partly, 3)]) == [generate(model, partly, max_new_tokens=3).ids]
    taken = drafter.propose([ask(prompts[1], 4, number=7, slot=0)])  # another sequence in the slot
    assert taken == [want[1][:4]]
    drafter.forget(7)
    assert drafter.propose([ask(prompts[0], 2, number=8, slot=0)]) == [want[0][:2]]
    assert drafter.propose([ask([1] * 63, 4, number=9)])[0][1:] == []  # the end of the context
    assert drafter.propose([ask([1] * 64, 4, number=9)]) == [[]]


def test_a_model_that_cannot_go_back_cannot_draft():
    mamba = build("mamba", num_key_value_heads=None, head_dim=None, max_position_embeddings=None, state_size=8)
    with pytest.raises(QuantkitError, match="cannot go back to an earlier token"):
        ModelDrafter(make_backend(mamba), 1, 64)
    with pytest.raises(QuantkitError, match=r"none was given; give drafter=\('model', model\)"):
        generate(tiny_llama(), [1, 2], drafter="model")
    with pytest.raises(QuantkitError, match="'ngram' does not use a second model; give the name alone"):
        generate(tiny_llama(), [1, 2], drafter=("ngram", tiny_llama()))
    with pytest.raises(QuantkitError, match="unknown drafter 'ngrm'; did you mean 'ngram'"):
        generate(tiny_llama(), [1, 2], drafter="ngrm")
    assert {"model", "ngram", "self"} <= set(DRAFTERS.names())


@DRAFTERS.register("constant")
class ConstantDrafter:
    """A drafter as another package would add it: one class that registers itself."""

    needs_model = False
    shares_memory = False

    def __init__(self, token: int) -> None:
        self.token = token

    @classmethod
    def make(cls, context: DrafterContext) -> "ConstantDrafter":
        return cls(context.vocabulary - 1)

    def propose(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        return [[self.token] * request.count for request in requests]

    def forget(self, number: int) -> None:
        pass


@DRAFTERS.register("constant-model")
class ConstantModelDrafter(ConstantDrafter):
    needs_model = True

    @classmethod
    def make(cls, context: DrafterContext) -> "ConstantModelDrafter":
        assert context.draft_model is not None
        return cls(context.draft_model.vocabulary // 2)


def test_a_drafter_from_outside_is_found_by_name_and_changes_no_answer():
    model, prompt = tiny_llama(), [5, 6, 7]
    want = generate(model, prompt, max_new_tokens=12).ids
    for drafter in (
        "constant",
        ("constant-model", tiny_llama()),
        ConstantDrafter(want[1]),
        ("model", tiny_llama()),
        tiny_llama(),
    ):
        assert generate(model, prompt, max_new_tokens=12, drafter=drafter).ids == want
    engine = Engine(model, drafter="constant")
    assert make_drafter("constant", engine).token == engine.vocabulary - 1
    assert make_drafter(("constant-model", tiny_llama()), engine).token == engine.vocabulary // 2
    assert make_drafter(None, engine) is None
