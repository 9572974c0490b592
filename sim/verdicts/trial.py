"""What all trials of claims share: traffic, seed and budget."""

import dataclasses
from dataclasses import dataclass

from sim.model import ModelSpec, load_model
from sim.traffic import SyntheticTraffic, load_workload


@dataclass(frozen=True)
class Trial:
    """Traffic and effort that claims are tried with.

    Attributes
    ----------
    workload : SyntheticTraffic
        Decode traffic.
    seed : int
    effort : float
        1 for the published table; less is quicker, and intervals are wider.
    plausible_share : float
        Largest share of a step that routed experts and exchange may have, for a claim to be put down to them.
    threads : int, optional
    """

    workload: SyntheticTraffic
    seed: int
    effort: float
    plausible_share: float
    threads: int | None = None

    def model(self, name: str) -> ModelSpec:
        """A model preset."""
        return load_model(name)

    def scaled(self, n: int) -> int:
        """A number of trials, scaled by the effort."""
        return max(64, int(n * self.effort))

    @property
    def prefill(self) -> SyntheticTraffic:
        """The traffic's prefill: tokens of a request share its taste, as in the preset; uniform traffic has no taste."""
        if self.workload.popularity == "none":
            return self.workload
        preset = load_workload("prefill")
        assert isinstance(preset, SyntheticTraffic)
        return dataclasses.replace(
            self.workload,
            name=f"{self.workload.name} prefill",
            request_sigma=self.workload.request_sigma or preset.request_sigma,
            tokens_per_request=preset.tokens_per_request,
        )
