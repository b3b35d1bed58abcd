"""Compare two checkpoints on held-out prompts, by the gold judge, a reward model or a person.

    python -m minirlhf.evaluate --a checkpoints/sft --b checkpoints/ppo
    python -m minirlhf.evaluate --judge checkpoints/reward_model --prompts my.jsonl --out result
    python -m minirlhf.evaluate --judge person --prompt_count 50 --out result

In:  two policy folders, a reference folder, prompts, a judge. Out: a table, answers side by side,
     and with --out `evaluation.json` (and `human.jsonl`, the verdicts of a person).

The algorithm: each policy draws K answers to every prompt. Within a prompt every answer of b meets
every answer of a; the higher score wins, a tie counts half. A prompt's win rate is the mean over
its K x K pairs, the win rate is the mean over prompts, and its 95 % interval comes from drawing
prompts again and again with replacement (the bootstrap). As a control, a second independent set of
answers of a meets the first: that gives 0.5 but for sampling noise.

Choices:
 1. Several answers per prompt: with one, a lucky sample of a moves the win rate of every policy
    that is compared with it, and the interval over prompts does not see that.
 2. Beside the win rate stand the shares of answers that answered and that were fully right, for
    each kind of held-out prompt: a policy can win by manners alone.
 3. kl_ref is the k1 estimate on the policy's own answers, summed over an answer: nats per answer.

Shapes: P prompts, K answers to each; B sequences, T tokens in the padded row.
Lecture: lectures/07-does-it-work.md, "Did it get better?".
"""

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch

from minirlhf.data import Prompt, pad, read_prompts, response_mask
from minirlhf.engine.fields import Count, Natural, check_fields
from minirlhf.engine.options import check, one_sentence, parse_config
from minirlhf.engine.output import result_folder
from minirlhf.engine.training import random_stream
from minirlhf.files.disk import write_json
from minirlhf.files.hub import find_folder
from minirlhf.files.pretrained import load_network
from minirlhf.generate import generate
from minirlhf.gpt2 import GPT2, token_logprobs
from minirlhf.people.verdicts import (
    POINTS,
    VerdictFile,
    check_setup,
    judge_by_person,
    make_questions,
    shown,
)
from minirlhf.rewards import Ensemble, load_reward, try_once
from minirlhf.tokenizer import Tokenizer, load_tokenizer
from minirlhf.world import judge

RESAMPLES = 2000                        # of the bootstrap
SCORED_ROWS = 32                        # rows scored at a time; more is slower on a CPU


@dataclass(frozen=True)
class EvaluateConfig:
    """Options of `python -m minirlhf.evaluate`."""
    a: str = "checkpoints/sft"          # policy folder to beat
    b: str = "checkpoints/ppo"          # policy folder whose win rate over a is asked for
    ref: str = "checkpoints/sft"        # folder of the reference of kl_ref; "": no kl_ref
    prompts: str = "minirlhf.world:held_out_prompts"    # .jsonl file, or module:function
    prompt_count: Natural = 400         # prompts to use; 0: all that the file has
    judge: str = "gold"                 # gold, person, reward-model folders, or module:function
    ensemble: Ensemble = "mean"    # how several reward models vote
    answers: Count = 4                  # K, drawn to each prompt; a person sees one of each policy
    max_new_tokens: Count = 32          # longest response, tokens
    batch_size: Count = 256             # rows at a time; lower it for long prompts, large models
    samples: Natural = 4                # prompts shown with both answers
    out: str = ""                       # folder for evaluation.json, human.jsonl; "": no files
    seed: Natural = 0                   # of prompts, answers, bootstrap and the person's order

    def __post_init__(self):
        check_fields(self)
        check(self.judge != "person" or bool(self.out),
              "--judge person needs --out FOLDER, where each verdict is kept at once")


# ---- statistics ----------------------------------------------------------------------------------

