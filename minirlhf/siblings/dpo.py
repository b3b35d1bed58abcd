"""Comparisons without a reward model: DPO, IPO and KTO train the policy itself on them.

    python -m minirlhf.siblings.dpo
    python -m minirlhf.siblings.dpo --loss kto --data comparisons.jsonl --out checkpoints/kto

In:  an SFT folder (start of the policy, and the frozen reference) and comparisons, the same as
     those of the reward model. Out: a checkpoint folder with the policy, and `metrics.csv`.

The algorithm: of every response, the log-ratio r = log pi(response) - log ref(response), summed
over its tokens. beta r takes the place of the reward model's score:
    dpo       -log sigmoid(beta h), h = r of the chosen - r of the rejected response
    ipo       (h - 1 / (2 beta))^2: a target for h in place of a push without end
    ipo_mean  the same with each r divided by the response's number of tokens
    kto       1 - sigmoid(beta (r - z0)) for a chosen, 1 - sigmoid(beta (z0 - r)) for a rejected
              response, each by itself; z0 is a KL estimated from responses to other prompts

Choices and deviations:
 1. Log-probabilities are sums over the response, the end token included; the prompt is context.
 2. At the first step policy and reference are equal, so the loss is known: ln 2 for dpo, 1/2 for
    kto, 1 / (2 beta)^2 for ipo. The run stops if it is not.
 3. AdamW, as in the other stages; DPO's paper has RMSprop (and batches of 64, 150 warm-up steps).
 4. IPO's paper does not say whether r is a sum or a mean over tokens: both are here, by name.
 5. KTO sees each comparison as two examples, one good, one bad, so both weights lambda are 1. z0
    pairs each prompt with the next row's responses; a pair with an equal prompt is left out, and a
    batch without any other pair is refused.
 6. The rows that do not fill an epoch's last batch wait for the next epoch.

Shapes: B comparisons, T tokens in the padded row.
Lecture: lectures/09-what-came-after.md, "Comparisons without a reward model".
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from minirlhf.data import mix, pad, response_mask
from minirlhf.engine import parallel, training
from minirlhf.engine.fields import Count, Device, Natural, Positive, Precision, Rate, Seed
from minirlhf.engine.options import check, one_sentence, parse_config
from minirlhf.engine.run_folder import RunFolder, begin, check_run_options
from minirlhf.engine.state import fingerprint
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import GPT2, token_logprobs
from minirlhf.reward_model import Comparison, accuracy, collect, split_by_prompt
from minirlhf.tokenizer import load_tokenizer


@dataclass(frozen=True)
class DPOConfig:
    """Options of `python -m minirlhf.siblings.dpo`."""
    loss: Literal["dpo", "ipo", "ipo_mean", "kto"] = "dpo"    # which of the four
    model: str = "checkpoints/sft"      # SFT folder: start of the policy, and the frozen reference
    data: str = "minirlhf.world:comparisons"    # .jsonl file, or module:function giving records
    comparisons: Natural = 8000         # comparisons to use; 0: all that the file has
    held_out: Count = 800               # about as many of them, whole prompts, are kept for testing
    in_order: bool = False              # hold out a file's last prompts, not some drawn by seed
    out: str = "checkpoints/dpo"        # folder to write
    beta: Positive = 0.1                # weight of the KL in the problem that the loss solves
    epochs: Count = 1                   # passes over the comparisons
    batch_size: Count = 32              # comparisons per step
    accumulation: Count = 1             # parts that a step's batch is cut into, to save memory
    lr: Rate = 1e-4                     # peak learning rate; 1e-6 in DPO's paper
    warmup_steps: Natural = 10          # steps of linear warm-up, then linear down to 0
    weight_decay: Rate = 0.0            # AdamW's
    max_grad_norm: Positive = 1.0       # gradients are clipped to this norm
    checkpointing: bool = False         # compute each layer twice, to save memory
    dtype: Precision = "float32"        # of matrix products
    device: Device = "cpu"              # where to compute
    eval_every: Count = 50              # steps between held-out figures
    save_every: Count = 50              # steps between checkpoints
    resume: bool = False                # go on from the last checkpoint of --out
    seed: Seed = 0                      # of data and order

    def __post_init__(self):
        check_run_options(self)
        check(self.loss != "kto" or self.batch_size > 1, "--batch_size is 1, expected at least 2: "
              "KTO pairs each prompt with the responses to another one of the batch")


METRICS = ["step",               # optimiser steps so far
           "loss",               # of the step's comparisons, before the step
           "accuracy",           # share of them whose chosen response has the larger r; ties half
           "chosen_logratio",    # mean r of the chosen responses: nats per response, or per token
           "rejected_logratio",  # mean r of the rejected responses (per token in ipo_mean alone)
           "z0",                 # KTO's estimate of the KL, nats per response; empty otherwise
           "held_out_loss",      # mean loss of comparisons of prompts that are not trained on
           "held_out_accuracy",  # their accuracy
           "held_out_chosen_logratio",    # their mean r of the chosen responses
           "held_out_rejected_logratio",  # their mean r of the rejected responses
           "grad_norm",          # before clipping
           "lr"]                 # learning rate of the step
# how far the first loss may be off, per unit of 1 + loss: sums are added in another order
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


# ---- the mathematics -----------------------------------------------------------------------------

def dpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(beta (chosen - rejected)) of each comparison: log-ratios (B,), (B,) -> (B,).

    Example: log-probabilities -3 and -5 under the policy, -4 and -4 under the reference are
    log-ratios 1 and -1; with beta 0.1 the loss is .5981, the slope of `chosen` -.0450.
    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7.
    Lecture: lectures/09-what-came-after.md, "Comparisons without a reward model".
    """
    return -F.logsigmoid(beta * (chosen - rejected))


