"""How many draft tokens to ask for: from the measured cost of steps with drafts, and the measured acceptance."""

from collections import defaultdict, deque
from collections.abc import Sequence
from statistics import median


class DraftCosts:
    """The time that drafting takes on this machine, measured on recent steps that only decoded.

    A plain step of n sequences takes time ``p``. Drafting k tokens for each adds ``k * d``, and verifying them adds
    ``v(k * n)``, a function of the number of added rows: a few rows cost little, until the kernels change to a slower path.
    Each quantity is kept per n, as a median, so that outliers have no influence.
    """

    REMEMBERED, FIRST, UNKNOWN_DRAFT, UNKNOWN_ROW = 9, 2, 0.3, 0.05

    def __init__(self) -> None:
        self._steps = defaultdict[int, dict[int, deque[float]]](dict)  # sequences -> draft tokens -> seconds per step
        self._drafts = defaultdict[int, deque[float]](lambda: deque(maxlen=self.REMEMBERED))

    def observe(self, sequences: int, drafts: int, longest: int, drafting_s: float, step_s: float) -> None:
        """Record one step.

        Args:
            sequences: number of sequences in the step.
            drafts: draft tokens in total.
            longest: most draft tokens of one sequence.
            drafting_s: seconds spent on drafting.
            step_s: seconds that the step took.
        """
        self._steps[sequences].setdefault(drafts, deque(maxlen=self.REMEMBERED)).append(step_s)
        if drafts:
            self._drafts[sequences].append(drafting_s / longest)

    def curve(self, sequences: int, longest: int) -> list[float] | None:
        """Return the cost of a step with 0 to ``longest`` drafts per sequence, in units of a step without drafts.

        None if too few steps without drafts have been measured for this number of sequences.
        """
        steps = self._steps[sequences]
        if len(steps.get(0, ())) < self.FIRST:
            return None
        known = {rows: median(times) for rows, times in steps.items()}
        plain = max(known.pop(0), 1e-9)
        draft = median(self._drafts[sequences]) / plain if self._drafts[sequences] else self.UNKNOWN_DRAFT
        added = {rows: max(time / plain - 1, 0.0) for rows, time in known.items()}
        added = {rows: min(cost for more, cost in added.items() if more >= rows) for rows in added}  # more rows, more work
        return [1 + k * draft + self._verification(added, k * sequences) for k in range(longest + 1)]

    def _verification(self, added: dict[int, float], rows: int) -> float:
        """Return the cost of verifying ``rows`` more rows, interpolated between or extrapolated from measured numbers."""
        below = max((known for known in added if known <= rows), default=0)
        above = min((known for known in added if known >= rows), default=0)
        least = added[below] if below else 0.0
        if below == rows:
            return least
        slope = (added[above] - least) / (above - below) if above else least / below if below else self.UNKNOWN_ROW
        return least + (rows - below) * slope


class DraftLength:
    """Choose the number of draft tokens for one request.

    If every draft token is accepted with probability ``a``, then ``k`` of them yield ``1 + a + ... + a^k`` tokens (Leviathan et
    al. 2022, arXiv 2211.17192, section 3.1). The k with the most tokens per cost (:class:`DraftCosts`) is chosen. ``a`` is
    estimated from the verifications of this request, with exponentially decreasing weights. If no k pays off, drafting pauses
    and is tried again with a single token, each time after a pause twice as long, so that text that cannot be guessed costs
    almost nothing.

    Args:
        longest: upper bound of the number of drafts.
        guess: initial estimate of ``a``, with the weight of one verified token.
    """

    START, MEMORY, GAIN, FIRST_PAUSE, LONGEST_PAUSE = 0.75, 0.95, 1.03, 16, 256

    def __init__(self, longest: int, guess: float = START) -> None:
        self._longest = longest
        self._accepted, self._seen = guess, 1.0
        self._wait, self._pause, self._trying = 0, self.FIRST_PAUSE, False

    @property
    def acceptance(self) -> float:
        """The estimate of ``a``."""
        return self._accepted / self._seen

    def choose(self, costs: Sequence[float]) -> int:
        """Return the number of drafts to ask for; 0 during a pause.

        Args:
            costs: ``costs[k]`` is the cost of a step with k drafts per sequence.
        """
        if self._wait:
            self._wait -= 1
            self._trying = self._wait == 0
            return 0
        if self._trying:  # until a drafter has a guess to try
            return 1
        gains, tokens = [1.0], 1.0
        for k in range(1, min(self._longest, len(costs) - 1) + 1):
            tokens += self.acceptance**k
            gains.append(tokens / costs[k])
        best = max(gains)
        if best >= self.GAIN:
            self._pause = self.FIRST_PAUSE
            return gains.index(best)
        self._wait, self._pause = self._pause, min(self._pause * 2, self.LONGEST_PAUSE)
        return 0

    def observe(self, drafted: int, accepted: int) -> None:
        """Record one verification of ``drafted`` >= 1 tokens. Tokens after the first rejected one carry no information."""
        tries = accepted + (accepted < drafted)
        memory = 1 / self._seen if self._trying else self.MEMORY**tries  # after a pause, the past weighs as much as one token
        self._accepted = self._accepted * memory + accepted
        self._seen = self._seen * memory + tries
        self._trying = False
