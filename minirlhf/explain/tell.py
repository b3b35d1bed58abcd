"""What `python -m minirlhf.explain` prints, from what `follow` gives.

Lecture: lectures/05-ppo-the-run.md, "One response through all tensors".
"""

import torch

from minirlhf.ppo import PPOConfig
from minirlhf.tokenizer import Tokenizer

WIDTH = 12                          # of a column


def shape(x: torch.Tensor) -> str:
    """The shape as it is printed beside a name, 12 wide."""
    return f"{str(tuple(x.shape)):12}"


def as_text(x) -> str:
    """A cell of a table."""
    if isinstance(x, str):
        return x
    return str(x) if isinstance(x, int) else f"{x:.3f}"


def table(tokens: list[str], columns: dict[str, list], total: tuple[str, ...] = ()) -> str:
    """One line for each token; the columns named in `total` are added up in a last line."""
    widths = [max(WIDTH, len(name) + 2) for name in columns]
    rows = [["token", *columns]]
    rows += [[token, *(column[i] for column in columns.values())]
            for i, token in enumerate(tokens)]
    if total:
        rows.append(["sum", *(sum(column) if name in total else ""
                              for name, column in columns.items())])
    lines = [f"    {token:14}" + "".join(f"{as_text(cell):>{width}}"
                                         for cell, width in zip(cells, widths))
             for token, *cells in rows]
    return "\n".join(line.rstrip() for line in lines)


def direction(slope: float) -> str:
    """Where gradient descent moves a log-probability whose loss has this slope."""
    return "up" if slope < 0 else "down" if slope > 0 else "clipped"


def tell(seen: dict, cfg: PPOConfig, tokenizer: Tokenizer) -> str:
    """The whole text."""
    return "\n\n".join([sampled(seen, tokenizer), scored(seen, tokenizer, cfg),
                        credited(seen, tokenizer, cfg), updated(seen, tokenizer, cfg)])


def tokens_of(seen: dict, tokenizer: Tokenizer) -> list[str]:
    """The response's tokens as text in which a space and a line's end can be seen."""
    row = seen["row"]
    ids = row.ids[0, 1:][row.response_mask[0]].tolist()
    return [repr(tokenizer.decode([token], skip_end=False))[1:-1].replace(" ", "_")
            for token in ids]


def cut(seen: dict, x: torch.Tensor) -> list:
    """The response's columns of a tensor (T-1,) or (1, T-1)."""
    return x.reshape(-1)[seen["row"].response_mask[0]].tolist()


def sampled(seen: dict, tokenizer: Tokenizer) -> str:
    """`rollout` as far as `forward_pass`."""
    batch, row = seen["batch"], seen["row"]
    prompt, length = int(row.prompt_lengths), int(row.lengths)
    ids, before = row.ids[0].tolist(), prompt - 1
    apart = (row.sampled_logprobs - row.old_logprobs).abs().max().item()
    columns = {"ids[t+1]": ids[prompt:length]}
    for name in ("sampled_logprobs", "old_logprobs", "ref_logprobs", "old_values"):
        columns[name] = cut(seen, getattr(row, name))
    return f"""ROLLOUT

generate: the policy writes a response to each of {len(batch.ids)} prompts. Row {seen["number"]}:
    ids              {shape(batch.ids)} {prompt} of the prompt, {length - prompt} of the response, \
then padding
    prompt_lengths   {shape(batch.prompt_lengths)} {prompt}
    lengths          {shape(batch.lengths)} {length}
    ended            {shape(batch.ended)} {bool(row.ended)}
    prompt           {tokenizer.decode(ids[:prompt])!r}
    response         {tokenizer.decode(ids[prompt:length], skip_end=False)!r}

response_mask: column t is for the action ids[t+1]
    response_mask    {shape(batch.response_mask)} {before} times 0, {length - prompt} times 1, \
{batch.response_mask.shape[1] - length + 1} times 0

forward_pass: the finished rows go through policy, reference and critic. Below, only the
columns t = {before} to {length - 2}, where the mask is 1.
{table(tokens_of(seen, tokenizer), columns)}
    sampled_logprobs and old_logprobs differ by at most {apart:.0e}"""


