"""How far off the time left was that a verb showed: python tests/progress_error.py VERB OPTIONS..., as one would type them.

Prints the phases with their shares of the time and of the announced work, and the error of the time left when a third of the
time had passed. Run a verb once before, so that kernels are compiled.
"""

import sys
import time

from sim.cli import main
from sim.cli.terminal import time_left_s
from sim.progress import watching


def measure(words: list[str]) -> str:
    """Run a verb; phases, and the error of the time left at a third of the way."""
    seen: list[tuple[float, float, str]] = []
    started_s = time.monotonic()
    with watching(lambda share, name: seen.append((time.monotonic() - started_s, share, name))):
        status = main(words)
    if status or not seen:
        return f"status {status}, {len(seen)} announcements"
    first_s, end_s = seen[0][0], seen[-1][0]
    lines = []
    for name in dict.fromkeys(name for _, _, name in seen):
        of = [(at, share) for at, share, other in seen if other == name]
        lines.append(f"{name or '-'}: {of[-1][0] - of[0][0]:.1f} s, to {of[-1][1]:.0%} of the work")
    third_s = first_s + (end_s - first_s) / 3
    at, share, _ = max((one for one in seen if one[0] <= third_s), default=seen[0])
    left_s, really_s = time_left_s(at - first_s, share), end_s - at
    lines.append(
        f"at {at:.1f} s of {end_s:.1f} s: {left_s:.1f} s left shown, {really_s:.1f} s in fact ({left_s / really_s - 1:+.0%})"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    print(measure(sys.argv[1:]), file=sys.stderr)
