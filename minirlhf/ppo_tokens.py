"""What a PPO run keeps for `minirlhf.page`: some responses token by token, in kept.jsonl.

Of every iteration that `--sample_every` names, but of at most 40: the first response of the
rollout, with the ratio that its update ended at; and answers of the policy after the update to the
same three prompts, sampled with the same random numbers. So between two of those answers nothing
differs but the policy. Nothing here is trained on, and no random number of the run is used.

Lecture: lectures/05-ppo-the-run.md.
"""

import math

import torch

from minirlhf import ppo_report as report
from minirlhf.engine import parallel
from minirlhf.gpt2 import behaviour_logprobs
from minirlhf.tokenizer import Tokenizer

STOPS = 40                          # iterations of which responses are kept, and the last one
PROMPTS = 3                         # prompts that the policy answers again and again
TOKENS = 64                         # of a response; the sums also count those after them
LIKELIEST = 5                       # alternatives to a token
COLUMNS = ("old_logprobs", "ref_logprobs", "kl_ref", "rewards", "old_values", "advantages",
           "returns", "entropy")
SUMMED = ("old_logprobs", "ref_logprobs", "kl_ref", "rewards")


def rounded(x: torch.Tensor) -> list:
    """Numbers as they are kept: five decimals."""
    return x.double().cpu().round(decimals=5).tolist()


def is_kept(iteration: int, iterations: int, sample_every: int) -> bool:
    """Whether responses of this iteration are kept.

    Example: of 1000 iterations with sample_every 10 every 30th is kept, and the last one.
    """
    every = sample_every * math.ceil(iterations / sample_every / STOPS)
    return iteration % every == 0 or iteration + 1 == iterations


def likeliest(logprobs: torch.Tensor, tokenizer: Tokenizer) -> list[list[list]]:
    """The likeliest tokens at each place: logprobs (n, V) -> n lists of [text, probability]."""
    top = logprobs.exp().topk(min(LIKELIEST, logprobs.shape[1]), dim=1)      # (n, 5)
    rows = zip(top.indices.tolist(), rounded(top.values))
    return [[[tokenizer.decode([token], skip_end=False), probability]
             for token, probability in zip(*row)] for row in rows]


def describe(batch, row: int, networks, ref_policy, tokenizer: Tokenizer, cfg) -> dict:
    """One response of a `ppo.Rollout` with all that PPO knows about its tokens, as plain values.

    `ratio` and the policy's alternatives are those of the policy as it is now.
    """
    ids, mask = batch.ids[row:row + 1], batch.response_mask[row:row + 1]     # (1, T), (1, T-1)
    with torch.no_grad():
        logprobs, _, _ = networks.evaluate_actions(ids, mask, cfg.temperature)      # (1, T-1)
        ratio = (logprobs - batch.old_logprobs[row])[mask].clamp(max=80).exp()          # (n,)
        choices = [behaviour_logprobs(model.logits(model.hidden(ids)[:, :-1][mask][:TOKENS]),
                                      cfg.temperature) for model in (networks.policy, ref_policy)]
    mask = mask[0]                                                           # (T-1,)
    tokens = batch.ids[row, 1:][mask].tolist()[:TOKENS]                      # (n,) at most
    columns = {name: getattr(batch, name)[row][mask] for name in COLUMNS}    # (n,) each
    return {"prompt": tokenizer.decode(batch.ids[row, :batch.prompt_lengths[row]].tolist())[:2000],
            "score": rounded(batch.scores[row]), "ended": bool(batch.ended[row]),
            "length": int(mask.sum()), "ids": tokens,
            "tokens": [tokenizer.decode([token], skip_end=False) for token in tokens],
            "sums": {name: rounded(columns[name].sum()) for name in SUMMED},
            **{name: rounded(column[:TOKENS]) for name, column in columns.items()},
            "ratio": rounded(ratio[:TOKENS]),
            "policy": likeliest(choices[0], tokenizer),
            "ref_policy": likeliest(choices[1], tokenizer)}


def show_responses(run, rollout, batch, networks, ref_policy, reward_function, gold_function,
                   tokenizer: Tokenizer, prompts: list) -> None:
    """Each `sample_every` iterations: print a token table, and keep responses for the page.

    `run` is the RunFolder, whose row of metrics is this iteration's; `rollout` is the function of
    `ppo`, `batch` what it made. All processes call this, as they call `rollout`.
    """
    cfg, iteration, kl_coef = run.cfg, run.row["iteration"], run.row["kl_coef"]
    if iteration % cfg.sample_every == 0 or iteration + 1 == cfg.iterations:
        run.sample(f"iteration {iteration}\n{report.token_table(batch, 0, tokenizer)}\n")
    if not is_kept(iteration, cfg.iterations, cfg.sample_every):
        return
    # no rollout of the run has the number cfg.iterations: its random numbers are used only here
    asked = [prompt.ids for prompt in prompts[:max(PROMPTS, parallel.processes())]]
    again = rollout(networks, ref_policy, reward_function, tokenizer, asked, cfg, kl_coef,
                    cfg.iterations)
    # whitened as if they had been in this iteration's rollout: with its mean and deviation
    errors = (batch.returns - batch.old_values)[batch.response_mask]         # (N,)
    scale = torch.rsqrt(errors.var(unbiased=False) + 1e-8)
    again.advantages = (again.returns - again.old_values - errors.mean()) * scale       # (B, T-1)
    for source, row in [(batch, 0), *((again, row) for row in range(min(PROMPTS, len(asked))))]:
        gold = None
        if gold_function is not None:
            one = slice(row, row + 1)
            gold = rounded(gold_function(source.ids[one], source.prompt_lengths[one],
                                         source.lengths[one], tokenizer)[0])
        values = describe(source, row, networks, ref_policy, tokenizer, cfg)
        if source is again:
            del values["ratio"]                          # these tokens are not trained on
        run.keep({"iteration": iteration, "asked_again": source is again, "kl_coef": kl_coef,
                  "gold": gold, **values})
