"""Best of k, and rejection sampling: SFT on the best of k responses of the policy itself.

    python -m minirlhf.siblings.rejection
    python -m minirlhf.siblings.rejection --keep random --out checkpoints/rejection_control

In:  an SFT folder, a reward, and prompts. Out: a checkpoint folder with the policy, `metrics.csv`
     and `samples.txt` with kept responses.

The algorithm, once per round:
    sample k responses to each of some prompts from the policy as it is now, and score them
    keep the best response to each prompt                                              (`choose`)
    train on what was kept, by the loss and the step of SFT                      (`sft.train_step`)

Choices and deviations:
 1. `--keep random` keeps one of the k by chance: the control. What it gains is no merit of the
    reward.
 2. Only responses that ended are kept: one that was cut off would teach to go on without an end. A
    prompt whose responses all ran into the limit is left out and counted.
 3. The best is taken per prompt. The best of all would be those of the easiest prompts.
 4. With one round this is best-of-k put into the weights; with several it is expert iteration. The
    optimiser and its learning rate go on from round to round.
 5. There is no KL penalty and no reference. Best-of-k is at most log k - (k-1)/k nats from the
    policy that is sampled (`lab.best_of_n`), and few passes do not go far beyond it.
 6. One process, without torchrun. A checkpoint comes after a whole round.

Shapes: P prompts of a round, k responses to each; B = P k sequences, T tokens in the padded row.
Lecture: lectures/09-what-came-after.md, "Best of n, and training on it".
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from minirlhf import sft
from minirlhf.data import read_prompts, response_mask
from minirlhf.engine import parallel, training
from minirlhf.engine.fields import Amount, Count, Device, Natural, Positive, Precision, Rate, Seed
from minirlhf.engine.options import check, one_sentence, parse_config
from minirlhf.engine.run_folder import RunFolder, begin, check_run_options
from minirlhf.engine.state import run_inputs
from minirlhf.engine.training import random_stream
from minirlhf.files.pretrained import load_network
from minirlhf.generate import generate
from minirlhf.gpt2 import GPT2
from minirlhf.ppo_report import totals
from minirlhf.rewards import Ensemble, load_gold, load_reward, reward_folders, try_once
from minirlhf.tokenizer import Tokenizer, load_tokenizer

SAMPLED_ROWS = 256                      # rows sampled at a time


@dataclass(frozen=True)
class RejectionConfig:
    """Options of `python -m minirlhf.siblings.rejection`."""
    keep: Literal["best", "random"] = "best"    # which of the k; random: the control
    model: str = "checkpoints/sft"      # SFT folder: start of the policy
    reward: str = "checkpoints/reward_model"    # folder, folders with commas, or module:function
    ensemble: Ensemble = "mean"    # how several reward models vote
    prompts: str = "minirlhf.world:prompts"     # .jsonl file, or module:function giving records
    prompt_count: Natural = 4000        # prompts to draw from; 0: all that the file has
    gold: str = "minirlhf.world:gold_reward"    # module:function, logged and never optimised
    out: str = "checkpoints/rejection"  # folder to write
    rounds: Count = 4                   # each samples from the policy as it is then
    prompts_per_round: Count = 100      # P, prompts of a round
    k: Count = 4                        # responses to each, of which one is kept
    max_new_tokens: Count = 32          # longest response, tokens
    temperature: Positive = 1.0         # of sampling
    epochs: Count = 2                   # passes over what a round kept
    batch_size: Count = 16              # kept responses per optimiser step
    lr: Rate = 3e-4                     # peak learning rate
    warmup_steps: Natural = 3           # steps of linear warm-up, then linear down to 0
    weight_decay: Rate = 0.01           # AdamW's
    missing_end_penalty: Amount = 1.0   # taken off the score of a response that does not end
    max_grad_norm: Positive = 1.0       # gradients are clipped to this norm
    accumulation: Count = 1             # parts that a step's batch is cut into, to save memory
    checkpointing: bool = False         # compute each layer twice, to save memory
    dtype: Precision = "float32"        # of matrix products
    device: Device = "cpu"              # where to compute
    save_every: Count = 1               # rounds between checkpoints
    resume: bool = False                # go on from the last checkpoint of --out
    seed: Seed = 0                      # of prompts, samples and batches

    def __post_init__(self):
        check_run_options(self)
        check(self.k > 1, f"--k is {self.k}, expected at least 2: of one response there is no best")


METRICS = ["round",           # rounds before this one
           "score",           # mean reward of all sampled responses, missing-end penalty included
           "score_kept",      # mean reward of the kept ones
           "gold",            # mean of the gold judge over all; empty without one
           "gold_kept",       # mean of the gold judge over the kept ones
           "kept",            # kept responses
           "dropped",         # prompts of which no response ended
           "loss",            # SFT loss of what was kept, mean over the round's steps
           "response_len",    # mean length of all sampled responses in tokens
           "end_rate",        # share of all sampled responses that chose the end token
           "sampled_tokens",  # response tokens that were sampled so far, this round included
           "grad_norm",       # before clipping, mean over steps
           "lr"]              # learning rate of the round's last step


# ---- the mathematics -----------------------------------------------------------------------------

def choose(scores: torch.Tensor, allowed: torch.Tensor, keep: str,
           generator: torch.Generator | None = None) -> torch.Tensor:
    """Which of k responses is kept: scores (P, k), allowed (P, k) bool -> numbers (P,).

    "best" is the allowed response with the highest score, "random" any allowed one; -1 where none
    is allowed. Of equal scores the first counts.

    Example: scores .2 .9 .5 give 1, and 2 where the second is not allowed.
    Lecture: lectures/09-what-came-after.md, "Best of n, and training on it".
    """
    if keep == "random":
        scores = torch.rand(scores.shape, generator=generator).to(scores.device)    # (P, k)
    best = scores.masked_fill(~allowed, -math.inf).argmax(dim=1)                    # (P,)
    return torch.where(allowed.any(dim=1), best, -1)


# ---- collecting ----------------------------------------------------------------------------------

@dataclass
class Samples:
    """k responses to each of P prompts, a prompt's k rows beside one another."""
    responses: list[list[int]]          # B, the end token included where chosen
    ended: torch.Tensor                 # (B,) bool
    scores: torch.Tensor                # (B,) of the reward, less the penalty
    gold: torch.Tensor | None           # (B,) of the gold judge


