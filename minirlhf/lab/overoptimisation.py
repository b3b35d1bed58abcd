"""`overoptimisation`: how far can one climb a learned score before gold falls?

Two climbers: PPO without KL penalty, iteration by iteration, and best-of-n for n = 1 to 64. Both on
prompts of the training split, so that their gold is comparable. Three reward models, and as control
the gold judge itself as reward, which cannot be fooled: gold has the scale of a reward model, and
its critic starts from the one of 2,000 comparisons, so that from that arm only the score differs.
"""

import numpy as np

from minirlhf.data import Prompt, encode_prompt, format_prompt
from minirlhf.evaluate import Answers, gold_figures, judge_answers, load_policy
from minirlhf.lab.best_of_n import best_of_n, best_of_n_bound, best_of_n_kl, fit_curve
from minirlhf.lab.experiment import Experiment, Finding, Rows, compare
from minirlhf.lab.gold import scaled_gold, train_on_gold
from minirlhf.lab.measure import gold_accuracy, keep_sft_answers, measure
from minirlhf.lab.pictures import (
    COLOURS,
    MARKS,
    STYLES,
    mean_series,
    name_axes,
    new_picture,
    save_picture,
)
from minirlhf.lab.shared import Task, reward_model_folder, series, sft_folder, train_policy
from minirlhf.rewards import load_reward
from minirlhf.tokenizer import Tokenizer
from minirlhf.world import prompts as training_prompts

ABOUT = Experiment(
    name="overoptimisation",
    claim="Beyond some KL from the start gold falls while the score still rises, the sooner the "
          "fewer comparisons the reward model saw; best-of-n needs less KL than PPO; d (alpha - "
          "beta d) and d (alpha - beta log d) with d = sqrt(KL) describe the two.",
    source="Gao, Schulman and Hilton 2022 (arXiv 2210.10760)",
    rule="Shown if all hold, refuted if the opposite of one holds, by intervals over seeds: with "
         "2,000 comparisons PPO's gold falls from its best by more than when PPO climbs gold "
         "itself (scaled as a reward model is, its critic starting as in that arm); 8,000 "
         "comparisons leave more gold at the end than 500; at the KL of best-of-16 PPO has less "
         "gold; each curve explains more than 90 % of the variance of its gold.",
    figures=("gold", "score", "kl_ref", "gold_fall", "accuracy", "bon_gold_64", "bon_kl_64",
             "ppo_r2_rl", "ppo_r2_bon", "bon_r2_bon", "bon_r2_rl"),
    units={"gold_fall": "points per response", "accuracy": "share of comparisons",
           "bon_gold_64": "points per response", "bon_kl_64": "nats per response",
           **{f"{climber}_r2_{kind}": "share of variance" for climber in ("ppo", "bon")
              for kind in ("rl", "bon")}})

CONTROL = "gold itself"
ARMS = {                            # comparisons of the reward model; of CONTROL's critic only
    "500 comparisons": 500, "2000 comparisons": 2000, "8000 comparisons": 8000, CONTROL: 2000}
ITERATIONS = 30                     # so that the path goes far enough
NS = (1, 2, 4, 8, 16, 32, 64)
WINDOW = 5                          # iterations that are averaged before a curve is fitted


# ---- best-of-n -----------------------------------------------------------------------------------

def draw_for_best_of_n(task: Task) -> Answers:
    """Answers of the SFT model to prompts like PPO's, twice as many as the largest n."""
    count, answers = (8, 16) if task.quick else (48, 2 * max(NS))
    tokenizer = load_policy(sft_folder(task))[1]
    texts = [format_prompt(row["prompt"]) for row in training_prompts(count, 1000 + task.seed)]
    prompts = [Prompt(text, "", encode_prompt(tokenizer, text)) for text in texts]
    return keep_sft_answers(task, "best_of_n", prompts, answers)


def one_score_per_response(answers: Answers, scores: np.ndarray) -> np.ndarray:
    """Scores (P, N) in which equal responses to a prompt have equal scores, the first one's.

    A network's last digits depend on the other rows of a batch.
    """
    equal = scores.copy()
    for p, drawn in enumerate(answers.responses):
        first: dict[tuple, float] = {}
        for k, ids in enumerate(drawn):
            equal[p, k] = first.setdefault(tuple(ids), scores[p, k])
    return equal


