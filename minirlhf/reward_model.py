"""Stage 2, the reward model: learn from comparisons to say how good a response is, as one number.

    python -m minirlhf.reward_model
    python -m minirlhf.reward_model --data comparisons.jsonl --seed 2 --out checkpoints/rm2

In:  an SFT folder and comparisons: a prompt with two responses of which a person chose one.
Out: a checkpoint folder (GPT-2 with a scalar head), `metrics.csv`.

The algorithm: copy the SFT model and put a scalar head in place of its vocabulary. The score of a
response is that head's number at the response's last token, the only place that has seen all of
it. Bradley-Terry takes the difference of two scores as the log-odds that a person prefers the
first; the loss is minus the log-probability of the choice that the person made. Only differences
matter to it, so at the end scores are shifted and scaled to mean 0 and deviation 1 on responses of
the SFT model: the coefficient of the KL penalty in stage 3 then has a known scale to work against.

Choices and deviations:
 1. One epoch: a second one learns the comparisons by heart (so says InstructGPT, appendix C.2).
 2. Comparisons are split into training and held-out by prompt; several of one prompt stay together.
 3. Shift and scale are folded into the weights of the head and of the last layer norm, so the saved
    file itself gives the normalised scores, in any program that loads it.
 4. Calibration is measured: when the model says 70 %, are 70 of 100 such choices right?
 5. Another `--seed` gives another member of an ensemble: other head, other order.
 6. Comparisons are shuffled one by one. InstructGPT keeps all comparisons of a prompt in one batch,
    because a response that returns in several batches is learned by heart sooner.

Shapes: B comparisons, T tokens in the padded row, C channels.
Lecture: lectures/02-reward-model.md.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minirlhf import parallel
from minirlhf.checkpoint import RunFolder, check_run_options, fingerprint
from minirlhf.common import (batch_order, check, check_finite, check_output, check_range,
                             clip_gradients, learning_rate, random_stream, run)
from minirlhf.data import (Tokenizer, encode_prompt, encode_response, fit_rows, pad, read_records)
from minirlhf.gpt2 import GPT2, ScalarModel, check_tokenizer, find_folder, generate


@dataclass(frozen=True)
class RewardModelConfig:
    """Options of `python -m minirlhf.reward_model`."""
    model: str = "checkpoints/sft"      # SFT folder: start of the trunk, writer of the samples
    data: str = "minirlhf.world:comparisons"    # .jsonl file, or module:function giving records
    comparisons: int = 8000             # comparisons to use; 0: all that the file has
    held_out: int = 800                 # about as many of them, whole prompts, are kept for testing
    out: str = "checkpoints/reward_model"    # folder to write
    epochs: int = 1                     # passes over the comparisons; a second one overfits
    batch_size: int = 32                # comparisons a step
    lr: float = 1e-3                    # peak learning rate; for GPT-2 124M rather 1e-5
    warmup_steps: int = 10              # steps of linear warm-up, then linear down to 0
    weight_decay: float = 0.01          # AdamW's
    max_grad_norm: float = 1.0          # gradients are clipped to this norm
    max_new_tokens: int = 32            # longest of the responses for normalisation, tokens
    norm_samples: int = 256             # SFT responses on which scores get mean 0 and deviation 1
    accumulation: int = 1               # parts that a step's batch is cut into, to save memory
    checkpointing: bool = False         # compute each layer twice, to save memory
    dtype: str = "float32"              # of matrix products: float32, bfloat16
    device: str = "cpu"                 # cpu, cuda, mps
    eval_every: int = 50                # steps between held-out accuracies
    save_every: int = 50                # steps between checkpoints
    resume: bool = False                # go on from the last checkpoint of --out
    seed: int = 0                       # of data, head, order and samples

    def __post_init__(self):
        check_run_options(self)
        for name in ("held_out", "epochs", "batch_size", "max_new_tokens", "eval_every"):
            check_range(self, name, 1, 10**9)
        check_range(self, "norm_samples", 2, 10**6)
        check_range(self, "comparisons", 0, 10**9)
        check_range(self, "lr", 0, 10)
        check_range(self, "warmup_steps", 0, 10**9)
        check_range(self, "weight_decay", 0, 10)
        check_range(self, "max_grad_norm", 1e-9, 1e9)


# ---- the mathematics -----------------------------------------------------------------------------

def bradley_terry_loss(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor,
                       count: int | None = None) -> torch.Tensor:
    """Mean of -log sigmoid(chosen - rejected) over the comparisons: nats a comparison.

    chosen_scores, rejected_scores (B,) -> (). `count` is the number of comparisons in the whole
    step when these are a part of it: the parts' losses add up to the step's. Equal scores give
    log 2 = 0.6931, the loss of a model that knows nothing.

    Example: scores 2 and 1 give 0.3133.
    Source: Bradley and Terry 1952; InstructGPT (arXiv 2203.02155), equation 1.
    Lecture: lectures/02-reward-model.md, "The Bradley-Terry loss".
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
    right choices; the differences are averaged by how many comparisons fall there.

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