def collect(policy: GPT2, reward_function, gold_function, tokenizer: Tokenizer,
            prompts: list[list[int]], cfg: RejectionConfig, number: int) -> Samples:
    """Sample k responses to each prompt in round `number`, and score them."""
    rows = [prompt for prompt in prompts for _ in range(cfg.k)]                     # B
    responses, ended, scores, gold = [], [], [], []
    for first in range(0, len(rows), SAMPLED_ROWS):
        with torch.no_grad():
            made = generate(policy, rows[first:first + SAMPLED_ROWS], cfg.max_new_tokens,
                            end_token=tokenizer.end_token, temperature=cfg.temperature,
                            generator=random_stream(cfg.seed, 1, number, first),
                            where=f"round {number}")
            some = made.ids, made.prompt_lengths, made.lengths, tokenizer
            mask = response_mask(made.prompt_lengths, made.lengths, made.ids.shape[1])  # (b, T-1)
            paid = totals(reward_function(*some), mask)                             # (b,)
            scores.append(paid - cfg.missing_end_penalty * ~made.ended)
            gold += [gold_function(*some)] if gold_function else []
        training.check_finite(f"round {number}", scores=scores[-1])
        ended.append(made.ended)
        for ids, start, stop in zip(made.ids, made.prompt_lengths, made.lengths):
            responses.append(ids[start:stop].tolist())
    golds = torch.cat(gold) if gold else None                                       # (B,)
    return Samples(responses, torch.cat(ended), torch.cat(scores), golds)


def kept_rows(samples: Samples, cfg: RejectionConfig, number: int) -> list[int]:
    """The rows of the responses that are kept, at most one per prompt."""
    shape = (-1, cfg.k)
    choices = choose(samples.scores.view(shape), samples.ended.view(shape), cfg.keep,
                     random_stream(cfg.seed, 2, number))                            # (P,)
    kept = [prompt * cfg.k + choice for prompt, choice in enumerate(choices.tolist())
            if choice >= 0]
    check(len(kept) > 0, f"round {number}: none of {len(samples.responses)} responses ended within "
          f"{cfg.max_new_tokens} tokens, so nothing can be kept; raise --max_new_tokens")
    return kept


