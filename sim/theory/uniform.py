"""Uniform traffic: exact laws of what one token asks of ranks, for grouped and ungrouped routers.

All experts of a group are alike, and so are all groups: given how a token's experts spread over groups, every choice
of groups and of experts in them is equally likely. What a token asks of a rank depends only on how many experts of each
group the rank holds, its `held`, and not on the order of the groups.
"""

from functools import cached_property
from math import comb

import numpy as np

from sim.model import ModelSpec
from sim.theory.grouped import spread_over_groups

_MOST_SPREADS = 50_000


class UniformRouter:
    """A router under uniform traffic.

    Attributes
    ----------
    n_group, group_size, top_k : int
    counts : int64 [spreads, n_group]
        Ways in which a token's experts spread over the groups, in every order of the groups.
    probability : float64 [spreads]
    """

    def __init__(self, n_group: int, group_size: int, top_k: int, spreads: dict[tuple[int, ...], float]) -> None:
        self.n_group, self.group_size, self.top_k = n_group, group_size, top_k
        rows, probability = [], []
        for kept, p in spreads.items():
            full = (*kept, *[0] * (n_group - len(kept)))
            orders = _orders(full)
            rows += orders
            probability += [p / len(orders)] * len(orders)
        self.counts, self.probability = np.array(rows), np.array(probability)
        self._laws: dict[tuple[int, ...], np.ndarray] = {}
        self._misses: dict[tuple[int, ...], float] = {}

    @classmethod
    def of(cls, model: ModelSpec, x0: float) -> "UniformRouter | None":
        """The router of a model whose sigmoid has the offset x0; None where the ways to spread are too many to list."""
        if not model.is_grouped:
            return cls(1, model.n_experts, model.top_k, {(model.top_k,): 1.0})
        if (
            comb(model.n_group, model.topk_group) * comb(model.top_k + model.topk_group - 1, model.top_k)
            > _MOST_SPREADS
        ):
            return None
        both = model.group_score == "top2_sum"
        shape = (model.n_group, model.group_size, model.topk_group, model.top_k)
        return cls(model.n_group, model.group_size, model.top_k, spread_over_groups(*shape, both, model.scoring, x0))

    @cached_property
    def _hypergeometric(self) -> np.ndarray:
        """P(j of c experts of a group lie among h of its experts): float64 [h, j, c]."""
        n, k = self.group_size, self.top_k
        table = np.zeros((n + 1, k + 1, min(k, n) + 1))
        for h in range(n + 1):
            for c in range(min(k, n) + 1):
                for j in range(c + 1):
                    table[h, j, c] = comb(h, j) * comb(n - h, c - j) / comb(n, c)
        return table

    def load_law(self, held: tuple[int, ...]) -> np.ndarray:
        """P(a token has j experts on a rank that holds `held` of each group), j = 0 .. top_k; also of several ranks
        taken together. float64 [top_k + 1].
        """
        held = tuple(sorted((h for h in held if h), reverse=True))
        if held not in self._laws:
            counts, probability = self.marginal(len(held))
            law = np.zeros((self.top_k + 1, len(counts)))
            law[0] = 1
            for g, h in enumerate(held):
                of_group = self._hypergeometric[h][:, counts[:, g]]
                more = law * of_group[0]
                for j in range(1, min(h, self.top_k) + 1):
                    more[j:] += law[: self.top_k + 1 - j] * of_group[j]
                law = more
            self._laws[held] = law @ probability
        return self._laws[held]

    def misses(self, held: tuple[int, ...]) -> float:
        """P(a token has no expert among `held` experts of each group)."""
        if held not in self._misses:
            self._misses[held] = self._sum_of_misses(held)
        return self._misses[held]

    def _sum_of_misses(self, held: tuple[int, ...]) -> float:
        counts, probability = self.marginal(len(held))
        none = self._hypergeometric[:, 0]
        missed = probability
        for g, h in enumerate(held):
            missed = missed * none[h][counts[:, g]]
        return float(missed.sum())

    def marginal(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Distinct counts in the first n groups, and their probabilities."""
        if n not in self._marginals:
            rows, inverse = np.unique(self.counts[:, :n], axis=0, return_inverse=True)
            self._marginals[n] = rows, np.bincount(inverse.ravel(), self.probability, len(rows))
        return self._marginals[n]

    @cached_property
    def _marginals(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {}


def _orders(counts: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Distinct orders of some numbers."""
    if not counts:
        return [()]
    return [(c, *rest) for c in sorted(set(counts)) for rest in _orders(_without(counts, c))]


def _without(counts: tuple[int, ...], c: int) -> tuple[int, ...]:
    i = counts.index(c)
    return counts[:i] + counts[i + 1 :]