def ipo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """Squared distance of chosen - rejected from 1 / (2 beta): log-ratios (B,), (B,) -> (B,).

    Example: log-ratios 1 and -1 with beta 0.1 give (2 - 5)^2 = 9; of responses of 2 and 4 tokens
    the means are 0.5 and -0.25, which give 18.0625.
    Source: Azar et al. 2023 (arXiv 2310.12036), equation 17; beta is its tau.
    Lecture: lectures/09-what-came-after.md, "Comparisons without a reward model".
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def kto_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float,
             z0: torch.Tensor) -> torch.Tensor:
    """Mean of a good and of a bad example's loss: log-ratios (B,), (B,), z0 () -> (B,).

    Example: log-ratios 1 and -1 with z0 0.3 and beta 0.1 give .4825 and .4675, mean .475.
    Source: Ethayarajh et al. 2024 (arXiv 2402.01306), equation 7, with both lambdas 1.
    Lecture: lectures/09-what-came-after.md, "Comparisons without a reward model".
    """
    good = 1 - torch.sigmoid(beta * (chosen - z0))                                  # (B,)
    bad = 1 - torch.sigmoid(beta * (z0 - rejected))                                 # (B,)
    return (good + bad) / 2


def first_loss(loss: str, beta: float) -> float:
    """The loss when policy and reference are equal, so that all log-ratios are 0.

    Example: dpo ln 2 = 0.6931, kto 0.5, ipo with beta 0.1: 25.
    """
    return {"dpo": math.log(2), "kto": 0.5}.get(loss, 1 / (2 * beta) ** 2)


# ---- collecting ----------------------------------------------------------------------------------

def log_ratios(policy: GPT2, ref_policy: GPT2, texts: list[tuple[list[int], list[int]]],
               end_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of (prompt, response) pairs: r = log pi - log ref of the response, and its length: (N,) each.

    The gradient flows through the policy alone.
    """
    ids, lengths = pad([prompt + response for prompt, response in texts], end_token,
                       policy.wte.weight.device)                                    # (N, T), (N,)
    prompt_lengths = torch.tensor([len(prompt) for prompt, _ in texts], device=ids.device)
    mask = response_mask(prompt_lengths, lengths, ids.shape[1])                     # (N, T-1)
    logprobs, _ = token_logprobs(policy.hidden(ids), ids, mask, policy.wte.weight)  # (N, T-1)
    with torch.no_grad():
        ref_logprobs, _ = token_logprobs(ref_policy.hidden(ids), ids, mask, ref_policy.wte.weight)
    # careful: the sum, not the mean: a long response's log-ratio counts in full
    return (logprobs - ref_logprobs).sum(dim=1), mask.sum(dim=1)


