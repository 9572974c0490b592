"""The one form of a placement: slots with their expert and rank, of one layer or of several, with or without replicas."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from sim.model import ModelSpec

LayerIds = tuple[int, ...] | None
"""Decoder layers that rows belong to; None where one row serves all layers, or where the layers are not known."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Experts in the slots (physical experts) of ranks.

    Attributes
    ----------
    strategy : str
        Name of the strategy, with its redundant slots: 'eplb+32'.
    ep_size : int
    n_experts : int
        Logical experts.
    ranks : int32 [rows, slots]
        Rank of each slot, ascending: slots are numbered rank by rank. One row for all layers, or a row per layer.
    experts : int16 [rows, slots]
        Logical expert in each slot; every expert is in at least one. -1: no expert, at the end of each rank's slots, in a row
        that has fewer slots than others (`eplb_budget`).
    layer_ids : tuple of int, optional
        See `LayerIds`.
    notes : tuple of str
        What was made of the file that it was read from, such as rows that were left out.
    """

    strategy: str
    ep_size: int
    n_experts: int
    ranks: np.ndarray
    experts: np.ndarray
    layer_ids: LayerIds = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of_ranks(
        cls,
        strategy: str,
        ep_size: int,
        rank_of_expert: np.ndarray,
        layer_ids: LayerIds = None,
        notes: tuple[str, ...] = (),
    ) -> "Placement":
        """Without replicas: the rank of each expert, int32 [rows, n_experts]."""
        short = rank_of_expert.astype(np.int16)  # numbers below 2**15, which numpy sorts by their digits
        experts = np.argsort(short, axis=1, kind="stable")
        ranks = np.take_along_axis(rank_of_expert, experts, axis=1)
        placement = cls(strategy, ep_size, ranks.shape[1], ranks, experts.astype(np.int16), layer_ids, notes)
        vars(placement)["expert_ranks"] = rank_of_expert  # no need to work it out again
        return placement

    @classmethod
    def of_slots(
        cls,
        strategy: str,
        ep_size: int,
        n_experts: int,
        experts: np.ndarray,
        layer_ids: LayerIds = None,
        notes: tuple[str, ...] = (),
    ) -> "Placement":
        """Equal numbers of slots on each rank: the expert of each, int16 [rows, slots], -1 where a row has fewer."""
        n_slots = experts.shape[1]
        rank = np.arange(n_slots, dtype=np.int32) // (n_slots // ep_size)
        ranks = np.tile(rank, (len(experts), 1))
        return cls(strategy, ep_size, n_experts, ranks, experts, layer_ids, notes)

    @property
    def n_rows(self) -> int:
        """Rows: 1 where all layers are placed alike."""
        return len(self.ranks)

    @property
    def n_slots(self) -> int:
        """Slots of a layer, of the largest where layers differ."""
        return self.ranks.shape[1]

    @property
    def slots_of_row(self) -> np.ndarray:
        """Slots of each row, int64 [rows]."""
        return np.count_nonzero(self.experts >= 0, axis=1)

    @property
    def has_replicas(self) -> bool:
        """Whether an expert is in more than one slot."""
        return self.n_slots > self.n_experts

    @property
    def rank_of_slot(self) -> np.ndarray:
        """Rank of each slot, int32 [slots], or [layers, slots] where layers differ."""
        return self.ranks[0] if self.n_rows == 1 else self.ranks

    @property
    def logical_of_slot(self) -> np.ndarray:
        """Logical expert of each slot (-1: none), int32 [slots], or [layers, slots] where layers differ."""
        return (self.experts[0] if self.n_rows == 1 else self.experts).astype(np.int32)

    @property
    def rank_of_expert(self) -> np.ndarray:
        """Rank of each expert, int32 [n_experts], or [layers, n_experts] where layers differ.

        Raises
        ------
        AttributeError
            Experts have replicas, perhaps on several ranks.
        """
        if self.has_replicas:
            raise AttributeError(f"{self.strategy} has replicas: an expert has no one rank; see logical_of_slot")
        return self.expert_ranks[0] if self.n_rows == 1 else self.expert_ranks

    @cached_property
    def expert_ranks(self) -> np.ndarray:
        """Without replicas: the rank of each expert, int32 [rows, n_experts]."""
        ranks = np.empty_like(self.ranks)
        np.put_along_axis(ranks, self.experts.astype(np.int64), self.ranks, axis=1)
        return ranks

    def for_layers(self, layer_ids: tuple[int, ...]) -> "Placement":
        """With these decoder layers for its rows; one row is repeated for each of them."""
        times = len(layer_ids) if self.n_rows == 1 else 1
        ranks, experts = np.repeat(self.ranks, times, axis=0), np.repeat(self.experts, times, axis=0)
        return replace(self, ranks=ranks, experts=experts, layer_ids=layer_ids)

    @cached_property
    def idle_copies(self) -> np.ndarray:
        """Slots per row whose expert is already on the same rank, int64 [rows]: such a copy takes memory, and no load off."""
        on_rank = self.ranks.astype(np.int64) * self.n_experts + self.experts
        held = [row[experts >= 0] for row, experts in zip(on_rank, self.experts, strict=True)]
        return np.array([row.size - np.unique(row).size for row in held])


def notes_on(placement: Placement) -> list[str]:
    """What a user should know about a placement: what was made of its file, and copies of an expert that share a rank."""
    notes, idle = [f"{placement.strategy}: {note}" for note in placement.notes], placement.idle_copies
    if idle.any():
        layers = f" in {np.count_nonzero(idle)} of {placement.n_rows} layers" if placement.n_rows > 1 else ""
        notes.append(
            f"{placement.strategy} at EP size {placement.ep_size}: a rank holds two copies of one expert{layers}; "
            f"they balance nothing ({idle.sum()} of {placement.slots_of_row.sum()} slots)"
        )
    return notes


def decoder_layers(model: ModelSpec) -> int:
    """Decoder layers of a model, dense ones included; the last MoE layer ends them where that is all that is known."""
    return model.n_layers or max(model.moe_layer_ids, default=-1) + 1