def best_of_n_curves(task: Task, reward_function) -> dict[str, list[float]]:
    """Gold, score and KL of best-of-n for every n, means over prompts."""
    answers = draw_for_best_of_n(task)
    tokenizer = load_policy(sft_folder(task))[1]
    gold = gold_figures(answers)["gold"]                                            # (P, N)
    scores = judge_answers(answers, reward_function, tokenizer)
    scores = one_score_per_response(answers, scores)                                # (P, N)
    numbers = [n for n in NS if n <= scores.shape[1]]
    found = {"bon_gold": [], "bon_score": [], "bon_kl": []}
    for n in numbers:
        found["bon_gold"].append(np.mean([best_of_n(s, g, n) for s, g in zip(scores, gold)]))
        found["bon_score"].append(np.mean([best_of_n(s, s, n) for s in scores]))
        found["bon_kl"].append(np.mean([
            best_of_n_kl([tuple(ids) for ids in drawn], s, n)
            for drawn, s in zip(answers.responses, scores)]))
    return {name: [round(float(value), 4) for value in values] for name, values in found.items()}


# ---- the run -------------------------------------------------------------------------------------

def smooth(values: list[float]) -> np.ndarray:
    """Means of WINDOW neighbours: of 30 iterations 26 values."""
    window = min(WINDOW, len(values))
    return np.convolve(values, np.ones(window) / window, mode="valid")


def explained(fit: dict[str, float], gain: np.ndarray) -> float:
    """Share of the variance of gold's gain that a fitted curve explains; never below -1."""
    return float(max(-1.0, 1 - fit["residual"] ** 2 / max(1e-12, gain.var())))


