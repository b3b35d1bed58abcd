"""Pretrain a small GPT-2 and its BPE from scratch: the base model that the three stages start from.

    python -m minirlhf.pretrain                          # makes the shipped base anew, elsewhere
    python -m minirlhf.pretrain --text book.txt --out checkpoints/book
    python -m minirlhf.pretrain --tokenizer gpt2 --steps 0 --context 512 --out checkpoints/random

In:  the corpus of the embedded text world, or any text file whose documents are separated by blank
     lines. Out: a checkpoint folder in Hugging Face format with the tokenizer, and `metrics.csv`.

The algorithm: train a byte-level BPE on the text; write every document as <|endoftext|> followed by
its tokens, one after another; draw windows of `context` tokens, most of which begin where a
document begins; predict every next token with AdamW under a warm-up and a cosine. The next-token
loss on documents that were put aside is printed as it goes.

Choices: windows begin at documents because prompts will: a prompt is <|endoftext|> and its text.
With --steps 0 the random weights are saved: a model of any shape to try the other stages on.
The weights are stored in float16, which halves the shipped file and moves no logit by more than
about 0.01; they are loaded as float32.

Shapes: B windows, T tokens.   Lecture: lectures/00-map.md, "The base model".
"""

import os
import time
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from minirlhf.engine.fields import Count, Natural, Rate, Seed, check_fields
from minirlhf.engine.functions import load_function
from minirlhf.engine.metrics import MetricsFile
from minirlhf.engine.options import check, check_range, one_sentence, parse_config
from minirlhf.engine.output import RUN_FILE, check_output, command_of
from minirlhf.engine.training import check_finite, learning_rate, random_stream
from minirlhf.files.disk import open_regular, write_json
from minirlhf.files.pretrained import save_folder
from minirlhf.generate import generate
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.tokenizer import Tokenizer, train_bpe


@dataclass(frozen=True)
class PretrainConfig:
    """Options of `python -m minirlhf.pretrain`."""
    text: str = ""                      # text file, a blank line between documents; "": the world
    corpus: str = "minirlhf.world:corpus"    # module:function that yields documents, without --text
    characters: int = 60_000_000        # size of the corpus that the function is asked for
    out: str = "checkpoints/base"       # folder to write
    replace: bool = False               # write into --out even if it holds something else
    tokenizer: Literal["", "gpt2"] = ""    # gpt2: GPT-2's own BPE; "": learned from the text
    vocab_size: int = 2048              # tokens of the BPE that is trained, <|endoftext|> included
    n_embd: Count = 96                  # channels C
    n_layer: Count = 4                  # layers
    n_head: Count = 3                   # attention heads
    context: int = 64                   # longest sequence, tokens
    steps: Natural = 18_000             # optimiser steps; 0: save the random weights
    batch_size: Count = 32              # windows per step
    lr: Rate = 3e-3                     # peak learning rate
    weight_decay: Rate = 0.1            # AdamW's, on matrices only
    warmup_steps: Natural = 200         # steps of linear warm-up
    save_every: Count = 1000            # steps between checkpoints and lines of progress
    threads: Natural = 0                # CPU threads; 0: torch's default
    seed: Seed = 1                      # of the corpus, the weights and the windows

    def __post_init__(self):
        check_fields(self)
        check_range(self, "characters", 10_000, 10**10)
        check_range(self, "vocab_size", 257, 100_000)
        check_range(self, "context", 8, 100_000)


# ---- the text as one stream of tokens ------------------------------------------------------------

def read_documents(cfg: PretrainConfig) -> list[str]:
    """The documents to learn from: of the text file, or of the corpus function."""
    if not cfg.text:
        return list(load_function(cfg.corpus)(cfg.characters, cfg.seed))
    with open_regular(cfg.text) as file:
        try:
            text = file.read().decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{cfg.text}: not UTF-8 text at byte {error.start}") from None
    documents = [block.strip() for block in text.split("\n\n")]
    documents = [document for document in documents if document]
    check(len(documents) >= 20, f"{cfg.text}: {len(documents)} documents separated by blank lines, "
          "expected at least 20")
    return documents


