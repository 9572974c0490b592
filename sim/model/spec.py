"""The description of a mixture-of-experts model that routing, placement and cost need."""

from dataclasses import dataclass

from sim.errors import InputError, shown, whole_number

ROUTED_SCORINGS = ("softmax", "sigmoid")
"""Scorings that `route` knows. Others are kept by name: ungrouped, any scoring that rises with the logit selects alike."""


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
        MoE layers of the model, without multi-token-prediction layers; 0 if unknown.
    hidden_size, expert_hidden_size, moe_intermediate_size, expert_matrices : int
        Sizes of the model and of one expert (its input width differs from hidden_size in latent MoE; 3 matrices are
        gate, up and down, 2 up and down); 0 if unknown.
    routed_dtype : str
        Type of the routed experts' weights in the checkpoint.
    unverified : tuple of str
        Fields that were not read from the checkpoint itself.
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
    n_moe_layers: int = 0
    hidden_size: int = 0
    expert_hidden_size: int = 0
    moe_intermediate_size: int = 0
    expert_matrices: int = 3
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
        for field in ("n_moe_layers", "hidden_size", "expert_hidden_size", "moe_intermediate_size", "expert_matrices"):
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

    @property
    def group_size(self) -> int:
        """Experts per group."""
        return self.n_experts // self.n_group

    @property
    def is_grouped(self) -> bool:
        """Whether routing is limited to some of several groups."""
        return self.n_group > 1
