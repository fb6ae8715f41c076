"""Drafters: cheap guesses at the next tokens, which the model verifies in a single step (speculative decoding).

Verification does not depend on the quality of a guess. At every position the engine chooses the token that it would have chosen
without drafts, with the request's own noise, and continues as long as that token equals the guess. The answer is therefore the
answer without drafts, token for token (up to the rounding of rows that are computed together), and its distribution is the
model's. A guess that is made without noise is accepted with probability p(guess), as under the rejection rule of Leviathan et
al. 2022 (arXiv 2211.17192) and Chen et al. 2023 (arXiv 2302.01318). A drafter that has a distribution of its own should choose
with the *same* noise as the engine, which makes the two agree about as often as possible: drafter-invariant speculative
decoding (Daliri, Musco and Suresh 2024, arXiv 2408.07978).

To add a drafter, write one file with a class that registers itself in :data:`~quantkit.engine.drafters.base.DRAFTERS`.
"""

from quantkit.engine.drafters.base import DRAFTERS, Drafter, DrafterContext, DraftModel, DraftRequest

__all__ = ["DRAFTERS", "DraftModel", "DraftRequest", "Drafter", "DrafterContext"]