def collect(cfg: RewardModelConfig, tokenizer: Tokenizer, limit: int) -> list[Comparison]:
    """Read, tokenize and bound the comparisons; what does not fit is dropped and counted."""
    records = read_records(cfg.data, "comparisons", count=cfg.comparisons, seed=cfg.seed,
                           model=find_folder(cfg.model))
    rows = []
    for record in records:
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
    test_prompts, count = set(), 0
    sizes: dict[tuple, int] = {}
    for row in rows:
        sizes[tuple(row.prompt)] = sizes.get(tuple(row.prompt), 0) + 1
    for prompt in reversed(sizes):
        if count >= held_out:
            break
        test_prompts.add(prompt)
        count += sizes[prompt]
    train = [row for row in rows if tuple(row.prompt) not in test_prompts]
    test = [row for row in rows if tuple(row.prompt) in test_prompts]
    check(len(train) > 0, f"{len(rows)} comparisons of {len(sizes)} prompts leave none to train on "
          f"after {held_out} held-out ones; lower --held_out or bring more data")
    return train, test


# ---- one step, evaluation, normalisation ---------------------------------------------------------

def score_pairs(model: ScalarModel, rows: list[Comparison], end_token: int):
    """Scores of the chosen and of the rejected responses, (B,) each, in one forward pass."""
    texts = [row.prompt + row.chosen for row in rows] + [row.prompt + row.rejected for row in rows]
    ids, lengths = pad(texts, end_token)                                            # (2B, T), (2B,)
    device = model.score_head.weight.device
    scores = model.score(ids.to(device), lengths.to(device))                        # (2B,)
    return scores[:len(rows)], scores[len(rows):]


def train_step(model: ScalarModel, optimizer: torch.optim.Optimizer, rows: list[Comparison],
               cfg: RewardModelConfig, end_token: int, where: str) -> tuple[float, float, float]:
    """One optimiser step; returns loss, accuracy before the step and gradient norm."""
    mine = rows[parallel.share(len(rows))]               # all of them, if there is one process
    part = math.ceil(len(rows) / cfg.accumulation)       # comparisons in each part
    sums = {"loss": 0.0, "right": 0.0}
    optimizer.zero_grad()
    for first in range(0, len(mine), part):
        with parallel.precision(cfg):
            chosen_scores, rejected_scores = score_pairs(model, mine[first:first + part],
                                                         end_token)                 # (b,), (b,)
        numbers = torch.arange(len(rows))[parallel.share(len(rows))][first:first + part]    # (b,)
        check_finite("chosen_scores", chosen_scores.detach(), where, numbers)
        check_finite("rejected_scores", rejected_scores.detach(), where, numbers)
        loss = bradley_terry_loss(chosen_scores, rejected_scores, len(rows))
        loss.backward()
        sums["loss"] += loss.item()
        sums["right"] += accuracy((chosen_scores - rejected_scores).detach()) * len(chosen_scores)
    parallel.add_gradients(model.parameters())
    grad_norm = clip_gradients(model, cfg.max_grad_norm, where)
    optimizer.step()
    sums = parallel.sum_over_processes(sums, model.score_head.weight.device)
    return sums["loss"], sums["right"] / len(rows), grad_norm


def held_out_margins(model: ScalarModel, rows: list[Comparison], cfg: RewardModelConfig,
                     end_token: int) -> torch.Tensor:
    """Score differences chosen - rejected, (N,), without gradient."""
    mine = rows[parallel.share(len(rows))]
    size = math.ceil(cfg.batch_size / cfg.accumulation)
    margins = [torch.zeros(0, device=cfg.device)]
    with torch.no_grad(), parallel.precision(cfg):
        for first in range(0, len(mine), size):
            chosen, rejected = score_pairs(model, mine[first:first + size], end_token)
            margins.append(chosen.float() - rejected.float())
    return parallel.gather_rows(torch.cat(margins), len(rows)).cpu()                # (N,)


def sft_scores(model: ScalarModel, policy: GPT2, prompts: list[list[int]], cfg: RewardModelConfig,
               end_token: int) -> torch.Tensor:
    """Scores of responses that the SFT model samples to `prompts`, (N,)."""
    scores = torch.zeros(len(prompts), device=cfg.device)                           # (N,)
    starts = range(0, len(prompts), 64)
    with torch.no_grad(), parallel.precision(cfg):
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


