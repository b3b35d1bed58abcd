"""Find the bug: curves and a token table of a short run in which one mistake was switched on.

The runs were recorded by `python -m minirlhf.exercises.record`; all begin alike, with seed 1, and
one of them is healthy.
"""

import os
from functools import partial

from minirlhf.exercises.exercise import Question
from minirlhf.files.disk import read_json
from minirlhf.museum.exhibits import find

PATH = os.path.join(os.path.dirname(__file__), "bugs.json")
CURVES = ("score", "gold", "rewards", "kl_ref", "kl_old", "entropy", "ratio_first", "vf_loss",
          "explained_var", "response_len")

# the exhibit, minutes, difficulty, a hint, the reasoning
BUGS = (
    ("old_minus_new", 10, "easy", "What happens to the score? The token table adds up.",
     "The score falls as steadily as it should rise, and the token table is sound: good tokens "
     "have positive advantages. So the advantages are right and the update goes the other way. "
     "With the ratio upside down, good tokens become unlikely."),
    ("negated_kl", 10, "easy", "Compare kl_ref with the healthy run; then multiply a token's "
     "kl_ref by kl_coef, 0.2.",
     "kl_ref runs away, and in the table a token with a large kl_ref has a *positive* reward: "
     "leaving the reference is paid for. The sum is score + kl_coef * kl_ref."),
    ("late_score", 10, "medium", "Add up the rewards in the table. Where is the score?",
     "No reward in the table holds the score: the rewards add up to 0. So nothing is to be gained: "
     "kl_ref stays near 0, and a critic that always says 0 foresees everything (explained_var 1, "
     "vf_loss 0)."),
    ("dropout", 10, "medium", "One of the figures must be 0 in every run.",
     "ratio_first, the distance of the first ratios from 1, must be 0: before the first step the "
     "policy is the one that sampled. Here the policy in the update is another one. It learns all "
     "the same, which is why nobody notices: dropout is on in one pass and off in the other."),
    ("immediate_return", 15, "hard", "Compare the columns returns and rewards.",
     "Every token's return is its own reward. The score is in the return of the last token alone, "
     "so the others learn from their penalty only, and the score hardly rises."),
    ("dead_critic", 15, "hard", "Look at the column old_values, and at explained_var from the "
     "first iteration to the last.",
     "The values are 0 in the last iteration as in the first, and explained_var stays at 0: the "
     "critic is not trained. The policy still learns: with values of 0 an advantage is what "
     "follows, discounted by lambda. PPO has become REINFORCE, and only its noise shows it."))

CHOICES = tuple(sorted([name for name, *_ in BUGS] + [
    "all_ended", "double_kl", "early_whitening", "value_after_end"]))


def curve_table(healthy: dict[str, list[float]], wrong: dict[str, list[float]]) -> str:
    """Two lines for each figure, with a column for each iteration."""
    lines = [f"{'iteration':14}" + "".join(f"{i:8d}" for i in range(len(healthy[CURVES[0]])))]
    for name in CURVES:
        for title, curves in ((name, healthy), ("  this run", wrong)):
            lines.append(f"{title:14}" + "".join(f"{value:8.3f}" for value in curves[name]))
    return "\n".join(lines)


def bug_text(name: str) -> str:
    """What is shown of a run: curves beside those of a healthy one, the last token table."""
    runs = read_json(PATH)
    choices = "\n".join(f"  {choice:18}{find(choice).wrong.__doc__}" for choice in CHOICES)
    table = curve_table(runs["healthy"]["curves"], runs[name]["curves"])
    return (f"A healthy run, and below each figure this run, which has one mistake:\n{table}\n\n"
            "One of its last responses:\n"
            f"{runs[name]['table']}\n\nWhich of these is it? Answer with its name.\n{choices}")


EXERCISES = [Question(f"bug_{number}", 6, minutes, difficulty,
                      "which mistake does this run have?", partial(bug_text, exhibit),
                      partial(str, exhibit), hint, why, choices=CHOICES)
             for number, (exhibit, minutes, difficulty, hint, why) in enumerate(BUGS, start=1)]