def win_rate(scores_a: np.ndarray, scores_b: np.ndarray) -> np.ndarray:
    """Each prompt's share of pairs that b wins, ties half. (P, K), (P, K) -> (P,).

    Example: scores_a [[1, 2]] and scores_b [[2, 3]]: b wins 2-1, 3-1 and 3-2 and ties 2-2: 0.875.
    """
    fits = scores_a.ndim == scores_b.ndim == 2 and len(scores_a) == len(scores_b)
    check(fits, f"expected scores of the same prompts, (P, K) twice, found {scores_a.shape} and "
          f"{scores_b.shape}")
    margins = scores_b[:, None, :] - scores_a[:, :, None]                           # (P, K, K)
    return ((margins > 0) + 0.5 * (margins == 0)).mean(axis=(1, 2))                 # (P,)


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `values` (P,) and its 95 % interval over prompts: (mean, low, high).

    P prompts are drawn with replacement, 2000 times; the interval holds the middle 95 % of the
    means. Example: values that are all 0.5 give (0.5, 0.5, 0.5).
    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile).
    """
    values = np.asarray(values, dtype=np.float64)
    P = len(values)
    check(P > 0, "expected the values of at least one prompt, found none")
    stream, means = np.random.default_rng(seed), np.empty(RESAMPLES)
    block = max(1, 2**22 // P)                           # resamples at a time, to bound the memory
    for first in range(0, RESAMPLES, block):
        count = min(block, RESAMPLES - first)
        picks = stream.integers(P, size=(count, P))                                 # (count, P)
        means[first:first + count] = values[picks].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def interval(values: np.ndarray, seed: int = 0) -> dict[str, float]:
    """`bootstrap_interval` as reports hold it: {"mean", "low", "high"}."""
    return dict(zip(("mean", "low", "high"), bootstrap_interval(values, seed)))


# ---- collecting ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Answers:
    """K responses of one policy to each of P prompts."""
    prompts: list[Prompt]               # P
    responses: list[list[list[int]]]    # P x K token ids, the end token included where chosen
    texts: list[list[str]]              # P x K
    lengths: np.ndarray                 # (P, K) tokens, the end token included
    ended: np.ndarray                   # (P, K) bool: the end token was chosen


def load_policy(folder: str, tokenizer: Tokenizer | None = None) -> tuple[GPT2, Tokenizer]:
    """A policy and its tokenizer, which must be `tokenizer` where one is given."""
    folder = find_folder(folder)
    policy = load_network(GPT2, folder)
    own = load_tokenizer(folder, policy)
    check(tokenizer is None or own == tokenizer, f"{folder}: expected the vocabulary "
          "of the policy it is compared with, found another; compare policies of one base model")
    return policy.requires_grad_(False), own


def sample_answers(policy: GPT2, tokenizer: Tokenizer, prompts: list[Prompt], answers: int, *,
                   max_new_tokens: int = 32, batch_size: int = 256, seed: int = 0,
                   stream: int = 0) -> Answers:
    """Draw `answers` responses to each prompt at temperature 1.

    careful: sets of answers that are compared need different `stream` numbers. With the same one a
    policy's second set is its first again, and the control is 0.5 whatever is broken.
    """
    P, K = len(prompts), answers
    order = sorted(range(P * K), key=lambda row: len(prompts[row // K]))        # little padding
    responses, ended = [[[]] * K for _ in range(P)], np.zeros((P, K), dtype=bool)
    told = time.perf_counter()
    for first in range(0, P * K, batch_size):
        rows = order[first:first + batch_size]
        made = generate(policy, [prompts[row // K].ids for row in rows], max_new_tokens,
                        end_token=tokenizer.end_token,
                        generator=random_stream(seed, 3, stream, first))
        ids, stops = made.ids.tolist(), made.lengths.tolist()
        for i, row in enumerate(rows):
            responses[row // K][row % K] = ids[i][len(prompts[row // K]):stops[i]]
            ended[row // K, row % K] = bool(made.ended[i])
        if time.perf_counter() - told > 10:
            print(f"  {first + len(rows)} of {P * K} answers", flush=True)
            told = time.perf_counter()
    texts = [[tokenizer.decode(ids).strip() for ids in drawn] for drawn in responses]
    lengths = np.array([[len(ids) for ids in drawn] for drawn in responses])        # (P, K)
    return Answers(prompts, responses, texts, lengths, ended)


def pair_up(a: Answers, b: Answers) -> list[dict]:
    """The first answers of two policies to the same prompts, as a person's questions hold them."""
    return [{"prompt": prompt.text, "answer_a": a.texts[p][0], "answer_b": b.texts[p][0],
             "ended_a": bool(a.ended[p, 0]), "ended_b": bool(b.ended[p, 0])}
            for p, prompt in enumerate(a.prompts)]


