"""The description of a mixture-of-experts model that routing, placement and cost need."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sim.errors import InputError, shown, whole_number

ROUTED_SCORINGS = ("softmax", "sigmoid")
"""Scorings that `route` knows. Others are kept by name: ungrouped, any scoring that rises with the logit selects alike."""

MAX_LAYERS = 10_000
"""More layers than this are refused as an error of the file."""
MOST_DRAFTS = 4
"""Draft layers (multi-token prediction) that engines number behind a decoder's."""


@dataclass(frozen=True)
class ModelSpec:
    """Router and expert shape of one model.

    Attributes
    ----------
    name : str
        Preset name, or the path of the config that it was read from.
    n_experts, top_k : int
        Routed experts of a layer, and how many of them a token takes.
    n_group, topk_group : int
        Contiguous expert groups and how many of them a token may use; n_group = 1 is plain top-k.
    scoring : str
        'softmax' or 'sigmoid'; other names are kept, and `route` refuses them.
    group_score : str
        'max' or 'top2_sum': what ranks the groups (for n_group = 1: what would, given `has_bias`).
    has_bias : bool
        Whether a correction bias is added to the scores for the choice.
    n_moe_layers : int
        MoE layers of the decoder, without multi-token-prediction layers; 0 if unknown.
    n_layers : int
        Layers of the decoder, dense ones included; 0 if unknown.
    moe_layer_ids : tuple of int
        Which decoder layers are MoE, ascending, n_moe_layers of them. Where only their number is given, or it is
        changed with `dataclasses.replace`, they are 0, 1, ...
    hidden_size, expert_hidden_size, moe_intermediate_size, expert_matrices : int
        Sizes of the model and of one expert (its input width differs from hidden_size in latent MoE; 3 matrices are
        gate, up and down, 2 up and down); 0 if unknown.
    n_shared_experts : int
        Experts that every token takes; they are not routed and no part of any load here.
    routed_dtype : str
        Type of the routed experts' weights in the checkpoint.
    unverified : tuple of str
        Fields that were not read from the checkpoint itself, and keys of its config that were not understood.
    source : tuple of str
        Where the fields were read.
    caveat : str
        What a simulation leaves out of this model.
    """

    name: str
    n_experts: int
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    scoring: str = "softmax"
    group_score: str = "max"
    has_bias: bool = False
    n_moe_layers: int = -1  # the number of moe_layer_ids
    n_layers: int = 0
    moe_layer_ids: tuple[int, ...] = ()
    hidden_size: int = 0
    expert_hidden_size: int = 0
    moe_intermediate_size: int = 0
    expert_matrices: int = 3
    n_shared_experts: int = 0
    routed_dtype: str = "unknown"
    unverified: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    caveat: str = ""

    def __post_init__(self) -> None:
        where = f"model {self.name}: "
        for field in ("n_experts", "top_k", "n_group", "topk_group"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{where}{field} must be a whole number of at least 1, not {shown(value)}")
        sizes = ("hidden_size", "expert_hidden_size", "moe_intermediate_size", "expert_matrices", "n_shared_experts")
        for field in sizes:
            whole_number(f"{where}{field}", getattr(self, field), 0, 2**40)
        if not isinstance(self.name, str) or not isinstance(self.scoring, str) or not isinstance(self.has_bias, bool):
            raise InputError(f"{where}name and scoring must be strings, has_bias True or False")
        if self.n_experts > 2**15 - 1:
            raise InputError(f"{where}n_experts {shown(self.n_experts)} is above 32767, the largest int16 expert id")
        if self.group_score not in ("max", "top2_sum"):
            raise InputError(f"{where}group_score must be 'max' or 'top2_sum', not {shown(self.group_score)}")
        if self.n_experts % self.n_group:
            raise InputError(f"{where}n_experts {self.n_experts} is not divisible by n_group {self.n_group}")
        if self.topk_group > self.n_group:
            raise InputError(f"{where}topk_group {self.topk_group} is above n_group {self.n_group}")
        kept = self.topk_group * self.group_size
        if self.top_k > kept:
            raise InputError(
                f"{where}top_k {self.top_k} is above the {kept} experts of the {self.topk_group} kept groups of "
                f"{self.group_size}"
            )
        if self.is_grouped and self.group_size == 1 and self.group_score == "top2_sum":
            raise InputError(f"{where}groups of 1 expert have no top 2: group_score 'top2_sum' needs at least 2")
        self._settle_layers(where)

    def _settle_layers(self, where: str) -> None:
        """Check the layer fields, and derive the one that was not given."""
        whole_number(f"{where}n_layers", self.n_layers, 0, MAX_LAYERS)
        ids = self.moe_layer_ids
        if not isinstance(ids, tuple | list) or len(ids) > MAX_LAYERS:
            raise InputError(f"{where}moe_layer_ids must be at most {MAX_LAYERS} layer ids, not {shown(ids)}")
        ids = tuple(whole_number(f"{where}moe_layer_ids", i, 0, MAX_LAYERS - 1) for i in ids)
        if any(a >= b for a, b in pairwise(ids)):
            raise InputError(f"{where}moe_layer_ids must be ascending")
        if ids and self.n_layers and ids[-1] >= self.n_layers:
            raise InputError(f"{where}MoE layer {ids[-1]} is beyond the {self.n_layers} layers of the decoder")
        if self.n_moe_layers not in (-1, len(ids)):
            ids = tuple(range(whole_number(f"{where}n_moe_layers", self.n_moe_layers, 0, MAX_LAYERS)))
        self._set("moe_layer_ids", ids)
        self._set("n_moe_layers", len(ids))
        if self.n_layers and ids and ids[-1] >= self.n_layers:
            self._set("n_layers", 0)

    def _set(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)

    @property
    def group_size(self) -> int:
        """Experts per group."""
        return self.n_experts // self.n_group

    @property
    def is_grouped(self) -> bool:
        """Whether routing is limited to some of several groups."""
        return self.n_group > 1
