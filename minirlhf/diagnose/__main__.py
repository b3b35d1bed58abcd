"""Says in plain words what is healthy in a run and what is not, from the files in its folder.

    python -m minirlhf.diagnose checkpoints/ppo

In:  the folder of an SFT, reward-model or PPO run, finished or not: `metrics.csv` and `samples.txt`
     (or the same names with .part). Out: text.

Each finding has the figure that shows it, the likely causes, what to try, and where to read on. How
often an illness is recognised, and how often a healthy run is accused, is measured by
`python -m minirlhf.experiments.diagnose_rates`.
Lecture: lectures/06-what-goes-wrong.md, "Reading the curves".
"""

from dataclasses import dataclass

from minirlhf.diagnose.findings import Finding
from minirlhf.diagnose.report import write_report
from minirlhf.engine.options import check, name_first_argument, one_sentence, parse_config


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
    name_first_argument("run")
    with one_sentence():
        main(parse_config(DiagnoseConfig))
