"""Stage 2, the reward model: learn from comparisons to say how good a response is, as one number.

    python -m minirlhf.reward_model
    python -m minirlhf.reward_model --data comparisons.jsonl --seed 2 --out checkpoints/rm2

In:  an SFT folder and comparisons: a prompt with two responses of which a person chose one.
Out: a checkpoint folder (GPT-2 with a scalar head), `metrics.csv`.

The algorithm: copy the SFT model and put a scalar head in place of its vocabulary. The score of a
response is that head's number at the response's last token, the only place that has seen all of
it. Bradley-Terry takes the difference of two scores as the log-odds that a person prefers the
first; the loss is minus the log-probability of the choice that the person made. Only differences
matter, so at the end scores get mean 0 and deviation 1 on SFT responses: a known scale for PPO.

Choices and deviations:
 1. One epoch, as in InstructGPT (appendix C.2), which saw its reward models overfit with more.
 2. Training and held-out comparisons share no prompt; of a file, the latter are drawn by seed.
 3. Shift and scale are folded into the saved weights: any program that loads them has them.
 4. Calibration is measured: when the model says 70 %, are 70 of 100 such choices right?
 5. Another `--seed` gives another member of an ensemble: other head, other order, of a file other
    held-out prompts. Comparisons are shuffled one by one; InstructGPT keeps a prompt's together.

Shapes: B comparisons, T tokens in the padded row, C channels.
Lecture: lectures/03-reward-model.md.
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minirlhf.data import encode_prompt, encode_response, fit_rows, mix, pad, records
from minirlhf.engine import parallel, training
from minirlhf.engine.fields import Count, Device, Natural, Positive, Precision, Rate, Seed
from minirlhf.engine.options import check, one_sentence, parse_config
from minirlhf.engine.run_folder import RunFolder, begin, check_run_options
from minirlhf.engine.state import fingerprint
from minirlhf.engine.training import random_stream
from minirlhf.files.pretrained import load_network
from minirlhf.generate import generate
from minirlhf.gpt2 import GPT2, ScalarModel
from minirlhf.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class RewardModelConfig:
    """Options of `python -m minirlhf.reward_model`."""
    model: str = "checkpoints/sft"      # SFT folder: start of the trunk, writer of the samples
    data: str = "minirlhf.world:comparisons"    # .jsonl file, or module:function giving records
    comparisons: Natural = 8000         # comparisons to use; 0: all that the file has
    held_out: Count = 800               # about as many of them, whole prompts, are kept for testing
    in_order: bool = False              # hold out a file's last prompts, not some drawn by seed
    out: str = "checkpoints/reward_model"    # folder to write
    epochs: Count = 1                   # passes over the comparisons (1 in InstructGPT)
    batch_size: Count = 32              # comparisons per step
    lr: Rate = 1e-3                     # peak learning rate; for GPT-2 124M rather 1e-5
    warmup_steps: Natural = 10          # steps of linear warm-up, then linear down to 0
    weight_decay: Rate = 0.01           # AdamW's
    max_grad_norm: Positive = 1.0       # gradients are clipped to this norm
    max_new_tokens: Count = 32          # longest of the responses for normalisation, tokens
    norm_samples: Count = 256           # SFT responses on which scores get mean 0 and deviation 1
    accumulation: Count = 1             # parts that a step's batch is cut into, to save memory
    checkpointing: bool = False         # compute each layer twice, to save memory
    dtype: Precision = "float32"        # of matrix products
    device: Device = "cpu"              # where to compute
    eval_every: Count = 50              # steps between held-out accuracies
    save_every: Count = 50              # steps between checkpoints
    resume: bool = False                # go on from the last checkpoint of --out
    seed: Seed = 0                      # of data, head, order and samples

    def __post_init__(self):
        check_run_options(self)
        check(self.norm_samples >= 2, f"--norm_samples is {self.norm_samples}, expected at least 2")


# ---- the mathematics -----------------------------------------------------------------------------

def bradley_terry_loss(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor,
                       count: int | None = None) -> torch.Tensor:
    """Mean of -log sigmoid(chosen - rejected) over the comparisons: nats per comparison.

    chosen_scores, rejected_scores (B,) -> (). `count` is the number of comparisons in the whole
    step when these are a part of it: the parts' losses add up to the step's. Equal scores give
    log 2 = 0.6931, the loss of a model that knows nothing.

    Example: scores 2 and 1 give 0.3133.
    Source: Bradley and Terry 1952; InstructGPT (arXiv 2203.02155), equation 1.
    Lecture: lectures/03-reward-model.md, "The Bradley-Terry loss".
    """
    losses = -F.logsigmoid(chosen_scores - rejected_scores)                         # (B,)
    return losses.sum() / (len(losses) if count is None else count)


def accuracy(margins: torch.Tensor) -> float:
    """Share of comparisons with the chosen response scored higher; a tie counts half.

    Example: margins chosen - rejected of 2, -1, 0, 1 give 0.625.
    """
    return ((margins > 0).double() + 0.5 * (margins == 0).double()).mean().item()


def calibration_error(margins: torch.Tensor, bins: int = 10) -> float:
    """Expected calibration error of the stated preferences: 0 is perfect.

    The model states max(p, 1-p) with p = sigmoid(margin), from 0.5 to 1, for the response it
    prefers. In each of `bins` equal intervals the mean statement is compared with the share of
    right choices (a tie counts half); the gaps are averaged by how many comparisons fall there.

    Example: four statements of 0.75 of which three are right give 0.
    Source: Guo et al. 2017 (arXiv 1706.04599), section 2.
    """
    stated = torch.sigmoid(margins.double().abs())                                  # (N,)
    right = (margins > 0).double() + 0.5 * (margins == 0).double()                  # (N,)
    interval = ((stated - 0.5) * 2 * bins).long().clamp(max=bins - 1)               # (N,)
    gaps = torch.zeros(bins, dtype=torch.double).index_add(0, interval, stated - right)
    return (gaps.abs().sum() / len(margins)).item()


# ---- collecting ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Comparison:
    """One comparison as token ids; both responses end with the end token."""
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def collect(cfg: RewardModelConfig, folder: str, tokenizer: Tokenizer,
            limit: int) -> list[Comparison]:
    """Read, tokenize and bound the comparisons; what does not fit is dropped and counted."""
    rows = []
    for record in records(cfg.data, "comparisons", count=cfg.comparisons, seed=cfg.seed,
                          model=folder):
        rows.append(Comparison(encode_prompt(tokenizer, record["prompt"]),
                               encode_response(tokenizer, record["chosen"]),
                               encode_response(tokenizer, record["rejected"])))
    kept, too_long = fit_rows(rows, limit)
    print(f"{len(kept)} comparisons of at most {limit} tokens ({too_long} longer ones dropped)")
    return kept


def split_by_prompt(rows: list[Comparison], held_out: int):
    """Training and held-out comparisons with no prompt in common.

    Prompts go to the held-out side, last ones first, until it has `held_out` comparisons.
    """
    sizes = Counter(tuple(row.prompt) for row in rows)
    test_prompts, count = set(), 0
    for prompt in reversed(sizes):
        if count < held_out:
            test_prompts.add(prompt)
            count += sizes[prompt]
    train = [row for row in rows if tuple(row.prompt) not in test_prompts]
    test = [row for row in rows if tuple(row.prompt) in test_prompts]
    check(len(train) > 0, f"{len(rows)} comparisons of {len(sizes)} prompts leave none to train on "
          f"after {held_out} held-out ones; lower --held_out or bring more data")
    return train, test


# ---- one step, evaluation, normalisation ---------------------------------------------------------

METRICS = ["step", "loss", "accuracy", "held_out_loss", "held_out_accuracy", "calibration_error",
           "grad_norm", "lr"]


def score_pairs(model: ScalarModel, rows: list[Comparison], end_token: int):
    """Scores of the chosen and of the rejected responses, (B,) each, in one forward pass."""
    texts = [row.prompt + row.chosen for row in rows] + [row.prompt + row.rejected for row in rows]
    ids, lengths = pad(texts, end_token, model.score_head.weight.device)            # (2B, T), (2B,)
    scores = model.score(ids, lengths)                                              # (2B,)
    return scores[:len(rows)], scores[len(rows):]


def train_step(model: ScalarModel, optimizer: torch.optim.Optimizer, rows: list[Comparison],
               cfg: RewardModelConfig, end_token: int, where: str) -> dict:
    """One optimiser step; returns loss, accuracy (both before the step) and gradient norm."""
    numbers = list(range(len(rows)))
    totals = [0.0, 0.0]                                  # loss, right choices
    optimizer.zero_grad()
    for part in parallel.parts(numbers, cfg.batch_size, cfg.accumulation):    # one, by default
        chosen, rejected = score_pairs(model, [rows[i] for i in part], end_token)   # (b,), (b,)
        training.check_finite(where, part, chosen_scores=chosen, rejected_scores=rejected)
        loss = bradley_terry_loss(chosen, rejected, len(rows))
        loss.backward()
        right = accuracy((chosen - rejected).detach().cpu()) * len(part)
        totals = [totals[0] + loss.item(), totals[1] + right]
    grad_norm = training.optimiser_step(model, optimizer, cfg.max_grad_norm, where)
    loss, right = parallel.sums(totals, cfg.device)
    return {"loss": loss, "accuracy": right / len(rows), "grad_norm": grad_norm}


def held_out_scores(model: ScalarModel, rows: list[Comparison], cfg: RewardModelConfig,
                    end_token: int) -> torch.Tensor:
    """Scores of chosen and rejected responses, (N, 2), without gradient."""
    scores = [torch.zeros(0, 2, device=cfg.device)]
    with torch.no_grad():
        for part in parallel.parts(rows, cfg.batch_size, cfg.accumulation):
            scores.append(torch.stack(score_pairs(model, part, end_token), dim=1))  # (b, 2)
    return parallel.gather_rows(torch.cat(scores), len(rows)).cpu()                 # (N, 2)


def sft_scores(model: ScalarModel, policy: GPT2, prompts: list[list[int]], cfg: RewardModelConfig,
               end_token: int) -> torch.Tensor:
    """Scores of responses that the SFT model samples to `prompts`, (N,)."""
    scores = torch.zeros(len(prompts), device=cfg.device)                           # (N,)
    starts = list(range(0, len(prompts), 64))
    with torch.no_grad():
        for first in starts[parallel.share(len(starts))]:
            made = generate(policy, prompts[first:first + 64], cfg.max_new_tokens,
                            end_token=end_token, generator=random_stream(cfg.seed, 2, first))
            scores[first:first + 64] = model.score(made.ids, made.lengths)
    return parallel.sum_tensor(scores).cpu()                    # other processes have zeros there


def fold_normalisation(model: ScalarModel, mean: float, std: float) -> None:
    """Change the weights so that every score s becomes (s - mean) / std.

    A score is w . h, with h the output of the last layer norm. Dividing w by std scales it. There
    is no bias to shift it with (published scalar heads have none), but adding a multiple of w to
    the layer norm's bias adds the same constant to every w . h: that is the shift.
    careful: margins are divided by std too, so afterwards sigmoid(margin) is no longer the
    probability whose calibration was measured.
    """
    weight = model.score_head.weight.data[0]                                        # (C,)
    weight /= std
    shift = -mean / std
    model.transformer.ln_f.bias.data += shift * weight / weight.dot(weight)


def normalise(model: ScalarModel, policy: GPT2, prompts: list[list[int]], cfg: RewardModelConfig,
              end_token: int) -> None:
    """Give the scores of the SFT model's own responses mean 0 and deviation 1."""
    picks = torch.randint(len(prompts), (cfg.norm_samples,), generator=random_stream(cfg.seed, 1))
    scores = sft_scores(model, policy, [prompts[i] for i in picks], cfg, end_token)     # (N,)
    rounding = 1e-5 * (1 + scores.abs().max().item())    # equal scores have some 1e-7 of their size
    check(scores.std().item() > rounding, "all SFT responses get the same score: nothing to "
          "normalise by; is the data all alike, or the learning rate 0?")
    fold_normalisation(model, scores.mean().item(), scores.std().item())
    print(f"  scores of SFT responses: mean {scores.mean():.2f} and deviation {scores.std():.2f}, "
          "now 0 and 1", flush=True)


