"""`credit`: which token earned the score? GAE's lambda, the critic's start, rewards per token.

All arms make the same iterations of the policy, with the same rates and prompts. A critic is warmed
up in a run of its own before that, on other prompts; the option `--critic_warmup` would use up the
first iterations of the one schedule that policy and critic share.
"""

import os
from collections.abc import Callable

from minirlhf import ppo
from minirlhf.engine.metrics import read_metrics
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import GPT2, PolicyWithValue, ScalarModel
from minirlhf.lab.experiment import Experiment, Finding, Rows, compare
from minirlhf.lab.measure import measure
from minirlhf.lab.pictures import new_picture, save_picture, show_intervals, show_series
from minirlhf.lab.shared import Task, control_policy, reward_model_folder, series, train_policy
from minirlhf.museum.short_runs import substituted

ABOUT = Experiment(
    name="credit",
    claim="With one score at the end, credit assignment decides: lambda between 0 and 1, a critic "
          "that knows the reward, and rewards per token where one has them.",
    source="the seed lecture (\"this is why GAE is critical\"); Schulman et al. 2015, section 6 "
           "(lambda); Ouyang et al. 2022, appendix C.4 (the critic starts from the reward model)",
    rule="Shown if gold at the end is higher with lambda 0.95 than with 0 and 1, and early gold "
         "higher with a critic from the reward model than with one from the SFT model, "
         "with a critic that was trained alone for 5 iterations before than without, and with gold "
         "paid per token than at the end: intervals of the differences over seeds above 0. Refuted "
         "if one is below 0.",
    figures=("gold", "gold_early", "explained_var", "kl_ref", "win_rate"),
    units={"gold_early": "points per response", "explained_var": "share of variance"})

CONTROL, COLD = "lam 0.95, critic from the reward model", "critic from the SFT model"
WARM, AT_END, PER_TOKEN = "critic warmed up", "gold, paid at the end", "gold, paid per token"
WARM_UP = 5                         # iterations of the critic alone
ARMS = {"lam 0": {"lam": 0.0}, "lam 0.5": {"lam": 0.5}, CONTROL: {}, "lam 1": {"lam": 1.0},
        COLD: {}, WARM: {},
        AT_END: {"reward": "minirlhf.world:gold_reward"},
        PER_TOKEN: {"reward": "minirlhf.world:gold_reward_per_token"}}

make_networks = ppo.make_networks


def networks_with_a_cold_critic(cfg: ppo.PPOConfig) -> tuple[PolicyWithValue, GPT2]:
    """`ppo.make_networks`, but the critic's trunk is the SFT model's and not the reward model's."""
    networks, ref_policy = make_networks(cfg)
    networks.critic.transformer.load_state_dict(networks.policy.state_dict())
    return networks, ref_policy


def networks_with_the_critic_of(folder: str) -> Callable:
    """In the place of `ppo.make_networks`: the same with the critic of the run in `folder`."""
    def networks_with_that_critic(cfg: ppo.PPOConfig) -> tuple[PolicyWithValue, GPT2]:
        """`ppo.make_networks` with a critic that was trained before."""
        networks, ref_policy = make_networks(cfg)
        critic = load_network(ScalarModel, os.path.join(folder, "critic"))
        networks.critic.load_state_dict(critic.state_dict())
        return networks, ref_policy
    return networks_with_that_critic


def train(task: Task) -> str:
    """The folder of the arm's PPO run."""
    if task.arm == CONTROL:
        return control_policy(task)
    options, places = {"reward": reward_model_folder(task), **ARMS[task.arm]}, []
    if task.arm == COLD:
        places = [(ppo, "make_networks", networks_with_a_cold_critic)]
    if task.arm == WARM:
        before = train_policy(task, "before", **options, iterations=WARM_UP, critic_warmup=WARM_UP,
                              seed=1000 + task.seed)
        places = [(ppo, "make_networks", networks_with_the_critic_of(before))]
    with substituted(places):
        return train_policy(task, **options)


def early(values: list[float]) -> float:
    """Mean of the second fifth of the iterations: where runs differ most.

    Example: of 0, 1, ..., 9 it is that of 2 and 3.
    """
    part = values[len(values) // 5:max(1, 2 * len(values) // 5)]
    return sum(part) / len(part)


def run(task: Task) -> dict:
    """The arm's policy at the end, its gold early in the run, and how much its critic foresees."""
    folder = train(task)
    gold = [row["gold"] for row in read_metrics(folder)]
    foreseen = [row["explained_var"] for row in read_metrics(folder)][-5:]
    return {**measure(task, folder, reward_model_folder(task)),
            **series(folder, "gold", "explained_var"),
            "gold_early": early(gold), "explained_var": sum(foreseen) / len(foreseen)}


def findings(rows: Rows) -> list[Finding]:
    """The five parts of the claim."""
    pairs = ((CONTROL, "lam 0", "gold"), (CONTROL, "lam 1", "gold"),
             (CONTROL, COLD, "gold_early"), (WARM, CONTROL, "gold_early"),
             (PER_TOKEN, AT_END, "gold_early"))
    return [compare(rows, f"{figure} of \"{one}\" is above that of \"{other}\"", (one, figure), ">",
                    (other, figure)) for one, other, figure in pairs]


def picture(rows: Rows, path: str) -> None:
    """Gold and what the critic foresees, for lambda, critics and rewards."""
    figure, axes = new_picture(6)
    show_intervals(axes[0], rows, "gold")
    lambdas = ["lam 0", "lam 0.5", CONTROL, "lam 1"]
    panels = ((axes[1], "gold", "gold by lambda", lambdas),
              (axes[2], "explained_var", "what the critic foresees", lambdas),
              (axes[3], "gold", "gold by critic", [CONTROL, COLD, WARM]),
              (axes[4], "explained_var", "what the critic foresees", [CONTROL, COLD, WARM]),
              (axes[5], "gold", "gold by place of payment", [AT_END, PER_TOKEN]))
    for panel, name, title, arms in panels:
        unit = "gold, points per response" if name == "gold" else "explained_var"
        show_series(panel, rows, f"{name}_by_step", title, "iteration", unit, arms)
    save_picture(figure, path)
