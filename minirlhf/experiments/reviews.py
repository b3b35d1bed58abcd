"""Learn from real human judgements: film reviews with ratings, through all three stages, offline.

    python -m minirlhf.experiments.reviews --data movieReviewSnippets_GroundTruth.txt

In:  sentences from film reviews, each with the mean of some 20 people's ratings from -4 to 4 (Hutto
     and Gilbert 2014): lines of id, rating and text between tabs, with or without a header. Out: a
     folder with the data files and checkpoints of every stage, and `report.json`.

The task is that of Ziegler et al. 2019 (arXiv 1909.08593): continue a text so that people like it.
A prompt is an opening, the first one to three words of a sentence; a response is the rest.
    1. Split the sentences into parts A, B and test. No sentence is in two of them.
    2. Pretrain a small GPT-2 and its BPE on the text of A and B.
    3. SFT on the same sentences, opening -> rest: here the policy learns the format.
    4. Two sentences with the same opening whose ratings lie at least 1 apart are a comparison.
       Reward model A learns from those of part A, reward model B from those of part B.
    5. PPO raises the score of A. B is a judge that nothing optimises: if A learned people's taste,
       B's score rises too; if PPO found A's quirks, it does not.
The trainers are the ordinary ones and read ordinary files; only the files are made here.

Choices:
 1. An opening is the longest beginning of at most three words that ten sentences of A and B share.
    A sentence without one is whole the response, to the prompt "...".
 2. Every sentence has one opening, so the comparisons that a trainer holds out (whole prompts) are
    of sentences that it does not train on. The test pairs are of sentences that no stage has seen.
 3. What is measured, and beside what, is in `review_figures.py`.
"""

import html
import json
import math
import os
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass

import torch

from minirlhf import ppo, pretrain, reward_model, sft
from minirlhf.engine.fields import Natural, check_fields
from minirlhf.engine.options import check, one_sentence, parse_config
from minirlhf.engine.training import random_stream
from minirlhf.experiments.review_figures import (
    FREE,
    Pair,
    Sentence,
    measure_pairs,
    measure_policies,
    print_report,
)
from minirlhf.files.disk import open_regular, short, write_atomically, write_json

SOURCE = ("get additional_resources/hutto_ICWSM_2014.tar.gz from "
          "github.com/cjhutto/vaderSentiment, unpack it, and name its "
          "movieReviewSnippets_GroundTruth.txt by --data")
MAX_FILE = 1 << 26              # bytes; the published one has 1.4 million
SHARED_BY = 10                  # sentences that make a beginning an opening
OPENING_WORDS = 3               # longest opening
MARGIN = 1.0                    # least difference of two ratings in a comparison
SHARES = {"a": 0.45, "b": 0.40, "test": 0.15}       # of the sentences


@dataclass(frozen=True)
class ReviewsConfig:
    """Options of `python -m minirlhf.experiments.reviews`."""
    data: str = "movieReviewSnippets_GroundTruth.txt"    # id, mean rating, text between tabs
    out: str = "checkpoints/reviews"    # folder to write
    quick: bool = False                 # less of everything, clearly worse: under a minute
    seed: Natural = 0                   # of the split, the comparisons and all stages

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class Sizes:
    """How much work each stage does; from a few trials that looked at the test pairs of seed 0."""
    vocab_size: int = 3000              # of the BPE
    n_embd: int = 96                    # channels C
    n_layer: int = 2
    context: int = 80                   # tokens
    pretrain_steps: int = 1000
    sft_epochs: int = 2
    pairs: int = 3                      # comparisons that each sentence starts; it is in about 6
    reward_lr: float = 1e-3
    iterations: int = 30                # of PPO
    kl_coef: float = 0.1
    max_new_tokens: int = 40            # longest response that is sampled, tokens
    answers: int = 400                  # fresh responses of each policy, to held-out openings


QUICK = Sizes(vocab_size=2000, n_embd=48, n_layer=1, context=64, pretrain_steps=150, sft_epochs=1,
              pairs=2, iterations=6, answers=100)


# ---- ratings -------------------------------------------------------------------------------------