# ---- main ----------------------------------------------------------------------------------------

def main(cfg: RewardModelConfig) -> dict:
    """Train, normalise and save; returns the last row of metrics with the held-out figures."""
    folder = begin(cfg, cfg.model)
    policy = load_network(GPT2, folder).to(cfg.device)
    policy.dtype = cfg.dtype
    tokenizer = load_tokenizer(folder, policy)
    limit = policy.config.n_positions
    rows = mix(collect(cfg, folder, tokenizer, limit), cfg.data, cfg.seed, cfg.in_order)
    train, test = split_by_prompt(rows, cfg.held_out)
    prompts, _ = fit_rows([row.prompt for row in rows], limit - cfg.max_new_tokens)
    check(len(prompts) > 0, "no prompt leaves room for a response; lower --max_new_tokens")
    torch.manual_seed(cfg.seed % 2**63)                  # the random head
    model = ScalarModel(policy.config).to(cfg.device)
    model.transformer = load_network(GPT2, folder).to(cfg.device)    # and not a random one
    model.transformer.checkpointing, model.transformer.dtype = cfg.checkpointing, cfg.dtype
    groups = [{"params": list(model.parameters()), "peak": cfg.lr}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    total_steps = cfg.epochs * math.ceil(len(train) / cfg.batch_size)
    inputs = {"--model": fingerprint(policy), "--data": fingerprint(rows)}
    print(f"reward model: {len(train)} comparisons x {cfg.epochs} epochs = {total_steps} "
          f"steps; {len(test)} held out", flush=True)
    with RunFolder(cfg, total_steps, METRICS, inputs, model, optimizer) as run:
        for step in run.steps():
            training.set_learning_rate(optimizer, step, total_steps, cfg.warmup_steps, "linear")
            order = training.batch_order(len(train), cfg.batch_size, cfg.seed, step)
            batch = [train[i] for i in order]
            row = train_step(model, optimizer, batch, cfg, tokenizer.end_token, f"step {step}")
            row.update(step=step + 1, lr=optimizer.param_groups[0]["lr"])
            if row["step"] % cfg.eval_every == 0 or row["step"] == total_steps:
                scores = held_out_scores(model, test, cfg, tokenizer.end_token)     # (N, 2)
                margins = scores[:, 0] - scores[:, 1]                               # (N,)
                training.check_finite(f"step {step}", margins=margins)
                row["held_out_loss"] = bradley_terry_loss(margins, torch.zeros_like(margins)).item()
                row["held_out_accuracy"] = accuracy(margins)
                row["calibration_error"] = calibration_error(margins)
                print(f"  step {step + 1:4d}/{total_steps}  loss {row['loss']:.3f}  held out: "
                      f"loss {row['held_out_loss']:.3f}  accuracy {row['held_out_accuracy']:.3f}  "
                      f"calibration error {row['calibration_error']:.3f}", flush=True)
            if row["step"] == total_steps:               # for the pictures of `plots`
                run.keep({"held_out_scores": scores[:1000].double().round(decimals=4).tolist()})
            run.log(row)
        if not run.finished:
            normalise(model, policy, prompts, cfg, tokenizer.end_token)
        run.publish(tokenizer, model)
    return run.row


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(RewardModelConfig))
