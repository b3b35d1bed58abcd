"""Short runs of the trainers from the finished stages of the pipeline, with functions replaced.

The museum measures its mistakes in such runs, and `diagnose_rates` makes them ill. A wrong function
is put in the place of a right one from outside: the trainers know nothing of it.
"""

import contextlib
import io
import os

from minirlhf import ppo, ppo_report, reward_model, sft
from minirlhf.siblings import groups

TRAINERS = {"sft": (sft.main, sft.SFTConfig), "ppo": (ppo.main, ppo.PPOConfig),
            "reward_model": (reward_model.main, reward_model.RewardModelConfig),
            "groups": (groups.main, groups.GroupsConfig)}
STAGES = "STAGES/"                  # stands in options for the folder with the finished stages
STARTS = {"sft": {"model": STAGES + "tiny"}, "reward_model": {"model": STAGES + "sft"},
          "ppo": {"model": STAGES + "sft", "reward": STAGES + "reward_model"},
          "groups": {"model": STAGES + "sft", "reward": STAGES + "reward_model"}}


@contextlib.contextmanager
def substituted(replacements: list[tuple]):
    """Within the `with` block each owner's function is replaced; afterwards it is as before.

    replacements: (owner, name, wrong) each; the owner is the module or class whose code looks the
    name up.

    Example: with substituted([(ppo, "gae", wrong_gae)]): ppo.main(cfg)
    """
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    try:
        for owner, name, wrong in replacements:
            setattr(owner, name, wrong)
        yield
    finally:
        for owner, name, right in saved:
            setattr(owner, name, right)


def ignore(*anything) -> None:
    """Stands for a check that a program without checks does not make."""


UNCHECKED = [(ppo_report, "check", ignore)]     # PPO without what must hold in every run


def check_stages(stages: str, *names: str) -> None:
    """Fail now, with the command that makes what is missing, and not after the first run."""
    for name in names:
        folder = os.path.join(stages, name)
        if not os.path.exists(os.path.join(folder, "model.safetensors")):
            raise FileNotFoundError(f"{folder}: expected a finished stage, found none; make the "
                                    "stages with: python -m minirlhf")


def short_run(stage: str, stages: str, out: str, options: dict, replacements: list[tuple]) -> None:
    """Run the trainer of `stage` silently into the folder `out`, with functions replaced."""
    main, config = TRAINERS[stage]
    values = {name: value.replace(STAGES, os.path.join(stages, "")) if isinstance(value, str)
              else value for name, value in {**STARTS[stage], **options}.items()}
    with substituted(replacements), contextlib.redirect_stdout(io.StringIO()):
        main(config(**values, out=out))