def fits(name: str, kl: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """Both of Gao's curves fitted to one climber's path: how much each explains, its numbers."""
    gain, figures = gold[1:] - gold[0], {}
    for kind in ("bon", "rl"):
        fit = fit_curve(kl[1:], gain, kind)
        figures[f"{name}_r2_{kind}"] = explained(fit, gain)
        figures[f"{name}_alpha_{kind}"], figures[f"{name}_beta_{kind}"] = fit["alpha"], fit["beta"]
    return figures


def run(task: Task) -> dict:
    """PPO without penalty against the arm's reward, best-of-n by the same reward, the fits."""
    reward = reward_model_folder(task, comparisons=ARMS[task.arm])
    options = {"reward": reward, "kl_coef": 0.0, "iterations": 4 if task.quick else ITERATIONS}
    if task.arm == CONTROL:
        climbed = scaled_gold(task)
        folder = train_on_gold(task, climbed, **options)
        figures = measure(task, folder)
        figures["score"] = climbed.scaled(figures["gold"])
    else:
        climbed = load_reward(reward, "mean", Tokenizer.load(reward))
        folder = train_policy(task, **options)
        figures = {"accuracy": gold_accuracy(task, reward), **measure(task, folder, reward)}
    path, curves = series(folder, "gold", "score", "kl_ref"), best_of_n_curves(task, climbed)
    gold, kl = smooth(path["gold_by_step"]), smooth(path["kl_ref_by_step"])
    if not task.quick:                                   # where there are points enough
        # the path begins at KL 0 with the SFT model's gold, which best-of-1 knows best
        start = curves["bon_gold"][0]
        figures.update(fits("ppo", np.append(0.0, kl), np.append(start, gold)))
        figures.update(fits("bon", np.array(curves["bon_kl"]), np.array(curves["bon_gold"])))
    at = {n: i for i, n in enumerate(NS[:len(curves["bon_kl"])])}
    figures.update(gold_fall=float(gold.max() - gold[-1]), gold_best=float(gold.max()),
                   bon_gold_16=curves["bon_gold"][at[16]], bon_kl_16=curves["bon_kl"][at[16]],
                   ppo_gold_at_kl_16=float(np.interp(curves["bon_kl"][at[16]], kl, gold)))
    if 64 in at:
        figures.update(bon_gold_64=curves["bon_gold"][at[64]], bon_kl_64=curves["bon_kl"][at[64]])
    return {**figures, **path, **curves}


def findings(rows: Rows) -> list[Finding]:
    """The parts of Gao's claim."""
    some, many = "2000 comparisons", "8000 comparisons"
    found = [
        compare(rows, "with 2,000 comparisons gold falls more than when PPO climbs gold itself",
                (some, "gold_fall"), ">", (CONTROL, "gold_fall")),
        compare(rows, "8,000 comparisons leave more gold at the end than 500", (many, "gold"), ">",
                ("500 comparisons", "gold")),
        compare(rows, "at the KL of best-of-16 PPO has less gold", (many, "ppo_gold_at_kl_16"), "<",
                (many, "bon_gold_16"))]
    if "ppo_r2_rl" in rows[many][0]:                     # not of a quick run
        found += [
            compare(rows, "d (alpha - beta log d) explains 90 % of PPO's gold", (some, "ppo_r2_rl"),
                    ">", 0.9),
            compare(rows, "d (alpha - beta d) explains 90 % of best-of-n's gold",
                    (some, "bon_r2_bon"), ">", 0.9)]
    return found


# ---- the picture ---------------------------------------------------------------------------------

def distance(rows: Rows, arm: str, name: str) -> np.ndarray:
    """sqrt(KL) along a series, means over seeds; k1 estimates below 0 count as 0."""
    return np.sqrt(np.maximum(0.0, mean_series(rows, arm, name)))


def draw_fits(axes, rows: Rows, arm: str, climber: str, kl: str, gold: str, title: str) -> None:
    """The means of a climber's gold, and Gao's two curves with the mean of their parameters."""
    d, points = distance(rows, arm, kl), np.array(mean_series(rows, arm, gold))
    axes.plot(d, points, "o", color=COLOURS[0], markersize=4, label="measured")
    start = float(np.mean([row["bon_gold"][0] for row in rows[arm]]))
    line = np.linspace(0.05, max(0.1, d.max()), 100)                                # (100,)
    for number, (kind, label) in enumerate((("bon", "d (a - b d)"), ("rl", "d (a - b log d)")), 1):
        if f"{climber}_alpha_{kind}" in rows[arm][0]:
            a, b = (np.mean([row[f"{climber}_{name}_{kind}"] for row in rows[arm]])
                    for name in ("alpha", "beta"))
            bend = line if kind == "bon" else np.log(line)
            axes.plot(line, start + line * (a - b * bend), "-" if number == 1 else "--",
                      color=COLOURS[number], label=label)
    name_axes(axes, title, "d = sqrt(KL), KL in nats per response", "gold, points per response")


def picture(rows: Rows, path: str) -> None:
    """Gold and score over the distance from the start, best-of-n's KL, and the two fits."""
    figure, axes = new_picture(6)
    for number, arm in enumerate(rows):
        style = {"color": COLOURS[number], "label": arm, "linewidth": 1.8}
        ppo, bon = distance(rows, arm, "kl_ref_by_step"), distance(rows, arm, "bon_kl")
        axes[0].plot(ppo, mean_series(rows, arm, "gold_by_step"), STYLES[number], **style)
        axes[1].plot(ppo, mean_series(rows, arm, "score_by_step"), STYLES[number], **style)
        axes[2].plot(bon, mean_series(rows, arm, "bon_gold"), marker=MARKS[number], **style)
        numbers = NS[:len(bon)]
        axes[3].plot(numbers, mean_series(rows, arm, "bon_kl"), marker=MARKS[number], **style)
    axes[3].plot(numbers, [best_of_n_bound(n) for n in numbers], ":", color="black",
                 label="log n - (n-1)/n")
    axes[3].set_xscale("log", base=2)
    axes[3].set_xticks(numbers, [str(n) for n in numbers])
    far = "d = sqrt(KL), KL in nats per response"
    name_axes(axes[0], "PPO, no penalty: gold", far, "gold, points per response")
    name_axes(axes[1], "PPO: the score that it climbs", far, "score, points per response")
    name_axes(axes[2], "Best-of-n: gold", far, "gold, points per response")
    name_axes(axes[3], "Best-of-n: exact KL and its bound", "n", "KL, nats per response")
    draw_fits(axes[4], rows, "2000 comparisons", "ppo", "kl_ref_by_step", "gold_by_step",
              "PPO, 2,000 comparisons: fits")
    draw_fits(axes[5], rows, "2000 comparisons", "bon", "bon_kl", "bon_gold",
              "Best-of-n, 2,000 comparisons: fits")
    save_picture(figure, path)