# ---- figures: one number for each answer, (P, K) -------------------------------------------------

def batches(answers: Answers, fill: int) -> Iterator[tuple]:
    """All answers as padded rows of similar length: (positions, ids, prompt_lengths, lengths)."""
    K = answers.lengths.shape[1]
    starts = np.array([len(prompt) for prompt in answers.prompts])                  # (P,)
    order = np.argsort((starts[:, None] + answers.lengths).ravel(), kind="stable")  # (P*K,)
    for first in range(0, len(order), SCORED_ROWS):
        rows = order[first:first + SCORED_ROWS]                                     # (B,) of P*K
        joined = [answers.prompts[p].ids + answers.responses[p][k]
                  for p, k in zip(rows // K, rows % K)]
        ids, lengths = pad(joined, fill)                                            # (B, T), (B,)
        yield rows, ids, torch.tensor(starts[rows // K]), lengths


def judge_answers(answers: Answers, reward_function, tokenizer: Tokenizer) -> np.ndarray:
    """Scores (P, K) by any function ids, prompt_lengths, lengths, tokenizer -> scores (B,)."""
    scores = np.empty(answers.lengths.size)                                         # (P*K,)
    for rows, ids, prompt_lengths, lengths in batches(answers, tokenizer.end_token):
        with torch.no_grad():
            some = reward_function(ids, prompt_lengths, lengths, tokenizer)         # (B,)
        check(some.shape == (len(rows),) and bool(torch.isfinite(some).all()), f"expected "
              f"{len(rows)} finite scores from the judge, found shape {tuple(some.shape)} and "
              f"values such as {some.flatten()[:3].tolist()}")
        scores[rows] = some.double().numpy()
    return scores.reshape(answers.lengths.shape)


def gold_figures(answers: Answers) -> dict[str, np.ndarray]:
    """What the gold judge of the text world says: gold, answered and fully_right, (P, K) each."""
    verdicts = [[judge(prompt.text, text, bool(end)) for text, end in zip(texts, ends)]
             for prompt, texts, ends in zip(answers.prompts, answers.texts, answers.ended)]
    return {"gold": np.array([[one.score for one in row] for row in verdicts]),
            "answered": np.array([[float(one.answered) for one in row] for row in verdicts]),
            "fully_right": np.array([[float(one.right) for one in row] for row in verdicts])}


def kl_to_reference(policy: GPT2, ref_policy: GPT2, answers: Answers) -> np.ndarray:
    """Sum over each answer's tokens of logprobs - ref_logprobs, (P, K) nats: the k1 estimate.

    The mean over answers that `policy` drew itself estimates KL(policy || ref_policy).
    """
    sums = np.empty(answers.lengths.size)                                           # (P*K,)
    for rows, ids, prompt_lengths, lengths in batches(answers, 0):
        mask = response_mask(prompt_lengths, lengths, ids.shape[1])                 # (B, T-1)
        with torch.no_grad():
            logprobs, _ = token_logprobs(policy.hidden(ids), ids, mask, policy.wte.weight)
            ref_logprobs, _ = token_logprobs(ref_policy.hidden(ids), ids, mask,
                                             ref_policy.wte.weight)                 # (B, T-1)
        sums[rows] = (logprobs - ref_logprobs).sum(dim=1).double().numpy()
    return sums.reshape(answers.lengths.shape)


# ---- reports -------------------------------------------------------------------------------------

def describe(answers: Answers, figures: dict[str, np.ndarray], *, seed: int = 0,
             against: dict[str, np.ndarray] | None = None, judged_by: str = "gold") -> dict:
    """Means of all figures with length, distinct and end_rate; and the same by kind of prompt.

    figures: name -> (P, K). With `against`, the figures of another policy's answers to the same
    prompts, also the win rate over it by the figure `judged_by`: {"mean", "low", "high"}.
    `distinct` is the share of different texts among all: near 0 when every answer is the same.
    """
    kinds = np.array([prompt.kind for prompt in answers.prompts])                   # (P,)
    parts = {"": np.ones(len(kinds), dtype=bool)}                                   # all prompts
    parts.update((str(kind), kinds == kind) for kind in np.unique(kinds) if kind)
    reports = {}
    for kind, chosen in parts.items():
        texts = [text for p in np.flatnonzero(chosen) for text in answers.texts[p]]
        means = {name: float(values[chosen].mean()) for name, values in figures.items()}
        means["length"] = float(answers.lengths[chosen].mean())
        means["distinct"] = len(set(texts)) / len(texts)
        means["end_rate"] = float(answers.ended[chosen].mean())
        if against is not None:
            rates = win_rate(against[judged_by], figures[judged_by])                # (P,)
            means["win_rate"] = interval(rates[chosen], seed)
        reports[kind] = means
    result = reports.pop("")
    return {**result, "by_kind": reports} if reports else result


COLUMNS = ("gold", "score", "answered", "fully_right", "kl_ref", "length", "distinct", "end_rate",
           "win_rate")


def table(policies: dict[str, dict]) -> str:
    """What `describe` gave for each named policy, as text, with a line for each kind of prompt."""
    rows = []
    for name, report in policies.items():
        rows.append((name, report))
        rows += [(f"  {kind}", part) for kind, part in report.get("by_kind", {}).items()]
    columns = [column for column in COLUMNS if any(column in report for _, report in rows)]
    widths = [19 if column == "win_rate" else max(8, len(column) + 2) for column in columns]
    first = max(len(name) for name, _ in rows)
    lines = [" " * first + "".join(f"{column:>{w}}" for column, w in zip(columns, widths))]
    for name, report in rows:
        cells = [f"{cell(report.get(column)):>{w}}" for column, w in zip(columns, widths)]
        lines.append(f"{name:{first}}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def cell(value: float | dict | None) -> str:
    """A figure in a table: 0.80, or with its interval 0.80 [0.77, 0.83]; empty where unknown."""
    if isinstance(value, dict):
        return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
    return "" if value is None else f"{round(value, 2) + 0.0:.2f}"         # + 0.0: never -0.00


def side_by_side(a: Answers, b: Answers, scores_a: np.ndarray, scores_b: np.ndarray, count: int,
                 seed: int = 0) -> list[dict]:
    """The first answers of both policies to `count` prompts that are drawn by seed."""
    picks = torch.randperm(len(a.prompts), generator=random_stream(seed, 5))[:count].tolist()
    return [{"prompt": shown(a.prompts[p].text), "a": shown(a.texts[p][0], a.ended[p, 0]),
             "b": shown(b.texts[p][0], b.ended[p, 0]), "score_a": float(scores_a[p, 0]),
             "score_b": float(scores_b[p, 0])} for p in picks]


# ---- main ----------------------------------------------------------------------------------------

def compare(cfg: EvaluateConfig, policies: dict[str, GPT2], tokenizer: Tokenizer,
            prompts: list[Prompt], reward_function) -> dict:
    """Sample a, a again and b once, judge and describe them; policies: "a", "b", maybe "ref"."""
    gold = reward_function is None
    judged_by = "gold" if gold else "score"
    for prompt in prompts if gold else []:
        judge(prompt.text, "")                           # refuses other prompts before the sampling
    answers, figures, result = {}, {}, {}
    for stream, name in enumerate(("a", "a_again", "b")):
        started, policy = time.perf_counter(), policies[name[0]]
        drawn = sample_answers(policy, tokenizer, prompts, cfg.answers, batch_size=cfg.batch_size,
                               max_new_tokens=cfg.max_new_tokens, seed=cfg.seed, stream=stream)
        if gold:
            measured = gold_figures(drawn)
        else:
            measured = {"score": judge_answers(drawn, reward_function, tokenizer)}
        if "ref" in policies:
            measured["kl_ref"] = kl_to_reference(policy, policies["ref"], drawn)
        answers[name], figures[name] = drawn, measured
        result[name] = describe(drawn, measured, seed=cfg.seed, judged_by=judged_by,
                                against=None if name == "a" else figures["a"])
        print(f"  {name}: {drawn.lengths.size} answers in {time.perf_counter() - started:.1f} s",
              flush=True)
    result["win_rate"], result["control"] = result["b"]["win_rate"], result["a_again"]["win_rate"]
    result["samples"] = side_by_side(answers["a"], answers["b"], figures["a"][judged_by],
                                     figures["b"][judged_by], cfg.samples, cfg.seed)
    print(table({f"a = {cfg.a}": result["a"], "a again, the control": result["a_again"],
                 f"b = {cfg.b}": result["b"]}))
    for sample in result["samples"]:
        prompt, *texts = [sample[name].replace("\n", " | ") for name in ("prompt", "a", "b")]
        print(f"\n{prompt}\n  a [{sample['score_a']:5.2f}] {texts[0]}\n  b "
              f"[{sample['score_b']:5.2f}] {texts[1]}")
    return result


def compare_by_person(cfg: EvaluateConfig, policies: dict[str, GPT2], tokenizer: Tokenizer,
                      prompts: list[Prompt]) -> dict:
    """Let a person choose between one answer of a and one of b to each prompt."""
    a, b = [sample_answers(policies[name], tokenizer, prompts, 1, batch_size=cfg.batch_size,
                           max_new_tokens=cfg.max_new_tokens, seed=cfg.seed, stream=stream)
            for stream, name in enumerate("ab")]
    setup = {"a": cfg.a, "b": cfg.b, "prompts": cfg.prompts, "seed": cfg.seed}
    questions = make_questions(pair_up(a, b), setup)
    file = VerdictFile(os.path.join(cfg.out, "human.jsonl"))
    check_setup(file, questions)
    verdicts = judge_by_person(questions, file)
    rates = np.array([POINTS[verdict] for verdict in verdicts if verdict in POINTS])    # (judged,)
    result = {"pairs": len(questions), "judged": len(rates), "ties": int((rates == 0.5).sum())}
    if len(rates) > 0:
        result["win_rate"] = interval(rates, cfg.seed)
    print(f"{len(rates)} of {len(questions)} pairs judged; b ({cfg.b}) wins "
          f"{cell(result.get('win_rate')) or 'unknown'} over a ({cfg.a})")
    for name, drawn in (("a", a), ("b", b)):             # after the verdicts: judging stays blind
        figures = {}
        if "ref" in policies:
            figures["kl_ref"] = kl_to_reference(policies[name], policies["ref"], drawn)
        result[name] = describe(drawn, figures, seed=cfg.seed)
    print(table({f"a = {cfg.a}": result["a"], f"b = {cfg.b}": result["b"]}))
    return result


def main(cfg: EvaluateConfig) -> dict:
    """Compare b with a; returns what evaluation.json holds."""
    policy_a, tokenizer = load_policy(cfg.a)
    policies = {"a": policy_a, "b": load_policy(cfg.b, tokenizer)[0]}
    if cfg.ref:
        policies["ref"] = load_policy(cfg.ref, tokenizer)[0]
    reward_function = None
    if cfg.judge not in ("gold", "person"):
        reward_function = load_reward(cfg.judge, cfg.ensemble, tokenizer, option="--judge")
    networks = [*policies.values(), *getattr(reward_function, "models", [])]
    context = min(network.config.n_positions for network in networks)
    prompts, too_long = read_prompts(cfg.prompts, tokenizer, context, cfg.max_new_tokens,
                                     count=cfg.prompt_count, seed=cfg.seed)
    print(f"judge: {cfg.judge}", flush=True)
    try_once(prompts[0].ids, tokenizer, reward_function)
    with result_folder(cfg.out):
        if cfg.judge == "person":
            result = compare_by_person(cfg, policies, tokenizer, prompts)
        else:
            result = compare(cfg, policies, tokenizer, prompts, reward_function)
        result = {"prompts": len(prompts), "too_long": too_long, **result, "config": asdict(cfg)}
        if cfg.out:
            write_json(os.path.join(cfg.out, "evaluation.json"), result)
    return result


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(EvaluateConfig))