def read_ratings(path: str) -> list[Sentence]:
    """The sentences of a ratings file; of equal ones only the first.

    Raises: ValueError "file:line: expected ..., found ...".
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist; {SOURCE}")
    with open_regular(path) as file:
        data = file.read(MAX_FILE + 1)
    check(len(data) <= MAX_FILE, f"{path}: expected at most {MAX_FILE} bytes, found more")
    try:
        lines = data.decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: expected UTF-8 text, found {error.object[error.start]:#x}"
                         ) from None
    sentences = {}
    for number, line in enumerate(lines, start=1):
        fields = line.removesuffix("\r").split("\t")
        if number == 1 and fields[0].lower() == "id":
            continue                                     # the header
        sentence = read_sentence(fields, f"{path}:{number}")
        sentences.setdefault(sentence.text.lower(), sentence)
    return list(sentences.values())


def read_sentence(fields: list[str], place: str) -> Sentence:
    """One line's sentence; HTML entities become characters and runs of white space one space."""
    check(len(fields) == 3, f"{place}: expected id, mean rating and text between tabs, found "
          f"{len(fields)} fields: {short(fields)}")
    try:
        rating = float(fields[1])
    except ValueError:
        rating = math.nan
    check(-4 <= rating <= 4,
          f"{place}: expected a mean rating from -4 to 4, found {short(fields[1])}")
    text = " ".join(html.unescape(fields[2]).split())
    check(bool(text), f"{place}: expected text, found none")
    return Sentence(text, rating)


def split_sentences(sentences: list[Sentence], seed: int) -> dict[str, list[Sentence]]:
    """Parts "a", "b" and "test", with opening and rest; the openings are those of A and B."""
    order = torch.randperm(len(sentences), generator=random_stream(seed, 0)).tolist()
    parts, first = {}, 0
    for name, share in SHARES.items():
        count = len(order) - first if name == "test" else int(share * len(order))
        parts[name] = [sentences[i] for i in order[first:first + count]]
        first += count
    openings = find_openings([sentence.text for sentence in parts["a"] + parts["b"]])
    return {name: [cut(sentence, openings) for sentence in part] for name, part in parts.items()}


def beginnings(text: str) -> list[str]:
    """What could open `text`, longest first; at least one word is left for the rest.

    Example: beginnings("It is a joy!") == ["It is a", "It is", "It"]; of "... a joy" none.
    """
    words = text.split()
    if words[0].startswith(FREE):
        return []
    return [" ".join(words[:n]) for n in range(min(OPENING_WORDS, len(words) - 1), 0, -1)]


def find_openings(texts: list[str]) -> set[str]:
    """The beginnings that at least `SHARED_BY` texts share."""
    counts = Counter(beginning for text in texts for beginning in beginnings(text))
    return {beginning for beginning, count in counts.items() if count >= SHARED_BY}


def cut(sentence: Sentence, openings: set[str]) -> Sentence:
    """Fill in opening and rest: the longest beginning in `openings`, else `FREE` and the whole."""
    for beginning in beginnings(sentence.text):
        if beginning in openings:
            return Sentence(sentence.text, sentence.rating, beginning,
                            sentence.text[len(beginning):].strip())
    return Sentence(sentence.text, sentence.rating, FREE, sentence.text)


# ---- comparisons ---------------------------------------------------------------------------------

def make_pairs(sentences: list[Sentence], each: int, generator: torch.Generator) -> list[Pair]:
    """For every sentence `each` random partners with its opening and another rating; no pair twice.

    Pairs come in groups by opening, the largest first, so that a trainer that puts the last prompts
    aside holds out many rare openings and not one frequent one.
    """
    groups = defaultdict(list)
    for sentence in sentences:
        groups[sentence.opening].append(sentence)
    pairs = []
    for opening in sorted(groups, key=lambda name: (-len(groups[name]), name)):
        group, drawn = groups[opening], {}
        ratings = torch.tensor([sentence.rating for sentence in group])              # (N,)
        for i in range(len(group)):
            others = ((ratings - ratings[i]).abs() >= MARGIN).nonzero().squeeze(1)   # (M,)
            picks = torch.randperm(len(others), generator=generator)[:each]
            for j in others[picks].tolist():
                better, worse = (i, j) if ratings[i] > ratings[j] else (j, i)
                drawn[better, worse] = Pair(group[better], group[worse])
        pairs += drawn.values()
    check(len(pairs) > 0, f"{len(sentences)} sentences with no two that have one opening and "
          f"ratings {MARGIN} apart; expected more sentences")
    return pairs


# ---- files ---------------------------------------------------------------------------------------

