"""Allocation of pages of key/value memory, shared between sequences with equal prefixes, and reused once released.

A sequence's keys and values are stored in *pages* of ``page_tokens`` tokens. Its *block table* lists them in order: token ``t``
is in page ``table[t // page_tokens]`` at offset ``t % page_tokens`` (PagedAttention: Kwon et al. 2023, arXiv 2309.06180). This
file knows page numbers and token ids only; the memory itself belongs to the backend.

The keys and values of a token depend on every token before it, so a full page can serve every sequence that begins with the
same tokens. Full pages are therefore *published* in a tree whose edges are the tokens of one page (RadixAttention: Zheng et al.
2023, arXiv 2312.07104). Each node has a number that is never reused, and a child is looked up by ``(parent, its tokens)``;
the tokens themselves are compared, so hash collisions cannot share the wrong page. A page of which only the first tokens agree
is shared by *copy on write*: the new sequence gets a copy and overwrites the rest.

A page is always in exactly one state: in use (with a count of the block tables it is in), cached (published, in no table, kept
for later sequences, evicted least recently used first), or free.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from quantkit.errors import QuantkitError

ROOT = 0
"""The node of the empty prefix."""


@dataclass(frozen=True, slots=True)
class Match:
    """The longest published prefix of a sequence.

    Attributes:
        pages: full pages to share, in order.
        node: the tree node of these pages.
        partial: a page whose first ``partial_tokens`` tokens continue the prefix, to be copied; None if there is none.
        partial_tokens: how many tokens of ``partial`` agree.
    """

    pages: list[int] = field(default_factory=list)
    node: int = ROOT
    partial: int | None = None
    partial_tokens: int = 0


@dataclass(slots=True)
class _Node:
    """A published page: its number in the tree, its parent's, and its tokens."""

    name: int
    parent: int
    tokens: tuple[int, ...]


class PageAllocator:
    """Allocate the pages of one key/value memory.

    Args:
        count: number of pages.
        page_tokens: tokens per page.

    Attributes:
        hit_tokens: prompt tokens that were not computed because a published page held them.
        evictions: cached pages that were given to another sequence.

    Raises:
        QuantkitError: ``count`` or ``page_tokens`` is below 1.
    """

    SIBLINGS = 8
    """Number of pages examined for a partial match."""

    def __init__(self, count: int, page_tokens: int) -> None:
        if count < 1 or page_tokens < 1:
            raise QuantkitError(f"{count} pages of {page_tokens} tokens: want at least one of each")
        self.count, self.page_tokens = count, page_tokens
        self._free = list(range(count - 1, -1, -1))  # lowest number first: a lone sequence gets consecutive pages
        self._references = [0] * count
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._nodes: dict[int, _Node] = {}  # page -> its node
        self._by_edge: dict[tuple[int, tuple[int, ...]], int] = {}  # (parent, tokens) -> page
        self._children: dict[tuple[int, int], list[int]] = {}  # (parent, first token) -> pages, newest last
        self._next_name = ROOT + 1
        self.hit_tokens = self.evictions = 0

    @property
    def available(self) -> int:
        """Pages that :meth:`allocate` could return now: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Pages in at least one block table."""
        return self.count - self.available

    @property
    def cached(self) -> int:
        """Published pages in no block table."""
        return len(self._cached)

    def references(self, page: int) -> int:
        """Return the number of block tables that contain ``page``."""
        return self._references[page]

    def pages_for(self, tokens: int) -> int:
        """Return the number of pages that ``tokens`` tokens need."""
        return -(-tokens // self.page_tokens)

    def allocate(self) -> int | None:
        """Return an unused page with one reference, or None if all are in use. Cached pages are evicted if none is free."""
        if self._free:
            page = self._free.pop()
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            self._unpublish(page)
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
        """Drop one reference to every page of a block table. Pages without references become cached if published, else free.

        The end of the table is released first, so that it is evicted first: a page is useless without those before it.

        Raises:
            QuantkitError: a page has no reference.
        """
        for page in reversed(table):
            if self._references[page] < 1:
                raise QuantkitError(f"page {page} is released, but it is not in use")
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._nodes:
                self._cached[page] = None
            else:
                self._free.append(page)

    def match(self, tokens: Sequence[int], limit: int) -> Match:
        """Return the longest published prefix of ``tokens``, at most ``limit`` tokens long. Takes no reference."""
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
        """Make a full page available to later sequences.

        If another page already holds the same prefix, that one stays published and this one remains private.

        Args:
            page: the page.
            parent: node of the prefix before it, :data:`ROOT` for the first page.
            tokens: the page's tokens.

        Returns:
            The node of the prefix that ends with this page.

        Raises:
            QuantkitError: the page is not full.
        """
        edge = (parent, tuple(tokens))
        if len(edge[1]) != self.page_tokens:
            raise QuantkitError(f"page {page}: published with {len(edge[1])} tokens; want a full page of {self.page_tokens}")
        known = self._by_edge.get(edge)
        if known is not None:
            return self._nodes[known].name
        self._nodes[page] = _Node(self._next_name, *edge)
        self._by_edge[edge] = page
        self._children.setdefault((parent, edge[1][0]), []).append(page)
        self._next_name += 1
        return self._nodes[page].name

    def _unpublish(self, page: int) -> None:
        node = self._nodes.pop(page)
        del self._by_edge[node.parent, node.tokens]
        key = (node.parent, node.tokens[0])
        self._children[key].remove(page)
        if not self._children[key]:
            del self._children[key]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of equal elements at the start of ``a`` and ``b``."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
