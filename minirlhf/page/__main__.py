"""One page about one run or several: curves, answers side by side, responses token by token.

    python -m minirlhf.page checkpoints
    python -m minirlhf.page checkpoints/ppo other/ppo --out compared.html
    python -m minirlhf.page checkpoints/ppo --prompt "What is the capital of France?"

In:  folders of a pipeline (`python -m minirlhf`) or of single stages, finished or not; of a run of
     an older version, which kept no tokens, the page shows what there is. Out: one HTML file that
     needs nothing else: no network, no script or font from anywhere. Open it in a browser.

The policies of finished runs answer some held-out prompts, and yours, anew: with temperature 1 and
a fixed seed, so the page is the same each time. The gold score stands where the text world's judge
knows the question, the score where the run names its reward models.
Lecture: lectures/05-ppo-the-run.md.
"""

from dataclasses import dataclass

from minirlhf.engine.fields import Count, Natural, Seed, check_fields
from minirlhf.engine.options import (
    check,
    join_first_arguments,
    one_sentence,
    parse_config,
    printable,
    split_folders,
)
from minirlhf.engine.output import check_output_file
from minirlhf.page.write import write_page


@dataclass(frozen=True)
class PageConfig:
    """Options of `python -m minirlhf.page`."""
    runs: str = ""                      # folders joined by commas; also given without --runs
    prompt: str = ""                    # a question of your own, answered by every policy
    prompts: str = "minirlhf.world:held_out_prompts"    # .jsonl file, or module:function
    prompt_count: Natural = 8           # of these prompts; 0: none
    max_new_tokens: Count = 32          # longest answer, tokens
    out: str = "report.html"            # file to write
    seed: Seed = 0                      # of prompts and answers

    def __post_init__(self):
        check_fields(self)
        check(bool(self.runs), "expected the folder of a run, as in: "
              "python -m minirlhf.page checkpoints/ppo")
        check(self.prompt_count <= 50, f"--prompt_count is {self.prompt_count}, expected at most "
              "50: the page is to be read")
        check(self.out.lower().endswith(".html"), f"--out is {self.out!r}, expected a name in "
              ".html")


def main(cfg: PageConfig) -> str:
    """Write the page; returns its path."""
    check_output_file(cfg.out, b"<title>minirlhf: ", "page")
    size = write_page(split_folders(cfg.runs), cfg.out, prompt=cfg.prompt, prompts=cfg.prompts,
                      count=cfg.prompt_count, max_new_tokens=cfg.max_new_tokens, seed=cfg.seed)
    print(f"wrote {printable(cfg.out)}, {size / 1000:.0f} kB; open it in a browser")
    return cfg.out


if __name__ == "__main__":
    join_first_arguments("runs")
    with one_sentence():
        main(parse_config(PageConfig))
