"""The model card of a saved folder: a README.md with the Hub's header, written anew at each save.

    write_model_card("checkpoints/sft", run, 50257)

It says what the folder is, what it was made from, by which command, with which figures, and how to
use it in transformers: so that the folder can be uploaded as it is. A README.md of somebody else
stays as it is.
"""

import os
import re
import shlex

from minirlhf.files.disk import read_json, write_atomically
from minirlhf.files.hub import OWNER, published_name

MARK = "<!-- Written by minirlhf at each save. Without this line it is kept as it is. -->"
STAGES = {"Pretrain": ("pretrain", "a base model, trained on text"),
          "SFT": ("sft", "supervised fine-tuning on demonstrations"),
          "RewardModel": ("reward_model", "a reward model, trained on comparisons"),
          "PPO": ("ppo", "PPO against a reward model")}
PYTHON = """```python
import torch
from transformers import {model}, AutoTokenizer

folder = "."                            # this one, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {model}.from_pretrained(folder)
{use}
```
"""
GENERATE = """prompt = tokenizer.eos_token + "Prompt: What is the capital of France?\\nResponse:"
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
made = model.generate(**inputs, max_new_tokens={longest}, do_sample=True,
                      pad_token_id=tokenizer.eos_token_id{suppress})
print(tokenizer.decode(made[0, inputs.input_ids.shape[1]:], skip_special_tokens=True))"""
SCORE = """prompt, end = "Prompt: What is the capital of France?\\nResponse:", tokenizer.eos_token
texts = [end + prompt + " " + response + end for response in ("Paris.", "It is Rome, I think.")]
rows = [torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True,
                                      padding_value=model.config.pad_token_id)
print(model(ids).logits[:, 0])"""
PADDING = """
A score is read at the last token of a row that is not the pad token, {pad}, which is in no text.
Fill rows up with it on the right, as above. Not with the end token (`pad_token = eos_token`, as is
often advised): the end token of a response counts, and would be overlooked.
"""


def write_model_card(folder: str, run: dict | None, used_tokens: int) -> None:
    """Write README.md, unless there is one without our mark.

    `run` is what run.json says of the run that made the folder, if one did; `used_tokens` is how
    many rows of the embedding are tokens.
    """
    path = os.path.join(folder, "README.md")
    if os.path.lexists(path) and not is_ours(path):
        return
    config = read_json(os.path.join(folder, "config.json"))
    text = model_card(config, run or {}, used_tokens)
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def is_ours(path: str) -> bool:
    """Whether a README.md has our mark among its first lines."""
    if not os.path.isfile(path) or os.path.islink(path):
        return False
    with open(path, "rb") as file:
        return MARK.encode() in file.read(4096)


def model_card(config: dict, run: dict, used_tokens: int) -> str:
    """The text of the card of a folder with this config.json and run.json.

    It names neither folder nor time: a run that goes on elsewhere ends with the same bytes.
    """
    scorer = "GPT2ForSequenceClassification" in config["architectures"]
    options = run.get("config", {})
    command, what = STAGES.get(run.get("command"), ("", "a language model"))
    if scorer and command == "ppo":
        what = "the critic of PPO, which estimates the reward that is still to come"
    elif scorer:
        what = "a reward model, trained on comparisons" if command else "a reward model or critic"
    base = find_base(options.get("model", ""))
    header = ["---", "library_name: transformers",
              f"pipeline_tag: {'text-classification' if scorer else 'text-generation'}"]
    header += [f"base_model: {base}"] * bool(base)
    header += ["tags:", "- gpt2", "- rlhf", "- minirlhf"]
    header += [f"- {command.replace('_', '-')}"] * bool(command) + ["---", MARK, ""]
    title = f"minirlhf {command.replace('_', ' ')}".strip()
    lines = [f"# {title}", "", f"GPT-2 of {config['n_layer']} layers and "
             f"{config['n_embd']} channels, context {config['n_positions']}, {used_tokens} tokens: "
             f"{what}. Made with minirlhf.", "",
             "No license is stated here: name yours as `license:` in the header; those of the base "
             "model and of the data apply, too.", ""]
    if command:
        line = " ".join(["python -m minirlhf." + command, *words(options)])
        lines += [*origins(options), f"- command: {code(line)}", ""]
    figures = {key: value for key, value in run.get("row", {}).items()
               if type(value) in (int, float)}
    if figures:
        lines += ["The last row of metrics.csv:", "", "| metric | value |", "|---|---|"]
        lines += [f"| {plain(key)} | {value if type(value) is int else format(value, '.4g')} |"
                  for key, value in figures.items()] + [""]
    return "\n".join([*header, *lines, ""]) + usage(config, scorer, used_tokens)


def usage(config: dict, scorer: bool, used_tokens: int) -> str:
    """How to use the folder in transformers."""
    rows, text = config["vocab_size"], "## In transformers\n\n"
    if scorer:
        text += PYTHON.format(model="AutoModelForSequenceClassification", use=SCORE)
        return text + PADDING.format(pad=config.get("pad_token_id"))
    suppress = f",\n                      suppress_tokens=list(range({used_tokens}, {rows}))"
    use = GENERATE.format(longest=min(32, config["n_positions"] // 2),
                          suppress=suppress if rows > used_tokens else "")
    text += PYTHON.format(model="AutoModelForCausalLM", use=use)
    text += ("\nEvery row begins with the end token. Prompts of HH-RLHF and TL;DR have their own "
             "form in place of `Prompt: ... Response:`.\n")
    if rows > used_tokens:
        text += (f"\nRows {used_tokens} to {rows - 1} of the embedding are no tokens; they fill it "
                 "up, and were never trained.\n")
    return text


# ---- what a run says of itself -------------------------------------------------------------------

def find_base(name: str) -> str:
    """The Hub's name of the model that a chain of stages began with; "" if that is none there."""
    for _ in range(8):
        if published_name(name):
            return f"{OWNER}/{published_name(name)}"
        try:
            options = read_json(os.path.join(name, "run.json")).get("config")
        except (OSError, ValueError):                    # no run's folder: the chain ends here
            return ""
        name = options.get("model", "") if isinstance(options, dict) else ""
        if not isinstance(name, str):
            return ""
    return ""


def origins(options: dict) -> list[str]:
    """Where weights, data and rewards were from."""
    names = {"model": "base", "text": "text", "data": "data", "prompts": "prompts",
             "reward": "reward"}
    return [f"- {word}: {code(options[name])}" for name, word in names.items()
            if options.get(name)]


def words(options: dict) -> list[str]:
    """Options as they stand on the command line."""
    on_the_line = []
    for name, value in options.items():
        if name in ("out", "resume", "save_every"):      # they change nothing in the result
            continue
        if isinstance(value, bool):
            on_the_line.append(f"--{name}" if value else f"--no-{name}")
        else:
            on_the_line += [f"--{name}", shlex.quote(str(value))]
    return on_the_line


def plain(text) -> str:
    """Text without what Markdown, HTML or a terminal would obey."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(text))
    return "".join("\\" + letter if letter in "\\`*_[]<>|#" else letter for letter in text)


def code(text) -> str:
    """Text as a piece of code in Markdown."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(text))
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " * text.startswith("`") or " " * text.endswith("`")
    return f"{ticks}{space}{text}{space}{ticks}"
