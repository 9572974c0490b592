"""Exact answers in rational numbers, for small routers: what theory and simulation must agree with.

Ungrouped, uniform traffic: each token takes top_k distinct experts, all sets equally likely, tokens independent, so the
loads of ranks are multivariate hypergeometric; `held` is the number of experts on each rank. Grouped: by going through all
orders.
"""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import permutations, product
from math import comb, factorial


def max_load_of_one_token(held: Sequence[int], top_k: int) -> list[Fraction]:
    """P(the busiest rank has exactly m of a token's experts), m = 0 .. top_k.

    The number of sets with at most m experts on every rank is the coefficient of x**top_k in the product over ranks of
    sum over j <= m of C(n_r, j) x**j.
    """
    at_most = [_sets_with_at_most(held, top_k, m) for m in range(top_k + 1)]
    total = comb(sum(held), top_k)
    return [Fraction(n - (at_most[m - 1] if m else 0), total) for m, n in enumerate(at_most)]


def _sets_with_at_most(held: Sequence[int], top_k: int, most: int) -> int:
    ways = [1] + [0] * top_k
    for n in held:
        of_rank = [comb(n, j) for j in range(min(most, top_k) + 1)]
        ways = [sum(ways[k - j] * of_rank[j] for j in range(min(k, len(of_rank) - 1) + 1)) for k in range(top_k + 1)]
    return ways[top_k]


def mean_idle_ranks(held: Sequence[int], top_k: int, tokens: int) -> Fraction:
    """Mean number of ranks without a pair in a step: sum over ranks of (C(E - n_r, k) / C(E, k))**T."""
    return sum((_misses(sum(held), n, top_k) ** tokens for n in held), Fraction(0))


def one_rank(held: Sequence[int], top_k: int, tokens: int) -> Fraction:
    """P(all of a step's load on one rank): sum over ranks of (C(n_r, k) / C(E, k))**T."""
    return sum((Fraction(comb(n, top_k), comb(sum(held), top_k)) ** tokens for n in held), Fraction(0))


def idle_ranks(held: Sequence[int], top_k: int, tokens: int) -> list[Fraction]:
    """P(exactly m idle ranks), m = 0 .. ranks, by inclusion and exclusion over the sets of ranks that are missed.

    Ranks of equal size are interchangeable, so sets are counted by how many ranks of each size they hold.
    """
    n_ranks, n_experts, sizes = len(held), sum(held), Counter(held)
    missed = [Fraction(0)] * (n_ranks + 1)  # sum over sets of j ranks of P(all of them are missed)
    for taken in product(*(range(count + 1) for count in sizes.values())):
        sets, n_missed = 1, 0
        for (size, count), j in zip(sizes.items(), taken, strict=True):
            sets *= comb(count, j)
            n_missed += size * j
        missed[sum(taken)] += sets * _misses(n_experts, n_missed, top_k) ** tokens
    return [
        sum(((-1) ** (j - m) * comb(j, m) * missed[j] for j in range(m, n_ranks + 1)), Fraction(0))
        for m in range(n_ranks + 1)
    ]


def _misses(n_experts: int, n: int, top_k: int) -> Fraction:
    """P(a token takes none of n experts)."""
    return Fraction(comb(n_experts - n, top_k), comb(n_experts, top_k))


def spread_by_enumeration(
    values: Sequence[float], n_group: int, topk_group: int, top_k: int, both: bool
) -> dict[tuple[int, ...], Fraction]:
    """The same for a token whose choice scores are `values`, dealt to the experts in every order: by going through all.

    For small routers. Where a group's score is its best alone the spread does not depend on the values, so this is the
    law of any continuous logits that are alike.
    """
    size = len(values) // n_group
    found: dict[tuple[int, ...], int] = {}
    for dealt in permutations(values):
        groups = [sorted(dealt[g * size : (g + 1) * size], reverse=True) for g in range(n_group)]
        kept = sorted(groups, key=lambda group: -sum(group[: 2 if both else 1]))[:topk_group]
        least = sorted((v for group in kept for v in group), reverse=True)[top_k - 1]
        spread = tuple(sorted((sum(v >= least for v in group) for group in kept), reverse=True))
        found[spread] = found.get(spread, 0) + 1
    return {spread: Fraction(n, factorial(len(values))) for spread, n in found.items()}
