"""Follows one real prompt and response through all tensors of one iteration of PPO.

    python -m minirlhf.explain                     # the next iteration of checkpoints/ppo
    python -m minirlhf.explain --response 3        # another response of the same minibatch
    python -m minirlhf.explain --run ""            # iteration 0: the policy is still the SFT model

In:  the stages that `python -m minirlhf` (or `python -m minirlhf --quick`) leaves. Out: text; no
     file is written.

The numbers come in the order of the code: first `rollout` line by line, then the first minibatch of
`update`, then the same tokens after the update. Options of PPO that are not named here have their
defaults. Adam is new: its averages know of this one rollout only.
Lecture: lectures/05-ppo-the-run.md, "One response through all tensors".
"""

import os
from dataclasses import dataclass

from minirlhf import ppo
from minirlhf.data import read_prompts
from minirlhf.engine import training
from minirlhf.engine.fields import Amount, Count, Natural, Seed, check_fields
from minirlhf.engine.options import check, name_first_argument, one_sentence, parse_config
from minirlhf.explain.follow import follow
from minirlhf.explain.tell import tell
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import GPT2, ScalarModel
from minirlhf.rewards import Ensemble, load_reward, reward_folders
from minirlhf.tokenizer import load_tokenizer


@dataclass(frozen=True)
class ExplainConfig:
    """Options of `python -m minirlhf.explain`."""
    run: str = "checkpoints/ppo"        # PPO folder: policy and critic; "": those of iteration 0
    model: str = "checkpoints/sft"      # SFT folder: the reference
    reward: str = "checkpoints/reward_model"    # folder, folders with commas, or module:function
    ensemble: Ensemble = "mean"    # how several reward models vote
    prompts: str = "minirlhf.world:prompts"     # .jsonl file, or module:function giving records
    response: Natural = 0               # which response of the first minibatch
    batch_size: Count = 64              # prompts in the rollout; half of them in a minibatch
    max_new_tokens: Count = 32          # longest response, tokens
    lr: Amount = 1e-4                   # the policy's rate in the update, as late in a run
    seed: Seed = 0                      # of prompts, samples and minibatches

    def __post_init__(self):
        check_fields(self)
        size = max(1, self.batch_size // 2)
        check(self.response < size, f"--response is {self.response}, expected less than {size}, "
              "the size of a minibatch")


def main(cfg: ExplainConfig) -> dict:
    """Print the numbers; returns the tensors (`follow`)."""
    ppo_cfg = ppo.PPOConfig(
        model=cfg.model, reward=cfg.reward, ensemble=cfg.ensemble, prompts=cfg.prompts,
        batch_size=cfg.batch_size, minibatch_size=max(1, cfg.batch_size // 2), lr=cfg.lr,
        max_new_tokens=cfg.max_new_tokens, prompt_count=cfg.batch_size, seed=cfg.seed)
    stages = [cfg.model, *reward_folders(cfg.reward), *([cfg.run] if cfg.run else [])]
    missing = [folder for folder in stages if not os.path.isdir(folder)]
    if missing:
        raise FileNotFoundError(f"{', '.join(missing)}: no such folder; first run `python -m "
                                "minirlhf` (a minute or two) or `python -m minirlhf --quick`, or "
                                "name other folders by --run, --model, --reward")
    check(not cfg.run or os.path.isdir(os.path.join(cfg.run, "critic")), f"{cfg.run} has no folder "
          "`critic`, expected what minirlhf.ppo wrote")
    networks, ref_policy = ppo.make_networks(ppo_cfg)
    tokenizer = load_tokenizer(cfg.model, ref_policy)
    if cfg.run:
        policy = load_network(GPT2, cfg.run)
        critic = load_network(ScalarModel, os.path.join(cfg.run, "critic"))
        fits = (load_tokenizer(cfg.run, policy) == tokenizer and policy.config == ref_policy.config
                and critic.config == networks.critic.config)
        check(fits, f"{cfg.run} does not fit {cfg.model} and {cfg.reward}; name the folders that "
              "this run started from by --model and --reward")
        networks.policy.load_state_dict(policy.state_dict())
        networks.critic.load_state_dict(critic.state_dict())
    reward_function = load_reward(cfg.reward, cfg.ensemble, tokenizer)
    context = min(network.config.n_positions for network in (networks.critic, ref_policy))
    prompts, _ = read_prompts(cfg.prompts, tokenizer, context, cfg.max_new_tokens,
                              model=cfg.model, count=cfg.batch_size, seed=cfg.seed,
                              fewest=cfg.batch_size)
    # iteration 0 belongs to a policy that has not moved: `check_rollout` insists on kl_ref 0
    iteration = 1 if cfg.run else 0
    order = training.batch_order(len(prompts), cfg.batch_size, cfg.seed, iteration, True)
    seen = follow(networks, ref_policy, reward_function, tokenizer,
                  [prompts[i].ids for i in order], ppo_cfg, iteration, cfg.response)
    print(tell(seen, ppo_cfg, tokenizer))
    return seen


if __name__ == "__main__":
    name_first_argument("run")
    with one_sentence():
        main(parse_config(ExplainConfig))
