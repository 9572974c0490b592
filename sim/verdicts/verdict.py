"""What claims are examined with, what that ends with, and the reasoning that claims about time share."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sim.traffic import SyntheticTraffic, load_workload

HOLDS, DOES_NOT_FOLLOW, NOT_BY_LOAD = "holds", "does not follow", "not explained by load alone"
HOLDS_ONLY = "holds only when"
Estimate = tuple[float, float, float]
"""A value with the ends of its 95 % interval, both equal to it where the answer is exact."""


@dataclass(frozen=True)
class Conditions:
    """Decode traffic and the `ClaimOptions` that claims are examined with."""

    workload: SyntheticTraffic
    seed: int
    effort: float
    plausible_share: float
    threads: int | None = None

    def scaled(self, n: int) -> int:
        """A number of trials, scaled by the effort."""
        return max(64, int(n * self.effort))

    @property
    def prefill(self) -> SyntheticTraffic:
        """The traffic's prefill: tokens of a request share its effect, as in the preset; uniform traffic has none."""
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


@dataclass(frozen=True)
class Finding:
    """Outcome for one claim."""

    computed: str  # the figure with its interval, for people
    estimate: Estimate  # the same as numbers
    unit: str  # what the estimate is of
    verdict: str  # HOLDS, HOLDS_ONLY ..., DOES_NOT_FOLLOW or NOT_BY_LOAD
    why: str  # one sentence or two, with numbers
    needed_share: Estimate = (np.nan, np.nan, np.nan)  # of the step, by experts and exchange, of a claim about time


def time_saved(throughput_gain: float) -> float:
    """Share of the time that is saved where throughput grows by a share."""
    return throughput_gain / (1 + throughput_gain)


def needed_share(claimed: float, saved: Estimate) -> Estimate:
    """Share of a step that layers need if they save `saved` and the step shall save `claimed`; infinite without any."""
    value, low, high = (claimed / s if s > 0 else np.inf for s in saved)
    return value, high, low


def ranges_text(values: Sequence[int], chosen: Sequence[bool], unit: str = " tokens") -> str:
    """Runs of chosen values, as in '1 to 4 tokens, or 2048 and more tokens'; the last value stands for all above."""
    runs: list[list[int]] = []
    for value, before, is_chosen in zip(values, [False, *chosen], chosen, strict=False):
        if is_chosen and before:
            runs[-1].append(value)
        elif is_chosen:
            runs.append([value])
    texts = []
    for run in runs:
        if run[-1] == values[-1] and len(values) > 1:
            texts.append(f"{run[0]}{unit} or more")
        else:
            one = unit.removesuffix("s") if run[0] == 1 else unit
            texts.append(f"{run[0]}{one}" if len(run) == 1 else f"{run[0]} to {run[-1]}{unit}")
    return ", or ".join(texts)


def percent(share: float, digits: int = 1) -> str:
    """A share as text: 12.3 %."""
    return f"{100 * share:z.{digits}f} %"


def saved_text(saved: Estimate) -> str:
    """A saved share with the half-width of its interval."""
    return f"{100 * saved[0]:z.1f} ± {50 * (saved[2] - saved[1]):.1f} %"


def share_text(share: float) -> str:
    """A needed share for people."""
    if np.isinf(share):
        return "any multiple"
    return f"{100 * share:.0f} %" + (" (more than there is)" if share > 1 else "")
