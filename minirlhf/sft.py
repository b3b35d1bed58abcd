"""Stage 1, supervised fine-tuning: teach a base model to answer, from demonstrations.

    python -m minirlhf.sft
    python -m minirlhf.sft --model gpt2 --data demonstrations.jsonl --lr 2e-5 --out checkpoints/mine

In:  a base model folder (or `gpt2`, ...) and demonstrations: prompts with the response a person
     wrote. Out: a checkpoint folder with the fine-tuned model, `metrics.csv` and `samples.txt`.

The algorithm: write each demonstration as prompt tokens, response tokens, end token. Ask the model
for the log-probability of every response token given all that comes before it. The loss is minus
their mean, so a step makes the demonstrated response likelier. The prompt's own tokens are context,
never a target: the model should learn to answer questions, not to ask them.

Choices and deviations:
 1. Only response tokens are in the loss, the end token among them: a model that never learns to end
    cannot be scored as a whole answer in stage 3.
 2. The mean is over all response tokens of a step, however they are split by accumulation, so
    `--accumulation` changes the result by rounding only. Long responses weigh more than short.
 3. InstructGPT trained 16 epochs with dropout; here 2 or 3 epochs without. A high rate or many
    epochs make a small model forget what the base knew.
 4. Rows longer than the context are dropped and counted, never cut: a cut row has no end token.
 5. The held-out loss is over demonstrations that were put aside, of a file by seed. These are not
    new prompts: another demonstration may have asked the same. New ones belong to `evaluate`.

Shapes: B sequences, T tokens in the padded row, C channels.   Lecture: lectures/02-sft.md.
"""

import math
from dataclasses import dataclass

import torch

from minirlhf.data import encode_prompt, encode_response, fit_rows, mix, pad, records, response_mask
from minirlhf.engine import parallel, training
from minirlhf.engine.fields import Count, Device, Natural, Positive, Precision, Rate, Seed
from minirlhf.engine.options import check, one_sentence, parse_config
from minirlhf.engine.run_folder import RunFolder, begin, check_run_options
from minirlhf.engine.state import fingerprint
from minirlhf.engine.training import random_stream
from minirlhf.files.pretrained import load_network
from minirlhf.generate import generate
from minirlhf.gpt2 import GPT2, token_logprobs
from minirlhf.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class SFTConfig:
    """Options of `python -m minirlhf.sft`."""
    model: str = "checkpoints/tiny"     # base model: checkpoint folder, or gpt2, gpt2-medium, ...
    data: str = "minirlhf.world:demonstrations"    # .jsonl file, or module:function giving records
    examples: Natural = 3000            # demonstrations to use; 0: all that the file has
    held_out: Count = 200               # of these, kept for the held-out loss
    in_order: bool = False              # hold out a file's first rows, not rows drawn by seed
    out: str = "checkpoints/sft"        # folder to write
    epochs: Count = 2                   # passes over the demonstrations
    batch_size: Count = 32              # demonstrations per step
    accumulation: Count = 1             # parts that a step's batch is cut into, to save memory
    lr: Rate = 3e-4                     # peak learning rate; for GPT-2 124M rather 2e-5
    warmup_steps: Natural = 10          # steps of linear warm-up, then cosine down to 0
    weight_decay: Rate = 0.01           # AdamW's
    max_grad_norm: Positive = 1.0       # gradients are clipped to this norm
    max_new_tokens: Count = 32          # longest response in the samples, tokens
    checkpointing: bool = False         # compute each layer twice, to save memory
    dtype: Precision = "float32"        # of matrix products
    device: Device = "cpu"              # where to compute
    eval_every: Count = 50              # steps between held-out losses and samples
    save_every: Count = 50              # steps between checkpoints
    resume: bool = False                # go on from the last checkpoint of --out
    seed: Seed = 0                      # of data, order and samples

    def __post_init__(self):
        check_run_options(self)


# ---- the mathematics -----------------------------------------------------------------------------

def sft_loss(logprobs: torch.Tensor, mask: torch.Tensor, token_count: int) -> torch.Tensor:
    """Minus the sum of the response tokens' log-probabilities over `token_count`: nats per token.

    logprobs and mask (B, T-1); `token_count` is the number of response tokens in the whole step, so
    that the losses of the parts of a step add up to the loss of the step.

    Example: log-probabilities -1, -2, -9 with mask 1, 1, 0 and token_count 2 give 1.5.
    Lecture: lectures/02-sft.md, "The loss".
    """
    kept = torch.where(mask, logprobs, 0.0)                                         # (B, T-1)
    return -kept.sum() / token_count


# ---- collecting ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Demonstration:
    """One demonstration as token ids."""
    prompt: list[int]
    response: list[int]                 # ends with the end token

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def collect(cfg: SFTConfig, folder: str, tokenizer: Tokenizer, limit: int) -> list[Demonstration]:
    """Read, tokenize and bound the demonstrations; what does not fit is dropped and counted."""
    rows = []
    for record in records(cfg.data, "demonstrations", count=cfg.examples, seed=cfg.seed,
                          model=folder):
        prompt = encode_prompt(tokenizer, record["prompt"])
        rows.append(Demonstration(prompt, encode_response(tokenizer, record["response"])))
    kept, too_long = fit_rows(rows, limit)
    print(f"{len(kept)} demonstrations of at most {limit} tokens ({too_long} longer ones dropped)")
    check(len(kept) > cfg.held_out, f"{cfg.data}: {len(kept)} demonstrations are left, expected "
          f"more than the {cfg.held_out} to hold out; lower --held_out")
    return kept


