"""Mixed precision within a budget: which layer gets how many bits, and what one bit more would buy."""

from quantkit.mixed.budget import Budget
from quantkit.mixed.measured import Decoding
from quantkit.mixed.result import Point, SearchResult
from quantkit.mixed.search import CHOICES, Scoring, search

__all__ = ["CHOICES", "Budget", "Decoding", "Point", "Scoring", "SearchResult", "search"]