def scored(seen: dict, tokenizer: Tokenizer, cfg: PPOConfig) -> str:
    """`rollout` from the score to the rewards."""
    row, given, score = seen["row"], seen["given"], seen["row"].scores.item()
    kl_ref, rewards = cut(seen, row.kl_ref), cut(seen, row.rewards)
    columns = {"kl_ref": kl_ref, "payment": [-cfg.kl_coef * kl for kl in kl_ref],
               "rewards": rewards}
    total = score - cfg.kl_coef * sum(kl_ref)
    shape_of_scores = shape(seen["batch"].scores).strip()
    return f"""reward_function: one number for the whole response, {shape_of_scores}
    score {given:.3f}, missing-end penalty {abs(given - score):.3f}: scores {score:.3f}

kl_ref = old_logprobs - ref_logprobs; shaped_rewards: every token pays
-{cfg.kl_coef:g} * kl_ref, and the last action gets the score.
{table(tokens_of(seen, tokenizer), columns, ("kl_ref", "payment", "rewards"))}
    adds up: {score:.3f} - {cfg.kl_coef:g} * {sum(kl_ref):.3f} = {total:.3f}"""


def credited(seen: dict, tokenizer: Tokenizer, cfg: PPOConfig) -> str:
    """`rollout` from GAE to its end."""
    row = seen["row"]
    columns = {name: cut(seen, x) for name, x in (
        ("rewards", row.rewards), ("old_values", row.old_values), ("delta", seen["delta"]),
        ("unwhitened", seen["raw_advantages"]), ("returns", row.returns),
        ("advantages", row.advantages))}
    count = int(seen["batch"].response_mask.sum())
    return f"""gae, gamma {cfg.gamma:g}, lambda {cfg.lam:g}:
delta = reward + {cfg.gamma:g} * next value - value;
advantage = delta + {cfg.gamma * cfg.lam:g} * next advantage; returns = advantage + value.
whiten: all {count} response tokens of the rollout have mean {seen["mean"]:.3f} and deviation \
{seen["deviation"]:.3f};
advantages = (unwhitened - mean) / deviation.
{table(tokens_of(seen, tokenizer), columns)}"""


def updated(seen: dict, tokenizer: Tokenizer, cfg: PPOConfig) -> str:
    """The first minibatch of `update`, and the same tokens after its last."""
    row, step, metrics = seen["row"], seen["first_step"], seen["metrics"]
    before, after = ({name: cut(seen, x) for name, x in seen[when].items()}
                     for when in ("before", "after"))
    first = {"logprobs": before["logprobs"], "ratio": before["ratio"],
             "advantages": cut(seen, row.advantages), "loss": before["loss"],
             "slope": before["slope"], "goes": [direction(slope) for slope in before["slope"]],
             "value_loss": before["value_loss"]}
    last = {"logprobs": after["logprobs"], "ratio": after["ratio"], "slope": after["slope"],
            "goes": [direction(slope) for slope in after["slope"]], "values": after["values"],
            "returns": cut(seen, row.returns)}
    steps, rows = cfg.epochs * -(-cfg.batch_size // cfg.minibatch_size), len(seen["minibatch"])
    return f"""UPDATE

first of {steps} minibatches, {rows} rows, no step made: logprobs are old_logprobs.
A token's loss is -ratio * advantage. Slope below 0: the token is to become likelier.
{table(tokens_of(seen, tokenizer), first)}
    over the {step["tokens"]} tokens of the minibatch: pg_loss {step["pg_loss"]:.3f}, vf_loss \
{step["vf_loss"]:.3f}, loss = pg_loss + {cfg.vf_coef:g} * vf_loss = {step["loss"]:.3f}

after the update, the same tokens. "clipped" stands where the ratio has left the range
{1 - cfg.cliprange:g} to {1 + cfg.cliprange:g} in the direction of its advantage: no more pull.
{table(tokens_of(seen, tokenizer), last)}
    over the whole update: clipfrac {metrics["clipfrac"]:.3f}, kl_old {metrics["kl_old"]:.4f}, \
ratio_max {metrics["ratio_max"]:.3f}, grad_norm {metrics["grad_norm"]:.3f}"""
