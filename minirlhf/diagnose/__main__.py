"""Says in plain words what is healthy in a run and what is not, from the files in its folder.

    python -m minirlhf.diagnose checkpoints/ppo

In:  the folder of an SFT, reward-model or PPO run, finished or not: `metrics.csv` and `samples.txt`
     (or the same names with .part). Out: text.

Each finding has the figure that shows it, the likely causes, what to try, and where to read on. How
often an illness is recognised, and how often a healthy run is accused, is measured by
`python -m minirlhf.diagnose.check`.
Lecture: lectures/03-ppo.md, "Reading the curves".
"""

import sys
from dataclasses import dataclass

from minirlhf.common import check, run
from minirlhf.diagnose.illnesses import Finding
from minirlhf.diagnose.report import write_report


@dataclass(frozen=True)
class DiagnoseConfig:
    """Options of `python -m minirlhf.diagnose`."""
    run: str = ""                       # folder of the run; also given without --run

    def __post_init__(self):
        check(bool(self.run), "expected the folder of a run, as in: "
              "python -m minirlhf.diagnose checkpoints/ppo")


def main(cfg: DiagnoseConfig) -> list[Finding]:
    """Print the report; returns the findings."""
    text, findings = write_report(cfg.run)
    print(text)
    return findings


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--run")
    run(main, DiagnoseConfig)