# ---- main ----------------------------------------------------------------------------------------

METRICS = ["step", "loss", "accuracy", "held_out_loss", "held_out_accuracy", "calibration_error",
           "grad_norm", "lr"]


def save(model: ScalarModel, tokenizer: Tokenizer, out: str) -> None:
    """Write the reward model and its tokenizer."""
    tokenizer.save(out, model.config.n_positions)
    model.save_pretrained(out)


def normalise(model: ScalarModel, policy: GPT2, prompts: list[list[int]], cfg: RewardModelConfig,
              end_token: int) -> None:
    """Give the scores of the SFT model's own responses mean 0 and deviation 1."""
    picks = torch.randint(len(prompts), (cfg.norm_samples,), generator=random_stream(cfg.seed, 1))
    scores = sft_scores(model, policy, [prompts[i] for i in picks], cfg, end_token)     # (N,)
    rounding = 1e-5 * (1 + scores.abs().max().item())    # equal scores have some 1e-7 of their size
    check(scores.std().item() > rounding, "all SFT responses get the same score: nothing to "
          "normalise by; is the data all alike, or the learning rate 0?")
    fold_normalisation(model, scores.mean().item(), scores.std().item())
    print(f"  scores of SFT responses had mean {scores.mean():.2f} and deviation "
          f"{scores.std():.2f}, now 0 and 1", flush=True)


def main(cfg: RewardModelConfig) -> dict:
    """Train, normalise and save; returns the last row of metrics with the held-out figures."""
    parallel.start(cfg.device)
    folder = parallel.first_alone(find_folder, cfg.model)
    check_output(cfg.out, folder)
    policy, tokenizer = GPT2.from_pretrained(folder).to(cfg.device), Tokenizer.load(folder)
    check_tokenizer(policy, tokenizer, folder)
    rows = collect(cfg, tokenizer, policy.config.n_positions)
    train, test = split_by_prompt(rows, cfg.held_out)
    longest_prompt = policy.config.n_positions - cfg.max_new_tokens
    prompts = [row.prompt for row in rows if len(row.prompt) <= longest_prompt]
    check(len(prompts) > 0, f"no prompt leaves room for {cfg.max_new_tokens} new tokens; lower "
          "--max_new_tokens")
    torch.manual_seed(cfg.seed % 2**63)                  # the random head
    model = ScalarModel(policy.config).to(cfg.device)
    model.transformer.load_state_dict(policy.state_dict())
    model.transformer.checkpointing = cfg.checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay,
                                  fused=True)
    total_steps = cfg.epochs * math.ceil(len(train) / cfg.batch_size)
    inputs = {"--model": fingerprint(policy), "--data": fingerprint(rows)}
    with RunFolder(cfg, total_steps, METRICS, inputs) as run_folder:
        if run_folder.finished:
            return run_folder.row
        run_folder.restore(model, optimizer)
        print(f"reward model: {len(train)} comparisons x {cfg.epochs} epochs = {total_steps} "
              f"steps; {len(test)} held out", flush=True)
        for step in range(run_folder.step, total_steps):
            lr = learning_rate(step, total_steps, cfg.lr, cfg.warmup_steps, "linear")
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = batch_order(len(train), cfg.batch_size, cfg.seed, step)         # (B,)
            loss, train_accuracy, grad_norm = train_step(
                model, optimizer, [train[i] for i in batch], cfg, tokenizer.end_token,
                f"step {step}")
            row = dict.fromkeys(METRICS, "")
            row.update(step=step + 1, loss=loss, accuracy=train_accuracy, grad_norm=grad_norm,
                       lr=lr)
            if row["step"] % cfg.eval_every == 0 or row["step"] == total_steps:
                margins = held_out_margins(model, test, cfg, tokenizer.end_token)   # (N,)
                check_finite("held-out margins", margins, f"step {step}")
                row["held_out_loss"] = bradley_terry_loss(margins, torch.zeros_like(margins)).item()
                row["held_out_accuracy"] = accuracy(margins)
                row["calibration_error"] = calibration_error(margins)
                print(f"  step {step + 1:4d}/{total_steps}  loss {loss:.3f}  held out: "
                      f"loss {row['held_out_loss']:.3f}  accuracy {row['held_out_accuracy']:.3f}  "
                      f"calibration error {row['calibration_error']:.3f}", flush=True)
            run_folder.end_step(step + 1, row, model, optimizer)
        normalise(model, policy, prompts, cfg, tokenizer.end_token)
        run_folder.publish(save, model, tokenizer, cfg.out)
    return run_folder.row


if __name__ == "__main__":
    run(main, RewardModelConfig)