def make_batch(rows: list[Demonstration], end_token: int, device: str = "cpu"):
    """Rows -> ids (B, T) right-padded, mask (B, T-1) bool: the columns whose action is response."""
    ids, lengths = pad([row.prompt + row.response for row in rows], end_token)      # (B, T), (B,)
    prompt_lengths = torch.tensor([len(row.prompt) for row in rows])                # (B,)
    mask = response_mask(prompt_lengths, lengths, ids.shape[1])                     # (B, T-1)
    return ids.to(device), mask.to(device)


METRICS = ["step", "loss", "held_out_loss", "grad_norm", "lr"]


# ---- one step, evaluation ------------------------------------------------------------------------

def batch_loss(policy: GPT2, ids: torch.Tensor, mask: torch.Tensor,
               token_count: int) -> torch.Tensor:
    """The step loss's share of these rows."""
    hidden, weight = policy.hidden(ids), policy.wte.weight              # (B, T, C), (V, C)
    logprobs, _ = token_logprobs(hidden, ids, mask, weight)                         # (B, T-1)
    return sft_loss(logprobs, mask, token_count)


def train_step(policy: GPT2, optimizer: torch.optim.Optimizer, rows: list[Demonstration],
               cfg: SFTConfig, end_token: int, where: str) -> tuple[float, float]:
    """One optimiser step on `rows`; returns loss and gradient norm."""
    token_count = sum(len(row.response) for row in rows)
    total = 0.0
    optimizer.zero_grad()
    for part in parallel.parts(rows, cfg.batch_size, cfg.accumulation):    # one part, by default
        ids, mask = make_batch(part, end_token, cfg.device)
        loss = batch_loss(policy, ids, mask, token_count)
        training.check_finite(where, loss=loss)
        loss.backward()
        total += loss.item()
    grad_norm = training.optimiser_step(policy, optimizer, cfg.max_grad_norm, where)
    return parallel.sums([total], cfg.device)[0], grad_norm


def evaluate(policy: GPT2, rows: list[Demonstration], cfg: SFTConfig, end_token: int) -> float:
    """Mean loss in nats per token over held-out demonstrations."""
    token_count = sum(len(row.response) for row in rows)
    total = 0.0
    with torch.no_grad():
        for part in parallel.parts(rows, cfg.batch_size, cfg.accumulation):
            ids, mask = make_batch(part, end_token, cfg.device)
            total += batch_loss(policy, ids, mask, token_count).item()
    return parallel.sums([total], cfg.device)[0]


def write_samples(policy: GPT2, rows: list[Demonstration], tokenizer: Tokenizer, cfg: SFTConfig,
                  step: int) -> str:
    """Responses to a few held-out prompts, as text."""
    prompts = [row.prompt for row in rows[:4]]
    made = generate(policy, prompts, cfg.max_new_tokens, end_token=tokenizer.end_token,
                    generator=random_stream(cfg.seed, 1, step))
    lines = []
    for row, prompt in enumerate(prompts):
        response = made.ids[row, len(prompt):made.lengths[row]].tolist()
        text = tokenizer.decode(prompt) + tokenizer.decode(response)
        lines.append("  " + text.replace("\n", " | "))
    return f"step {step}\n" + "\n".join(lines)


# ---- main ----------------------------------------------------------------------------------------

def main(cfg: SFTConfig) -> dict:
    """Fine-tune and save; returns the last row of metrics."""
    folder = begin(cfg, cfg.model)
    policy = load_network(GPT2, folder).to(cfg.device)
    policy.checkpointing, policy.dtype = cfg.checkpointing, cfg.dtype
    tokenizer = load_tokenizer(folder, policy)
    limit = policy.config.n_positions
    rows = mix(collect(cfg, folder, tokenizer, limit), cfg.data, cfg.seed, cfg.in_order)
    held_out, train = rows[:cfg.held_out], rows[cfg.held_out:]
    samplable = [row for row in held_out if len(row.prompt) + cfg.max_new_tokens <= limit]
    groups = [{"params": list(policy.parameters()), "peak": cfg.lr}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    total_steps = cfg.epochs * math.ceil(len(train) / cfg.batch_size)
    inputs = {"--model": fingerprint(policy), "--data": fingerprint(rows)}
    with RunFolder(cfg, total_steps, METRICS, inputs, policy, optimizer) as run:
        if run.step == 0:
            before = evaluate(policy, held_out, cfg, tokenizer.end_token)
            print(f"SFT: {len(train)} demonstrations x {cfg.epochs} epochs = {total_steps} steps; "
                  f"held-out loss before {before:.3f}", flush=True)
        for step in run.steps():
            training.set_learning_rate(optimizer, step, total_steps, cfg.warmup_steps, "cosine")
            order = training.batch_order(len(train), cfg.batch_size, cfg.seed, step)
            batch = [train[i] for i in order]
            loss, grad_norm = train_step(policy, optimizer, batch, cfg, tokenizer.end_token,
                                         f"step {step}")
            row = {"step": step + 1, "loss": loss, "grad_norm": grad_norm,
                   "lr": optimizer.param_groups[0]["lr"]}
            if row["step"] % cfg.eval_every == 0 or row["step"] == total_steps:
                row["held_out_loss"] = evaluate(policy, held_out, cfg, tokenizer.end_token)
                print(f"  step {step + 1:4d}/{total_steps}  loss {loss:.3f}  "
                      f"held out {row['held_out_loss']:.3f}", flush=True)
                if samplable:
                    run.sample(write_samples(policy, samplable, tokenizer, cfg, step + 1))
            run.log(row)
        run.publish(tokenizer, policy)
    return run.row


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(SFTConfig))
