"""Slots of some layers on ranks: the form that every placement has, with or without replicas."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Slots:
    """Experts in the slots of one or more layers; slots are numbered rank by rank.

    Attributes
    ----------
    ranks : int32 [layers, slots]
        Rank of each slot, ascending.
    experts : int16 [layers, slots]
        Expert in each slot; every expert is in at least one.
    n_experts : int
    """

    ranks: np.ndarray
    experts: np.ndarray
    n_experts: int

    @classmethod
    def of_ranks(cls, rank_of_expert: np.ndarray) -> "Slots":
        """Without replicas: the rank of each expert, int32 [layers, n_experts]."""
        experts = np.argsort(rank_of_expert, axis=1, kind="stable").astype(np.int16)
        return cls(np.sort(rank_of_expert, axis=1), experts, rank_of_expert.shape[1])

    @classmethod
    def of_map(cls, experts: np.ndarray, n_experts: int, ep_size: int) -> "Slots":
        """Equal numbers of slots on each rank: the expert of each, int16 [layers, slots]."""
        n_slots = experts.shape[1]
        rank = np.arange(n_slots, dtype=np.int32) // (n_slots // ep_size)
        return cls(np.ascontiguousarray(np.broadcast_to(rank, experts.shape)), experts, n_experts)

    @property
    def has_replicas(self) -> bool:
        """Whether an expert is in more than one slot."""
        return self.experts.shape[1] > self.n_experts

    @cached_property
    def rank_of_expert(self) -> np.ndarray:
        """Without replicas: the rank of each expert, int32 [layers, n_experts]."""
        ranks = np.empty_like(self.ranks)
        np.put_along_axis(ranks, self.experts.astype(np.int64), self.ranks, axis=1)
        return ranks
