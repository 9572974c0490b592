"""A placed layer under uniform traffic: the busiest rank, idle ranks and the one-rank event, exactly or between bounds."""

from functools import cached_property

import numpy as np

from sim.theory.missed import missed_sets, probability_of_idle
from sim.theory.one_token import Choices, choices_of_groups, most_on_one_rank
from sim.theory.sums import TINY, tails
from sim.theory.uniform import UniformRouter
from sim.theory.union import at_least_one

_MOST_CHOICES = 200  # of groups that look different to the ranks, that sets of experts are counted for


class UniformLayer:
    """Experts of a layer on ranks, under uniform traffic; tokens are independent.

    Parameters
    ----------
    router : UniformRouter
    rank_of_expert : int [n_experts]
    """

    def __init__(self, router: UniformRouter, rank_of_expert: np.ndarray) -> None:
        self.router = router
        self.n_ranks = int(rank_of_expert.max()) + 1
        self.held = np.zeros((self.n_ranks, router.n_group), int)
        np.add.at(self.held, (rank_of_expert, np.arange(len(rank_of_expert)) // router.group_size), 1)

    def max_load(self, n_tokens: int, least: int) -> tuple[float, float]:
        """P(max load >= least): (lower bound, upper bound), equal where they are the answer.

        The upper bound is the sum over ranks (Boole). The lower one takes off the pairs of ranks that are both so high:
        the sum of their loads is then at least 2 * least, which is impossible beyond half of all pairs (token, expert).
        """
        if n_tokens == 1 and 2 * least <= self.router.top_k and len(self._choices) <= _MOST_CHOICES:
            p = most_on_one_rank(self._choices, least)
            return p, p
        (laws, counts), (pair_laws, pair_counts) = self._singles, self._pairs
        high = float(counts @ tails(laws, n_tokens, least))
        both = float(pair_counts @ tails(pair_laws, n_tokens, 2 * least))
        return min(at_least_one(high, both), 1.0), min(high, 1.0)

    def one_rank(self, n_tokens: int) -> tuple[float, float]:
        """P(all of a step's load on one rank), twice: both bounds."""
        laws, counts = self._singles
        p = float(counts @ np.where(laws[:, -1] > 0, np.maximum(laws[:, -1] ** n_tokens, TINY), 0.0))
        return p, p

    def idle_ranks(self, n_tokens: int, least: int) -> tuple[float, float] | None:
        """P(at least `least` idle ranks): (lower bound, upper bound), equal where they are the answer.

        None where the sets of ranks fall in too many classes to go through.
        """
        return None if self._missed is None else probability_of_idle(self.router, self._missed, n_tokens, least)

    def received(self, n_tokens: int, least: int) -> tuple[float, float]:
        """P(a rank receives at least `least` of the tokens): (lower bound, upper bound).

        What one rank receives is binomial; two of them together have 0, 1 or 2 of each token.
        """
        (laws, counts), (pair_laws, pair_counts) = self._receivers
        high = float(counts @ tails(laws, n_tokens, least))
        both = float(pair_counts @ tails(pair_laws, n_tokens, 2 * least)) if len(pair_laws) else 0.0
        return min(at_least_one(high, both), 1.0), min(high, 1.0)

    @cached_property
    def _receivers(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Laws of the copies of a token on one rank, and on two, each with how many ranks or pairs have it."""
        first, second = np.triu_indices(self.n_ranks, 1)
        missed, neither = (self._missing(held) for held in (self.held, self.held[first] + self.held[second]))
        both = np.maximum(1 - missed[first] - missed[second] + neither, 0.0)
        single = np.stack([missed, 1 - missed], axis=1)
        pair = np.stack([neither, np.maximum(1 - neither - both, 0.0), both], axis=1)
        singles, pairs = (np.unique(laws.round(13), axis=0, return_counts=True) for laws in (single, pair))
        return singles, pairs

    def _missing(self, held: np.ndarray) -> np.ndarray:
        """P(a token has no expert among those of each row), float64 [rows]."""
        rows, place = np.unique(-np.sort(-held, axis=1), axis=0, return_inverse=True)
        return np.array([self.router.load_law(tuple(row))[0] for row in rows.tolist()])[place.reshape(-1)]

    @cached_property
    def _choices(self) -> Choices:
        return choices_of_groups(self.router, self.held)

    @cached_property
    def _missed(self) -> list[dict[tuple[int, ...], int]] | None:
        return missed_sets(self.held)

    @cached_property
    def _singles(self) -> tuple[np.ndarray, np.ndarray]:
        return self._laws(self.held)

    @cached_property
    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        first, second = np.triu_indices(self.n_ranks, 1)
        return self._laws(self.held[first] + self.held[second])

    def _laws(self, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Load laws of the distinct rows of `held`, float64 [n, top_k + 1], and how many rows have each."""
        rows, counts = np.unique(-np.sort(-held, axis=1), axis=0, return_counts=True)
        laws = [self.router.load_law(tuple(row)) for row in rows.tolist()]
        return np.array(laws).reshape(len(rows), self.router.top_k + 1), counts