def measure(samples: Samples, kept: list[int], cfg: RejectionConfig, sampled: int) -> dict:
    """The metrics of a round's samples; `sampled` tokens came before it."""
    lengths = [len(response) for response in samples.responses]
    row = {"score": samples.scores.mean().item(), "score_kept": samples.scores[kept].mean().item(),
           "kept": len(kept), "dropped": len(lengths) // cfg.k - len(kept),
           "response_len": sum(lengths) / len(lengths),
           "end_rate": samples.ended.float().mean().item(),
           "sampled_tokens": sampled + sum(lengths)}
    if samples.gold is not None:
        row.update(gold=samples.gold.mean().item(), gold_kept=samples.gold[kept].mean().item())
    return row


# ---- update --------------------------------------------------------------------------------------

def train(policy: GPT2, optimizer: torch.optim.Optimizer, rows: list[sft.Demonstration],
          cfg: RejectionConfig, end_token: int, number: int) -> dict:
    """Some passes over the kept responses by SFT's own step; means over the round's steps."""
    per_round = cfg.epochs * math.ceil(cfg.prompts_per_round / cfg.batch_size)
    begun, losses, norms = number * per_round, [], []
    steps = cfg.epochs * math.ceil(len(rows) / cfg.batch_size)    # fewer if prompts were dropped
    for step in range(steps):
        training.set_learning_rate(optimizer, begun + step, cfg.rounds * per_round,
                                   cfg.warmup_steps, "linear")
        order = training.batch_order(len(rows), cfg.batch_size, cfg.seed,
                                     number * steps + step)
        loss, grad_norm = sft.train_step(policy, optimizer, [rows[i] for i in order], cfg,
                                         end_token, f"round {number}, step {step}")
        losses.append(loss)
        norms.append(grad_norm)
    return {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms),
            "lr": optimizer.param_groups[0]["lr"]}


# ---- main ----------------------------------------------------------------------------------------

def main(cfg: RejectionConfig) -> dict:
    """Sample, keep, train and save; returns the last row of metrics."""
    folder = begin(cfg, cfg.model, *reward_folders(cfg.reward))
    check(parallel.processes() == 1, "rejection sampling runs in one process; start it without "
          "torchrun")
    policy = load_network(GPT2, folder).to(cfg.device)
    policy.checkpointing, policy.dtype = cfg.checkpointing, cfg.dtype
    tokenizer = load_tokenizer(folder, policy)
    reward_function = load_reward(cfg.reward, cfg.ensemble, tokenizer, cfg.device, cfg.dtype)
    models = getattr(reward_function, "models", [])
    context = min(network.config.n_positions for network in [policy, *models])
    prompts, _ = read_prompts(cfg.prompts, tokenizer, context, cfg.max_new_tokens, model=folder,
                              count=cfg.prompt_count, seed=cfg.seed, fewest=cfg.prompts_per_round)
    gold_function = load_gold(cfg.gold)
    try_once(prompts[0].ids, tokenizer, reward_function, gold_function, device=cfg.device)
    groups = [{"params": list(policy.parameters()), "peak": cfg.lr}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    inputs = run_inputs(policy, reward_function, prompts, gold_function)
    print(f"rejection sampling: {cfg.rounds} rounds of {cfg.prompts_per_round} prompts with "
          f"{cfg.k} responses each; kept per prompt: the {cfg.keep} one", flush=True)
    with RunFolder(cfg, cfg.rounds, METRICS, inputs, policy, optimizer) as run:
        for number in run.steps():
            order = training.batch_order(len(prompts), cfg.prompts_per_round, cfg.seed, number,
                                         whole=True)
            asked = [prompts[i].ids for i in order]                                 # P
            samples = collect(policy, reward_function, gold_function, tokenizer, asked, cfg, number)
            kept = kept_rows(samples, cfg, number)
            rows = [sft.Demonstration(asked[row // cfg.k], samples.responses[row]) for row in kept]
            before = measure(samples, kept, cfg, run.row.get("sampled_tokens", 0))
            after = train(policy, optimizer, rows, cfg, tokenizer.end_token, number)
            run.log({"round": number, **before, **after})
            print(f"  round {number}  score {run.row['score']:.2f} of all, "
                  f"{run.row['score_kept']:.2f} of the kept  loss {run.row['loss']:.3f}  "
                  f"{run.seconds():.1f} s", flush=True)
            shown = [tokenizer.decode(row.prompt + row.response).replace("\n", " | ")
                     for row in rows[:4]]
            run.sample(f"round {number}, kept\n  " + "\n  ".join(shown))
        training.check_frozen(*models)
        run.publish(tokenizer, policy)
    return run.row


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(RejectionConfig))
