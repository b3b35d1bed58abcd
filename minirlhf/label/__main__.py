"""You are the labeller: choose between two answers, and train a reward model on your own taste.

    python -m minirlhf.label --answers sampled
    python -m minirlhf.label --data comparisons.jsonl --out checkpoints/my_labels
    python -m minirlhf.label --answers sampled --uncertain checkpoints/rm1,checkpoints/rm2

In:  comparisons of a file, or policies that answer prompts. Out: `verdicts.jsonl` in the folder
     --out, which `python -m minirlhf.reward_model --data` reads as it is.

Two answers show, blinded and in random order: 1 or 2 is the better one, t a tie, s skips the pair,
u takes the last verdict back, q ends. Some pairs come again later in the other order. At the end
stands how often you agreed with yourself, and with the gold judge where it knows the prompts.
Lecture: lectures/09-what-came-after.md, "You are the labeller".
"""

import math
import os
import shlex
from dataclasses import dataclass
from typing import Literal

from minirlhf.data import is_function, mix, read_prompts, read_records
from minirlhf.engine.fields import Count, Natural, Share, check_fields
from minirlhf.engine.options import check, one_sentence, parse_config, printable
from minirlhf.engine.output import result_folder
from minirlhf.evaluate import load_policy, pair_up, sample_answers
from minirlhf.label.agreement import agreement, describe
from minirlhf.label.pairs import different, lay_out, most_uncertain_first
from minirlhf.people.verdicts import VerdictFile, ask, judge_by_person
from minirlhf.reward_model import RewardModelConfig

FILE = "verdicts.jsonl"
BLOCK = 64                              # prompts that are answered at a time


@dataclass(frozen=True)
class LabelConfig:
    """Options of `python -m minirlhf.label`."""
    answers: Literal["stored", "sampled"] = "stored"    # those of --data, or new ones of a and b
    data: str = "checkpoints/comparisons.jsonl"    # comparisons to show, .jsonl or module:function
    a: str = "checkpoints/sft"          # policy folder that writes one of two sampled answers
    b: str = "checkpoints/sft"          # policy folder that writes the other
    prompts: str = "minirlhf.world:prompts"    # of sampled answers: .jsonl, or module:function
    pairs: Count = 200                  # pairs to show; q ends before
    again: Share = 0.1                  # share of the pairs that come twice
    uncertain: str = ""                 # reward-model folders; pairs they dispute come first
    who: str = "me"                     # kept with each verdict; another person starts anew
    max_new_tokens: Count = 32          # longest sampled answer, tokens
    out: str = "checkpoints/labels"     # folder of verdicts.jsonl, which grows
    seed: Natural = 0                   # of pairs, answers, and the order of everything

    def __post_init__(self):
        check_fields(self)
        stored = self.answers == "stored"
        check(not stored or self.a == self.b == LabelConfig.a, "--a and --b write new answers, so "
              "they need --answers sampled")
        check(bool(self.who.strip()) and self.who == printable(self.who),
              f"--who is {self.who!r}, expected a name")


def sampled_pairs(cfg: LabelConfig) -> list[dict]:
    """One answer of policy a and one of b to each prompt; of one policy, two independent ones.

    Blocks are sampled whole, each from its own stream: another --pairs keeps the pairs there were.
    """
    policy_a, tokenizer = load_policy(cfg.a)
    policy_b = load_policy(cfg.b, tokenizer)[0]
    context = min(policy.config.n_positions for policy in (policy_a, policy_b))
    count = -(-cfg.pairs // BLOCK) * BLOCK
    prompts, _ = read_prompts(cfg.prompts, tokenizer, context, cfg.max_new_tokens, count=count,
                              seed=cfg.seed)
    pairs: list[dict] = []
    for first in range(0, len(prompts), BLOCK):
        a, b = [sample_answers(policy, tokenizer, prompts[first:first + BLOCK], 1, seed=cfg.seed,
                               max_new_tokens=cfg.max_new_tokens, stream=2 * first + side)
                for side, policy in enumerate((policy_a, policy_b))]
        pairs += pair_up(a, b)
    return [{"a": cfg.a, "b": cfg.b, **pair} for pair in pairs[:cfg.pairs]]


def stored_pairs(cfg: LabelConfig) -> list[dict]:
    """Comparisons of a file, drawn by seed: a is the file's chosen answer, b the rejected one."""
    if cfg.data == LabelConfig.data and not os.path.lexists(cfg.data):
        raise FileNotFoundError(f"{cfg.data} does not exist; make it by python -m minirlhf, name "
                                "another file by --data, or show new answers by --answers sampled")
    records = read_records(cfg.data, "comparisons", seed=cfg.seed, model=cfg.a,
                           count=cfg.pairs if is_function(cfg.data) else 0)
    return [{"a": f"chosen in {cfg.data}", "b": f"rejected in {cfg.data}",
             "prompt": record["prompt"], "answer_a": record["chosen"],
             "answer_b": record["rejected"], "ended_a": True, "ended_b": True}
            for record in mix(list(records), cfg.data, cfg.seed, False)[:cfg.pairs]]


def few_labels(choices: int) -> dict[str, int]:
    """Options of `minirlhf.reward_model` for few comparisons; its own are for thousands.

    One in ten is held out, and there are so many epochs that 20 steps are made.
    Example: few_labels(60) == {"held_out": 6, "epochs": 10}, for 54 are two batches of 32.
    """
    held_out = max(1, choices // 10)
    batches = math.ceil((choices - held_out) / RewardModelConfig.batch_size)
    return {"held_out": held_out, "epochs": math.ceil(20 / batches)}


def check_folder(out: str) -> None:
    """Refuse a folder that holds something and no verdicts."""
    check(bool(out.strip()), "--out is empty, expected the name of a folder")
    check(os.path.isdir(out) or not os.path.lexists(out), f"--out {out} is a file, expected the "
          "name of a folder")
    names = sorted(set(os.listdir(out)) - {".lock"}) if os.path.isdir(out) else []
    check(not names or FILE in names, f"--out {out} holds {names[:1]} and no {FILE}; name "
          "a new folder, or one with verdicts")


def main(cfg: LabelConfig, ask=ask) -> dict:
    """Show pairs and keep verdicts; returns the agreement figures. `ask` is the person."""
    check_folder(cfg.out)
    check(os.path.realpath(cfg.data) != os.path.realpath(os.path.join(cfg.out, FILE)),
          f"--data {cfg.data} would grow by its own verdicts; name another folder by --out")
    with result_folder(cfg.out):
        file = VerdictFile(os.path.join(cfg.out, FILE))
        pairs = different(stored_pairs(cfg) if cfg.answers == "stored" else sampled_pairs(cfg))
        if cfg.uncertain:
            pairs = most_uncertain_first(pairs, cfg.uncertain)
        questions = lay_out(pairs, cfg.who, cfg.again, cfg.seed)
        verdicts = judge_by_person(questions, file, ask)
    report = agreement([row for row in file.rows if row.get("who") == cfg.who])
    print(f"\n{sum(map(bool, verdicts))} of {len(questions)} pairs are judged. All verdicts of "
          f"{cfg.who} in {file.path}:\n{describe(report)}")
    if report["choices"] >= 2:
        options = [f"--{name} {value}" for name, value in few_labels(report["choices"]).items()]
        options += [f"--model {shlex.quote(cfg.a)}"] if cfg.a != LabelConfig.a else []
        print("next, a reward model of your taste:  python -m minirlhf.reward_model --data "
              f"{shlex.quote(file.path)} {' '.join(options)} --out checkpoints/my_reward")
    return report


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(LabelConfig))
