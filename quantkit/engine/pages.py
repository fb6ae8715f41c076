"""Who owns which page of the key/value memory: allocation, sharing of equal prefixes, reuse of what was freed.

A sequence's keys and values live in *pages* of ``page_tokens`` tokens; its *block table* lists them in order, so token
``t`` stands in page ``table[t // page_tokens]`` at offset ``t % page_tokens`` (PagedAttention: Kwon et al. 2023,
arXiv 2309.06180). This file knows page numbers and token ids; the memory behind them belongs to the backend.

Keys and values of a token depend on every token before it. So a page that is full can serve every sequence that begins with
the same tokens: it is *published* in a tree whose edges are the tokens of one page (RadixAttention: Zheng et al. 2023,
arXiv 2312.07104). A node is named by a number that is never used twice, and a child is found by ``(parent, its tokens)``: the
tokens themselves are compared, so there are no collisions. A page that agrees only in its first tokens is shared by *copy on
write*: the new sequence gets a copy and overwrites the rest.

A page is in exactly one of three places: in use (counted references, one per table it is in), cached (published, in no
table, kept for a later sequence, evicted in least-recently-used order), or free.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from quantkit.errors import QuantkitError

ROOT = 0
"""The node of the empty prefix."""


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known beginning of a sequence.

    Attributes:
        pages: full pages to share, in order.
        node: the node after them.
        partial: a page whose first ``partial_tokens`` tokens continue the prefix, to be copied; None if there is none.
        partial_tokens: how many of its tokens agree.
    """

    pages: list[int] = field(default_factory=list)
    node: int = ROOT
    partial: int | None = None
    partial_tokens: int = 0


@dataclass(slots=True)
class _Node:
    """A published page: what stands in it and where it hangs."""

    name: int
    parent: int
    tokens: tuple[int, ...]


class Pages:
    """The pages of one key/value memory.

    Args:
        count: how many there are.
        page_tokens: tokens in one.

    Attributes:
        hits_tokens: tokens that did not have to be computed because a published page held them.
        evictions: cached pages given to somebody else.
    """

    SIBLINGS = 8
    """Pages looked at for a partial match."""

    def __init__(self, count: int, page_tokens: int) -> None:
        if count < 1 or page_tokens < 1:
            raise QuantkitError(f"{count} pages of {page_tokens} tokens: want at least one of each")
        self.count, self.page_tokens = count, page_tokens
        self._free = list(range(count - 1, -1, -1))  # the lowest number first: a lone sequence gets pages in a row
        self._references = [0] * count
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._nodes: dict[int, _Node] = {}  # page -> its node
        self._by_edge: dict[tuple[int, tuple[int, ...]], int] = {}  # (parent, tokens) -> page
        self._children: dict[tuple[int, int], list[int]] = {}  # (parent, first token) -> pages, newest last
        self._next_name = ROOT + 1
        self.hits_tokens = self.evictions = 0

    @property
    def available(self) -> int:
        """Pages that :meth:`allocate` could return now: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Pages in at least one table."""
        return self.count - self.available

    @property
    def cached(self) -> int:
        """Published pages in no table."""
        return len(self._cached)

    def references(self, page: int) -> int:
        """Return in how many tables ``page`` is."""
        return self._references[page]

    def pages_for(self, tokens: int) -> int:
        """Return how many pages hold ``tokens`` tokens."""
        return -(-tokens // self.page_tokens)

    def allocate(self) -> int | None:
        """Take a page nobody uses, with one reference; None when all are in use. A cached one is evicted last of all."""
        if self._free:
            page = self._free.pop()
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
            self.evictions += 1
        else:
            return None
        self._references[page] = 1
        return page

    def retain(self, page: int) -> None:
        """Add a reference to a used or cached page."""
        self._cached.pop(page, None)
        self._references[page] += 1

    def release(self, table: Sequence[int]) -> None:
        """Drop one reference to every page of a table; what nobody uses any more is cached if published, else free.

        The end of the table goes first, so that it is evicted first: a page is of no use without those before it.
        """
        for page in reversed(table):
            if self._references[page] < 1:
                raise QuantkitError(f"page {page} is released but nobody uses it")
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._nodes:
                self._cached[page] = None
            else:
                self._free.append(page)

    def match(self, tokens: Sequence[int], limit: int) -> Match:
        """Return the longest published prefix of ``tokens``, at most ``limit`` of them. Takes no reference."""
        size, node, pages = self.page_tokens, ROOT, list[int]()
        while (len(pages) + 1) * size <= limit:
            start = len(pages) * size
            page = self._by_edge.get((node, tuple(tokens[start : start + size])))
            if page is None:
                break
            pages.append(page)
            node = self._nodes[page].name
        start = len(pages) * size
        rest = tuple(tokens[start : min(limit, start + size)])
        partial, agree = None, 0
        for page in self._children.get((node, rest[0]), [])[-self.SIBLINGS :] if rest else []:
            common = _common(self._nodes[page].tokens, rest)
            if common > agree:
                partial, agree = page, common
        return Match(pages, node, partial, agree)

    def publish(self, page: int, parent: int, tokens: Sequence[int]) -> int:
        """Offer a full page that follows node ``parent`` to later sequences; return the node of this prefix.

        When another page already holds the same prefix that one stays, and this one remains private.
        """
        edge = (parent, tuple(tokens))
        if len(edge[1]) != self.page_tokens:
            raise QuantkitError(f"page {page}: {len(edge[1])} tokens are published, a full page has {self.page_tokens}")
        known = self._by_edge.get(edge)
        if known is not None:
            return self._nodes[known].name
        self._nodes[page] = _Node(self._next_name, *edge)
        self._by_edge[edge] = page
        self._children.setdefault((parent, edge[1][0]), []).append(page)
        self._next_name += 1
        return self._nodes[page].name

    def forget_cached(self) -> None:
        """Free every cached page, as if no sequence had ever been here."""
        while self._cached:
            page, _ = self._cached.popitem()
            self._forget(page)
            self._free.append(page)

    def _forget(self, page: int) -> None:
        node = self._nodes.pop(page)
        del self._by_edge[node.parent, node.tokens]
        key = (node.parent, node.tokens[0])
        self._children[key].remove(page)
        if not self._children[key]:
            del self._children[key]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