def pack(documents: list[str], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Documents as one token stream, and where each begins.

    Example: documents "a" and "bc" become [end, a, end, b, c] with starts [0, 2].
    """
    parts, starts, length = [], [], 0
    for document in documents:
        ids = [tokenizer.end_token] + tokenizer.encode(document)
        starts.append(length)
        length += len(ids)
        parts.append(np.array(ids, dtype=np.uint16 if tokenizer.vocab_size < 2**16 else np.int32))
    return np.concatenate(parts), np.array(starts)


def draw_windows(stream: np.ndarray, starts: np.ndarray, rows: int, context: int,
                 generator: torch.Generator) -> torch.Tensor:
    """`rows` windows (B, T+1) of context + 1 tokens; three of four begin where a document does."""
    last = len(stream) - context - 1
    at_document = torch.randint(int((starts <= last).sum()), (rows,), generator=generator).numpy()
    anywhere = torch.randint(last + 1, (rows,), generator=generator).numpy()
    use_document = torch.rand(rows, generator=generator).numpy() < 0.75
    begin = np.where(use_document, starts[at_document], anywhere)                   # (B,)
    windows = stream[begin[:, None] + np.arange(context + 1)]                       # (B, T+1)
    return torch.from_numpy(windows.astype(np.int64))


# ---- training ------------------------------------------------------------------------------------

def next_token_loss(model: GPT2, windows: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss in nats of windows (B, T+1)."""
    logits = model(windows[:, :-1])                                                 # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def make_optimizer(model: GPT2, cfg: PretrainConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices, not on biases and layer norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98), fused=True)


def save(model: GPT2, tokenizer: Tokenizer, cfg: PretrainConfig, row: dict) -> None:
    """Write tokenizer, weights (float16) and run.json into the folder."""
    run = {"command": command_of(cfg), "finished": True, "config": asdict(cfg), "row": row}
    save_folder(model, tokenizer, cfg.out, run, dtype=torch.float16)
    write_json(os.path.join(cfg.out, RUN_FILE), run)


def train(model: GPT2, tokenizer: Tokenizer, documents: list[str], cfg: PretrainConfig,
          started: float) -> dict:
    """Learn the documents' text and save as it goes; return the last row of metrics."""
    held_out = max(1, min(1000, len(documents) // 20))
    stream, starts = pack(documents[held_out:], tokenizer)
    test_stream, test_starts = pack(documents[:held_out], tokenizer)
    check(min(len(stream), len(test_stream)) > cfg.context + 1,
          f"the text has {len(stream) + len(test_stream)} tokens: too few for --context "
          f"{cfg.context}")
    optimizer = make_optimizer(model, cfg)
    print(f"{len(documents)} documents, {len(stream) / 1e6:.1f}M tokens of {tokenizer.vocab_size} "
          f"kinds, {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters; {cfg.steps} "
          f"steps of {cfg.batch_size * cfg.context} tokens "
          f"(prepared in {time.perf_counter() - started:.0f} s)", flush=True)
    metrics = MetricsFile(cfg.out, ["step", "loss", "held_out_loss", "lr", "seconds"])
    test_windows = draw_windows(test_stream, test_starts, 128, cfg.context, random_stream(0))
    total, row = 0.0, {}
    for step in range(cfg.steps):
        windows = draw_windows(stream, starts, cfg.batch_size, cfg.context,
                               random_stream(cfg.seed, step))                       # (B, T+1)
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup_steps, "cosine")
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = next_token_loss(model, windows)
        check_finite(f"step {step}", loss=loss)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            steps = step % cfg.save_every + 1
            with torch.no_grad():
                held_out_loss = next_token_loss(model, test_windows).item()
            row = {"step": step + 1, "loss": total / steps, "held_out_loss": held_out_loss,
                   "lr": lr, "seconds": time.perf_counter() - started}
            metrics.write(row)
            save(model, tokenizer, cfg, row)
            total = 0.0
            text = generate(model, [[tokenizer.end_token]], min(40, cfg.context - 1),
                            end_token=tokenizer.end_token, generator=random_stream(0, step))
            left = row["seconds"] / (step + 1) * (cfg.steps - step - 1)
            print(f"step {step + 1:6d}  loss {row['loss']:.3f}  held out {held_out_loss:.3f}  "
                  f"{left / 60:4.1f} min left | {tokenizer.decode(text.ids[0].tolist())!r}",
                  flush=True)
    metrics.finish()
    return row


def main(cfg: PretrainConfig) -> dict:
    """Train and save; return the last row of metrics (empty if `steps` is 0)."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if not cfg.replace:
        check_output(cfg.out, "Pretrain")
    needs_text = cfg.steps > 0 or not cfg.tokenizer
    documents = read_documents(cfg) if needs_text else []
    started = time.perf_counter()
    tokenizer = Tokenizer.gpt2() if cfg.tokenizer else train_bpe(documents[:20_000], cfg.vocab_size)
    torch.manual_seed(cfg.seed)
    model = GPT2(GPT2Config(tokenizer.vocab_size, cfg.context, cfg.n_embd, cfg.n_layer, cfg.n_head))
    if cfg.steps == 0:
        save(model, tokenizer, cfg, {})
        print(f"{cfg.out}: random weights, {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M "
              f"parameters, {tokenizer.vocab_size} tokens")
        return {}
    return train(model, tokenizer, documents, cfg, started)


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(PretrainConfig))
