"""Answers of the runs' policies to the same prompts, side by side.

The policies are those of the given runs, and what these started from, as far as their run.json
names folders that are there: base, SFT and RLHF of a pipeline. Reward models are loaded where
run.json names their folders; a function named there is not called, for reading a run's folder runs
no code of its author.
"""

import os
from typing import get_args

import torch

from minirlhf.data import Prompt, encode_prompt, format_prompt, records
from minirlhf.engine.output import RUN_FILE
from minirlhf.evaluate import Answers, judge_answers, load_policy, sample_answers
from minirlhf.files.disk import read_json
from minirlhf.plots import names_of
from minirlhf.rewards import Ensemble, is_function, load_reward, reward_folders
from minirlhf.tokenizer import Tokenizer
from minirlhf.world import judge


def run_of(folder: str) -> dict:
    """What run.json says of a finished run; {} for another folder."""
    path = os.path.join(folder, RUN_FILE)
    run = read_json(path) if os.path.exists(path) else {}
    return run if run.get("finished") is True and isinstance(run.get("config"), dict) else {}


def start_of(folder: str) -> str:
    """The folder of the model that a run started from, if it is there; or ""."""
    model = run_of(folder).get("config", {}).get("model")
    there = isinstance(model, str) and os.path.isfile(os.path.join(model, "config.json"))
    return model if there else ""


def policies_of(sft: list[str], ppo: list[str]) -> tuple[dict[str, str], list[str]]:
    """The policies to ask, name -> folder, base models first; and what to say about others."""
    stages: dict[str, list[str]] = {"base": [], "SFT": [], "RLHF": []}
    notes = []
    for stage, folders in (("RLHF", ppo), ("SFT", sft)):
        for folder in folders:
            if not run_of(folder):
                notes.append(f"{folder} is not finished: its policy is not asked.")
                continue
            stages[stage].append(folder)
            start = start_of(folder)
            stages["SFT" if stage == "RLHF" else "base"] += [start] if start else []
    stages["base"] += [start for folder in stages["SFT"] if (start := start_of(folder))]
    named = {}
    for stage, folders in stages.items():
        different = list({os.path.realpath(folder): folder for folder in folders}.values())
        for folder, name in zip(different, names_of(different)):
            named[stage if len(different) == 1 else f"{stage} {name}"] = folder
    return named, notes


def reward_of(ppo: list[str], tokenizer: Tokenizer):
    """The reward function of the first finished PPO run whose reward models are there, or None."""
    for folder in ppo:
        options = run_of(folder).get("config", {})
        spec, how = options.get("reward"), options.get("ensemble")
        if not isinstance(spec, str) or how not in get_args(Ensemble) or is_function(spec):
            continue
        if all(os.path.isfile(os.path.join(one, "config.json")) for one in reward_folders(spec)):
            return load_reward(spec, how, tokenizer)
    return None


def gold_of(prompt: str, text: str, ended: bool) -> float | None:
    """The gold judge's score, or None for a prompt that is not of the text world."""
    try:
        return judge(prompt, text, ended).score
    except ValueError:
        return None


def answers_of(folder: str, texts: list[str], max_new_tokens: int, seed: int):
    """One answer of a policy to each prompt that leaves room for one; and its tokenizer."""
    policy, tokenizer = load_policy(folder)
    prompts = [Prompt(text, "", encode_prompt(tokenizer, text)) for text in texts]
    fitting = [prompt for prompt in prompts
               if len(prompt) + max_new_tokens <= policy.config.n_positions]
    drawn = None
    if fitting:
        drawn = sample_answers(policy, tokenizer, fitting, 1, max_new_tokens=max_new_tokens,
                               seed=seed)
    return drawn, tokenizer


def score_of(drawn: Answers, reward_function, tokenizer: Tokenizer) -> list[float | None]:
    """A score for every answer, None without reward models or in a context too short for them."""
    models = [] if reward_function is None else reward_function.models
    longest = max(len(prompt) for prompt in drawn.prompts) + int(drawn.lengths.max())
    if not models or longest > min(model.config.n_positions for model in models):
        return [None] * len(drawn.prompts)
    with torch.no_grad():
        return judge_answers(drawn, reward_function, tokenizer)[:, 0].tolist()


def answer_prompts(sft: list[str], ppo: list[str], *, prompt: str, prompts: str, count: int,
                   max_new_tokens: int, seed: int) -> tuple[list[dict], list[str]]:
    """Every policy's answer to every prompt: [{"prompt", "answers": [...]}], and notes.

    An answer is {"policy", "text", "ended", "gold", "score"}; the last two may be None.
    """
    named, notes = policies_of(sft, ppo)
    texts = [format_prompt(prompt)] if prompt else []
    if count > 0 and named:
        found = records(prompts, "all", count=count, seed=seed)
        texts += [record["prompt"] for record in found][:count]
    asked: dict[str, list[dict]] = {text: [] for text in texts}
    reward_function = scored_with = None
    for name, folder in named.items() if texts else []:
        drawn, tokenizer = answers_of(folder, texts, max_new_tokens, seed)
        if drawn is None:
            notes.append(f"{name}: no prompt leaves room for {max_new_tokens} new tokens.")
            continue
        if scored_with is None:
            reward_function, scored_with = reward_of(ppo, tokenizer), tokenizer
        fits = scored_with == tokenizer
        scores = score_of(drawn, reward_function if fits else None, tokenizer)
        for one, (text,), (ended,), score in zip(drawn.prompts, drawn.texts, drawn.ended, scores):
            asked[one.text].append({
                "policy": name, "text": text, "ended": bool(ended), "score": score,
                "gold": gold_of(one.text, text, bool(ended))})
    return [{"prompt": text, "answers": drawn} for text, drawn in asked.items() if drawn], notes
