"""The grid of cells: sampled once, scored under every placement, EP size and number of tokens per step."""

from sim.sweeps.bounds import no_bounds_because, replicas_have_no_bounds
from sim.sweeps.combine import combine
from sim.sweeps.journal import Journal
from sim.sweeps.plan import Plan, make_plan
from sim.sweeps.run import finish_plan, run_plan, sample_plan, sweep, work_of

__all__ = [
    "Journal",
    "Plan",
    "combine",
    "finish_plan",
    "make_plan",
    "no_bounds_because",
    "replicas_have_no_bounds",
    "run_plan",
    "sample_plan",
    "sweep",
    "work_of",
]