def write_rows(path: str, rows: list[dict]) -> None:
    """One JSON object per line."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomically(path, "".join(lines).encode("utf-8"))


def write_files(parts: dict[str, list[Sentence]], cfg: ReviewsConfig, sizes: Sizes) -> list[Pair]:
    """The data files of all stages; returns the test pairs."""
    seen, folder = parts["a"] + parts["b"], cfg.out
    os.makedirs(folder, exist_ok=True)
    text = "\n\n".join(sentence.text for sentence in seen)
    write_atomically(os.path.join(folder, "text.txt"), text.encode("utf-8"))
    write_rows(os.path.join(folder, "demonstrations.jsonl"),
               [{"prompt": sentence.opening, "response": sentence.rest} for sentence in seen])
    for number, name in enumerate(("a", "b", "test"), start=1):
        each = sizes.pairs if name != "test" else 4
        pairs = make_pairs(parts[name], each, random_stream(cfg.seed, number))
        write_rows(os.path.join(folder, f"comparisons_{name}.jsonl"),
                   [{"prompt": pair.better.opening, "chosen": pair.better.rest,
                     "rejected": pair.worse.rest} for pair in pairs])
    write_rows(os.path.join(folder, "prompts.jsonl"),
               [{"prompt": sentence.opening} for sentence in seen])
    write_rows(os.path.join(folder, "held_out_prompts.jsonl"),
               [{"prompt": sentence.opening} for sentence in parts["test"][:sizes.answers]])
    return pairs


# ---- the stages ----------------------------------------------------------------------------------

def configs(cfg: ReviewsConfig, sizes: Sizes, sentences: int) -> dict[str, tuple]:
    """Every stage's main function and its config; the files are those that `write_files` wrote."""
    folder = os.path.join(cfg.out, "{}").format
    stages = {
        "pretrain": (pretrain.main, pretrain.PretrainConfig(
            text=folder("text.txt"), out=folder("base"), vocab_size=sizes.vocab_size,
            n_embd=sizes.n_embd, n_layer=sizes.n_layer, n_head=sizes.n_embd // 16,
            context=sizes.context, steps=sizes.pretrain_steps, warmup_steps=50,
            save_every=max(1, sizes.pretrain_steps // 4), seed=cfg.seed)),
        "sft": (sft.main, sft.SFTConfig(
            model=folder("base"), data=folder("demonstrations.jsonl"), examples=0,
            held_out=sentences // 50, in_order=True, epochs=sizes.sft_epochs,
            max_new_tokens=sizes.max_new_tokens, eval_every=100, out=folder("sft"),
            seed=cfg.seed))}
    for name in ("a", "b"):
        stages[f"reward model {name.upper()}"] = (reward_model.main, reward_model.RewardModelConfig(
            model=folder("sft"), data=folder(f"comparisons_{name}.jsonl"), comparisons=0,
            held_out=sentences // 30, in_order=True, lr=sizes.reward_lr,
            max_new_tokens=sizes.max_new_tokens, eval_every=100,
            out=folder(f"reward_model_{name}"), seed=cfg.seed))
    stages["PPO"] = (ppo.main, ppo.PPOConfig(
        model=folder("sft"), reward=folder("reward_model_a"), prompts=folder("prompts.jsonl"),
        prompt_count=0, gold="", iterations=sizes.iterations, kl_coef=sizes.kl_coef,
        max_new_tokens=sizes.max_new_tokens, out=folder("ppo"), seed=cfg.seed))
    return stages


# ---- main ----------------------------------------------------------------------------------------

def main(cfg: ReviewsConfig, sizes: Sizes | None = None) -> dict:
    """Run everything, print the tables, write `report.json`; returns what it holds."""
    sizes = sizes or (QUICK if cfg.quick else Sizes())
    sentences = read_ratings(cfg.data)
    parts = split_sentences(sentences, cfg.seed)
    pairs = write_files(parts, cfg, sizes)
    print(f"{len(sentences)} sentences: " + ", ".join(f"{len(part)} {name}"
                                                      for name, part in parts.items()), flush=True)
    seconds = {}
    for name, (stage_main, stage_cfg) in configs(cfg, sizes, len(sentences)).items():
        print(f"\n---- {name}", flush=True)
        started = time.perf_counter()
        stage_main(stage_cfg)
        seconds[name] = time.perf_counter() - started
    started = time.perf_counter()
    accuracies, scale = measure_pairs(parts, pairs, cfg.out, cfg.seed)
    policies = measure_policies(parts, cfg.out, cfg.seed, sizes.answers, sizes.max_new_tokens)
    seconds["measuring"] = time.perf_counter() - started
    report = {"sentences": {name: len(part) for name, part in parts.items()}, "seed": cfg.seed,
              "quick": cfg.quick, "sizes": asdict(sizes), "accuracy": accuracies,
              "scale": scale, "policies": policies, "seconds": seconds}
    write_json(os.path.join(cfg.out, "report.json"), report)
    print_report(report)
    return report


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(ReviewsConfig))
