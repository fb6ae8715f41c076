"""Drafters: cheap guesses at the next tokens, verified by the model in one step (speculative decoding).

Verification never trusts a guess. At every position the engine chooses the token it would have chosen anyway, with the
request's own noise, and goes on as long as that is what was guessed. So the answer is the answer without drafts, token for
token (up to rounding where rows of a batch are computed together), and its distribution is the model's whatever the drafter
says. For a guess without noise the chance to be right is p(guess), as with the rejection rule of Leviathan et al. 2022 (arXiv
2211.17192) and Chen et al. 2023 (arXiv 2302.01318). A drafter with a distribution of its own should choose with the *same*
noise, which makes both agree about as often as they can: drafter-invariant speculative decoding (Daliri, Musco and Suresh 2024,
arXiv 2408.07978).

A drafter is one file here that registers itself.
"""

from quantkit.engine.drafters.base import DRAFTERS, Ask, Costs, Drafter, DraftLength

__all__ = ["DRAFTERS", "Ask", "Costs", "DraftLength", "Drafter"]