def both_log_ratios(policy: GPT2, ref_policy: GPT2, rows: list[Comparison], end_token: int,
                    per_token: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-ratios of the chosen and of the rejected responses, (B,) each, by one forward pass."""
    texts = [(row.prompt, row.chosen) for row in rows]
    texts += [(row.prompt, row.rejected) for row in rows]                           # 2B
    ratios, lengths = log_ratios(policy, ref_policy, texts, end_token)              # (2B,) each
    ratios = ratios / lengths if per_token else ratios                              # (2B,)
    return ratios[:len(rows)], ratios[len(rows):]


def mismatched(rows: list[Comparison], limit: int) -> list[tuple[list[int], list[int]]]:
    """Each row's prompt with both responses of the next row, the last row's with the first's.

    Pairs whose prompts are equal are left out, because these responses belong to the prompt, and so
    are pairs of more than `limit` tokens. Raises: ValueError when no pair is left.
    """
    # careful: the next row and not the row from the other end, which gives an odd batch's middle
    # row to itself
    texts = [(row.prompt, response) for row, other in zip(rows, rows[1:] + rows[:1])
             if row.prompt != other.prompt for response in (other.chosen, other.rejected)
             if len(row.prompt) + len(response) <= limit]
    check(len(texts) > 0, f"no response of a batch of {len(rows)} comparisons can be paired with "
          "another prompt, as KTO needs it: the prompts are all the same, or the texts too long "
          "for the context; raise --batch_size, or use other data")
    return texts


def estimate_z0(policy: GPT2, ref_policy: GPT2, rows: list[Comparison], cfg: DPOConfig,
                end_token: int) -> torch.Tensor:
    """KTO's point of reference: mean log-ratio of mismatched pairs, at least 0, no gradient: ()."""
    texts, total = mismatched(rows, policy.config.n_positions), 0.0
    with torch.no_grad():
        for part in parallel.parts(texts, 2 * cfg.batch_size, cfg.accumulation):
            total += log_ratios(policy, ref_policy, part, end_token)[0].sum().item()
    device = policy.wte.weight.device
    return torch.tensor(max(0.0, parallel.sums([total], device)[0] / len(texts)), device=device)


# ---- one step, evaluation ------------------------------------------------------------------------

def losses(cfg: DPOConfig, chosen: torch.Tensor, rejected: torch.Tensor,
           z0: torch.Tensor | None) -> torch.Tensor:
    """The loss of each comparison, (B,), from its log-ratios (B,), (B,)."""
    if cfg.loss == "dpo":
        return dpo_loss(chosen, rejected, cfg.beta)
    if cfg.loss == "kto":
        return kto_loss(chosen, rejected, cfg.beta, z0)
    return ipo_loss(chosen, rejected, cfg.beta)


def train_step(policy: GPT2, ref_policy: GPT2, optimizer: torch.optim.Optimizer,
               rows: list[Comparison], cfg: DPOConfig, end_token: int, where: str) -> dict:
    """One optimiser step on `rows`; returns its metrics, all from before the step."""
    per_token = cfg.loss == "ipo_mean"
    z0 = estimate_z0(policy, ref_policy, rows, cfg, end_token) if cfg.loss == "kto" else None
    totals = [0.0] * 4
    optimizer.zero_grad()
    for part in parallel.parts(rows, cfg.batch_size, cfg.accumulation):    # one part, by default
        chosen, rejected = both_log_ratios(policy, ref_policy, part, end_token, per_token)
        training.check_finite(where, chosen_logratio=chosen, rejected_logratio=rejected)
        loss = losses(cfg, chosen, rejected, z0).sum() / len(rows)                  # its share
        loss.backward()
        right = accuracy((chosen - rejected).detach().cpu()) * len(part)
        new = loss.item(), right, chosen.sum().item(), rejected.sum().item()
        totals = [total + share for total, share in zip(totals, new)]
    grad_norm = training.optimiser_step(policy, optimizer, cfg.max_grad_norm, where)
    loss, *sums = parallel.sums(totals, policy.wte.weight.device)
    right, chosen, rejected = [total / len(rows) for total in sums]
    return {"loss": loss, "accuracy": right, "chosen_logratio": chosen,
            "rejected_logratio": rejected, "z0": z0.item() if z0 is not None else "",
            "grad_norm": grad_norm}


def evaluate(policy: GPT2, ref_policy: GPT2, rows: list[Comparison], cfg: DPOConfig,
             end_token: int, z0: float) -> dict:
    """Loss, accuracy and mean log-ratios over held-out comparisons; KTO's with the step's z0."""
    per_token, pairs = cfg.loss == "ipo_mean", []
    with torch.no_grad():
        for part in parallel.parts(rows, cfg.batch_size, cfg.accumulation):
            both = both_log_ratios(policy, ref_policy, part, end_token, per_token)  # 2 x (b,)
            pairs.append(torch.stack(both, dim=1))                                  # (b, 2)
    device = policy.wte.weight.device
    mine = torch.cat([torch.zeros(0, 2, device=device), *pairs])
    chosen, rejected = parallel.gather_rows(mine, len(rows)).unbind(dim=1)          # (N,) each
    loss = losses(cfg, chosen, rejected, torch.tensor(z0, device=device)).mean()
    return {"held_out_loss": loss.item(), "held_out_accuracy": accuracy(chosen - rejected),
            "held_out_chosen_logratio": chosen.mean().item(),
            "held_out_rejected_logratio": rejected.mean().item()}


def check_first_loss(loss: float, cfg: DPOConfig) -> None:
    """At the first step policy and reference are equal: the loss is that of log-ratios 0."""
    expected = first_loss(cfg.loss, cfg.beta)
    check(abs(loss - expected) <= TOLERANCE[cfg.dtype] * (1 + expected), f"the first loss is "
          f"{loss:.5g}, expected {expected:.5g}: policy and reference must start from the same "
          "weights and be computed alike")


# ---- main ----------------------------------------------------------------------------------------

def main(cfg: DPOConfig) -> dict:
    """Train and save; returns the last row of metrics with the held-out figures."""
    folder = begin(cfg, cfg.model)
    policy = load_network(GPT2, folder).to(cfg.device)
    policy.checkpointing, policy.dtype = cfg.checkpointing, cfg.dtype
    ref_policy = copy.deepcopy(policy).requires_grad_(False)
    tokenizer = load_tokenizer(folder, policy)
    rows = collect(cfg, folder, tokenizer, policy.config.n_positions)
    train, test = split_by_prompt(mix(rows, cfg.data, cfg.seed, cfg.in_order), cfg.held_out)
    check(len(train) >= cfg.batch_size, f"{len(train)} comparisons are left to train on, expected "
          f"at least the --batch_size of {cfg.batch_size}")
    groups = [{"params": list(policy.parameters()), "peak": cfg.lr}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    total_steps = cfg.epochs * (len(train) // cfg.batch_size)
    inputs = {"--model": fingerprint(ref_policy), "--data": fingerprint(rows)}
    print(f"{cfg.loss}: {len(train)} comparisons x {cfg.epochs} epochs = {total_steps} steps; "
          f"{len(test)} held out", flush=True)
    with RunFolder(cfg, total_steps, METRICS, inputs, policy, optimizer) as run:
        for step in run.steps():
            training.set_learning_rate(optimizer, step, total_steps, cfg.warmup_steps, "linear")
            order = training.batch_order(len(train), cfg.batch_size, cfg.seed, step, True)
            row = train_step(policy, ref_policy, optimizer, [train[i] for i in order], cfg,
                             tokenizer.end_token, f"step {step}")
            if step == 0:
                check_first_loss(row["loss"], cfg)
            row.update(step=step + 1, lr=optimizer.param_groups[0]["lr"])
            if row["step"] % cfg.eval_every == 0 or row["step"] == total_steps:
                row.update(evaluate(policy, ref_policy, test, cfg, tokenizer.end_token,
                                    row["z0"] or 0.0))
                print(f"  step {step + 1:4d}/{total_steps}  loss {row['loss']:.3f}  held out: loss "
                      f"{row['held_out_loss']:.3f}  accuracy {row['held_out_accuracy']:.3f}  "
                      f"log-ratios {row['held_out_chosen_logratio']:6.2f} chosen, "
                      f"{row['held_out_rejected_logratio']:6.2f} rejected", flush=True)
            run.log(row)
        training.check_frozen(ref_policy)
        run.publish(tokenizer, policy)
    return run.row


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(DPOConfig))
