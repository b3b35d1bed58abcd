"""The whole pipeline on the embedded text world: base -> SFT -> reward models -> PPO -> evaluation.

    python -m minirlhf            # little more than a minute on two CPU cores, without network
    python -m minirlhf --quick    # under a minute, clearly worse: to see that everything runs

When it is stopped, the same command goes on where it was.

In:  the shipped base model, checkpoints/tiny. Out, under checkpoints/: the folders `sft`,
     `reward_model`, `reward_model_2`, `ppo`, the comparisons, `report.json`, `curves.png`
     and `report.html`, the page to look at.

Each stage is the command that you can run by itself with the options printed here; this file only
runs them one after another, compares the three policies on held-out prompts, and reports.
Lecture: lectures/00-map.md, "Run it".
"""

import bdb
import importlib
import json
import os
import time
from dataclasses import asdict, dataclass, fields, replace

from minirlhf import ppo, reward_model, sft
from minirlhf.engine.jobs import run_jobs
from minirlhf.engine.options import Stopped, check, check_range, one_sentence, parse_config
from minirlhf.engine.output import check_output
from minirlhf.engine.state import STATE_FILE
from minirlhf.evaluate import (
    cell,
    describe,
    gold_figures,
    judge_answers,
    kl_to_reference,
    load_policy,
    read_prompts,
    sample_answers,
    side_by_side,
    table,
)
from minirlhf.files.disk import read_json, write_atomically, write_json
from minirlhf.files.records import FIELDS
from minirlhf.page.write import write_page
from minirlhf.plots import pipeline_picture
from minirlhf.rewards import load_reward
from minirlhf.world import comparisons


@dataclass(frozen=True)
class PipelineConfig:
    """Options of `python -m minirlhf`."""
    base: str = "checkpoints/tiny"      # base model to start from
    out: str = "checkpoints"            # folder for the stages' folders and the report
    seed: int = 0                       # of demonstrations, comparisons, networks and samples
    quick: bool = False                 # small data and few steps: for a smoke test, clearly worse

    def __post_init__(self):
        check_range(self, "seed", 0, 10**9)


@dataclass(frozen=True)
class Plan:
    """How much of everything; what is not named here is the stage's own default."""
    demonstrations: int = 3000
    comparisons: int = 8000
    reward_models: int = 2
    iterations: int = 25
    prompts: int = 480                  # held-out prompts of the evaluation
    answers: int = 6                    # answers to each, from each policy


QUICK = Plan(demonstrations=1000, comparisons=1000, reward_models=1, iterations=6, prompts=96,
             answers=4)


def command(module: str, cfg) -> str:
    """The command line that runs a stage with this config: only what differs from the defaults."""
    words = [f"python -m minirlhf.{module}"]
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if value != field.default:
            words.append(f"--{field.name}" if value is True else f"--{field.name} {value}")
    return " ".join(words)


STAGES = {"sft": "SFT", "reward_model": "RewardModel", "reward_model_2": "RewardModel",
          "ppo": "PPO"}                 # folder -> command, as the stage's run.json says it
WRITTEN = ("comparisons.jsonl", "report.json", "curves.png", "report.html")


class Progress:
    """Which stages of the pipeline were begun and finished, and their seconds: pipeline.json.

    While that file is there the pipeline is not finished, and the same command goes on with it.
    """

    def __init__(self, cfg: PipelineConfig, plan: Plan):
        self.path = os.path.join(cfg.out, "pipeline.json")
        self.options = {"base": cfg.base, "seed": cfg.seed, **asdict(plan)}
        self.resume, self.begun, self.seconds = os.path.exists(self.path), [], {}
        if self.resume:
            saved = read_json(self.path)
            ok = isinstance(saved.get("seconds"), dict) and isinstance(saved.get("begun"), list)
            check(ok and saved.get("options") == self.options, f"{cfg.out} holds a pipeline that "
                  f"is not finished, with the options {saved.get('options')}: go on with those, "
                  f"name another folder by --out, or delete {self.path}")
            self.begun, self.seconds = saved["begun"], saved["seconds"]
            print(f"going on with the pipeline in {cfg.out}; finished: "
                  f"{', '.join(self.seconds) or 'no stage'}", flush=True)
        else:
            check_places(cfg)
        self.keep()

    def keep(self) -> None:
        """Write the file."""
        write_json(self.path, {"options": self.options, "begun": self.begun,
                               "seconds": self.seconds})

    def start(self, name: str, text: str) -> bool:
        """Print a stage's heading; whether an earlier start of this pipeline had begun the stage.

        What an earlier pipeline made is made anew.
        """
        self.name, self.started = name, time.perf_counter()
        goes_on = name in self.begun
        self.begun += [] if goes_on else [name]
        self.keep()
        print(f"\n=== {text}", flush=True)
        return goes_on

    def stop(self) -> None:
        """Note the time since `start`; of a stage that was finished before, the earlier time."""
        self.seconds.setdefault(self.name, time.perf_counter() - self.started)
        self.keep()
        print(f"    ({self.seconds[self.name]:.0f} s)", flush=True)


def check_places(cfg: PipelineConfig) -> None:
    """Refuse now, and not at a stage's turn, an --out in which something would be overwritten."""
    for name, stage in STAGES.items():
        folder = os.path.join(cfg.out, name)
        check_output(folder, stage, cfg.base)
        path = os.path.join(folder, STATE_FILE)
        check(not os.path.exists(path), f"{folder} holds a run that is not finished; end it by its "
              f"own command with --resume, name another folder by --out, or delete {path}")
    report = os.path.join(cfg.out, "report.json")
    ours = os.path.isfile(report) and "plan" in read_json(report)
    for name in WRITTEN:
        path = os.path.join(cfg.out, name)
        check(ours or not os.path.lexists(path), f"{path} is there and no pipeline's; name another "
              "folder by --out")


def train(cfg: PipelineConfig, plan: Plan, progress: Progress) -> tuple[list[str], list[dict]]:
    """Run the three stages; returns the reward models' folders and their last metrics."""
    sft_cfg = sft.SFTConfig(model=cfg.base, examples=plan.demonstrations, seed=cfg.seed,
                            out=os.path.join(cfg.out, "sft"))
    goes_on = progress.start("sft", f"1. SFT: {command('sft', sft_cfg)}")
    sft.main(replace(sft_cfg, resume=goes_on))
    progress.stop()

    path = os.path.join(cfg.out, "comparisons.jsonl")
    progress.start("comparisons", "2a. comparisons: the SFT model answers, the gold judge chooses")
    if "comparisons" not in progress.seconds:
        records = comparisons(plan.comparisons, cfg.seed, sft_cfg.out)
        lines = [json.dumps({name: record[name] for name in FIELDS["comparisons"]},
                            ensure_ascii=False) for record in records]
        write_atomically(path, ("\n".join(lines) + "\n").encode("utf-8"))
        first = records[0]
        print(f"{len(records)} comparisons, in {path}; the first: {first['prompt']!r}\n"
              f"  chosen   {first['chosen']!r}\n  rejected {first['rejected']!r}")
    progress.stop()

    jobs = {}
    for number in range(1, plan.reward_models + 1):
        name = "reward_model" if number == 1 else f"reward_model_{number}"
        jobs[name] = reward_model.RewardModelConfig(
            model=sft_cfg.out, data=path, comparisons=plan.comparisons,
            held_out=plan.comparisons // 10, in_order=True, seed=100 * cfg.seed + number,
            out=os.path.join(cfg.out, name))
    commands = "\n    ".join(command("reward_model", rm_cfg) for rm_cfg in jobs.values())
    goes_on = progress.start("reward_models", f"2b. reward models:\n    {commands}")
    figures = run_jobs(reward_model.main, {name: (replace(rm_cfg, resume=goes_on),)
                                           for name, rm_cfg in jobs.items()})
    folders = [rm_cfg.out for rm_cfg in jobs.values()]
    progress.stop()

    ppo_cfg = ppo.PPOConfig(model=sft_cfg.out, reward=",".join(folders), ensemble="min",
                            iterations=plan.iterations, seed=cfg.seed,
                            out=os.path.join(cfg.out, "ppo"))
    goes_on = progress.start("ppo", f"3. PPO: {command('ppo', ppo_cfg)}")
    ppo.main(replace(ppo_cfg, resume=goes_on))
    progress.stop()
    return folders, figures


def answer(cfg: PipelineConfig, plan: Plan, rm_folders: list[str], *names: str) -> dict:
    """Answers and figures of the policies of these names: {name: (Answers, figures)}."""
    folders = {"base": cfg.base, "SFT": os.path.join(cfg.out, "sft"),
               "SFT again": os.path.join(cfg.out, "sft"), "RLHF": os.path.join(cfg.out, "ppo")}
    ref_policy, tokenizer = load_policy(folders["SFT"])
    reward_function = load_reward(",".join(rm_folders), "min", tokenizer)
    prompts, _ = read_prompts("minirlhf.world:held_out_prompts", tokenizer,
                              ref_policy.config.n_positions, 32, count=plan.prompts, seed=cfg.seed)
    made = {}
    for name in names:
        policy, _ = load_policy(folders[name], tokenizer)
        answers = sample_answers(policy, tokenizer, prompts, plan.answers, seed=cfg.seed,
                                 stream=list(folders).index(name))
        figures = gold_figures(answers)
        if name != "SFT again":                          # the control is of the gold judge alone
            figures["score"] = judge_answers(answers, reward_function, tokenizer)
            figures["kl_ref"] = kl_to_reference(policy, ref_policy, answers)
        made[name] = answers, figures
        print(f"{answers.lengths.size} answers by {name}", flush=True)
    return made


def evaluate(cfg: PipelineConfig, plan: Plan, rm_folders: list[str]) -> dict:
    """Compare base, SFT, SFT again (the control) and RLHF on the same held-out prompts."""
    order = ("base", "SFT", "SFT again", "RLHF")
    halves = [("base", "SFT again"), ("SFT", "RLHF")]
    made = {}
    for half in run_jobs(answer, {f"  {' and '.join(names)}": (cfg, plan, rm_folders, *names)
                                  for names in halves}):
        made.update(half)
    answers, figures = [{name: made[name][part] for name in order} for part in (0, 1)]
    policies = {name: describe(answers[name], figures[name], seed=cfg.seed, against=figures["SFT"])
                for name in order}
    for part in (policies["SFT"], *policies["SFT"]["by_kind"].values()):
        del part["win_rate"]                             # 0.5: these answers against themselves
    samples = side_by_side(answers["SFT"], answers["RLHF"], figures["SFT"]["gold"],
                           figures["RLHF"]["gold"], 8, cfg.seed)
    return {"policies": policies, "samples": samples}


def make_report(cfg: PipelineConfig, plan: Plan, compared: dict, rm_figures: list[dict],
                seconds: dict[str, float]) -> dict:
    """What checkpoints/report.json holds."""
    policies = compared["policies"]
    short = {"base": "base", "SFT": "sft", "RLHF": "rlhf"}
    report = {"win_rate": policies["RLHF"]["win_rate"],
              "control": policies["SFT again"]["win_rate"]}
    for name in ("gold", "score", "fully_right", "answered", "kl_ref", "length", "distinct",
                 "end_rate"):
        report[name] = {short[policy]: policies[policy][name] for policy in short}
    report["fully_right_by_kind"] = {}
    for policy in short:
        kinds = policies[policy]["by_kind"].items()
        report["fully_right_by_kind"][short[policy]] = {kind: part["fully_right"]
                                                        for kind, part in kinds}
    report["reward_model_accuracy"] = [row["held_out_accuracy"] for row in rm_figures]
    report["reward_model_calibration_error"] = [row["calibration_error"] for row in rm_figures]
    report.update(seconds={**seconds, "total": sum(seconds.values())}, seed=cfg.seed,
                  quick=cfg.quick, plan=asdict(plan), samples=compared["samples"])
    return report


def main(cfg: PipelineConfig) -> dict:
    """Run everything; returns what report.json holds."""
    plan = QUICK if cfg.quick else Plan()
    load_policy(cfg.base)                                # fail now, not after the first stage
    progress = Progress(cfg, plan)
    if cfg.quick:
        print("--quick: small data and few steps. Everything runs, but the results are clearly "
              "worse than those of python -m minirlhf")
    try:
        rm_folders, rm_figures = train(cfg, plan, progress)
    except Stopped as stop:
        raise Stopped("stopped, with a checkpoint; the same command goes on", stop.signal) from None
    except bdb.BdbQuit:
        if not progress.resume:
            os.unlink(progress.path)                     # a tour in the debugger leaves nothing
        raise

    progress.start("evaluation", f"4. evaluation: {plan.prompts} held-out prompts, {plan.answers} "
                "answers to each from each policy")
    compared = evaluate(cfg, plan, rm_folders)
    picture = os.path.join(cfg.out, "curves.png")
    pipeline_picture(os.path.join(cfg.out, "sft"), rm_folders, os.path.join(cfg.out, "ppo"),
                     picture)
    progress.stop()

    report = make_report(cfg, plan, compared, rm_figures, progress.seconds)
    path = os.path.join(cfg.out, "report.json")
    write_json(path, report)
    page = os.path.join(cfg.out, "report.html")
    write_page([cfg.out], page, seed=cfg.seed)
    os.unlink(progress.path)
    print("\n=== samples: held-out prompts, gold score in brackets")
    for sample in compared["samples"]:
        print(sample["prompt"].replace("\n", " | "))
        print(f"  SFT  [{sample['score_a']:5.2f}] {sample['a']}")
        print(f"  RLHF [{sample['score_b']:5.2f}] {sample['b']}")
    print("\n=== result\n" + table(compared["policies"]))
    accuracies = ", ".join(f"{accuracy:.3f}" for accuracy in report["reward_model_accuracy"])
    print(f"\nRLHF beats SFT in {cell(report['win_rate'])} of comparisons (gold judge, held-out "
          f"prompts, ties half, 95 % interval);\nSFT against itself: {cell(report['control'])}. "
          f"Reward models: held-out accuracy {accuracies}.")
    print(f"{report['seconds']['total']:.0f} s in all. Wrote {path}, {picture} and {page}.\n"
          "Next: open the page in a browser, run  python -m minirlhf.evaluate , read "
          "lectures/00-map.md")
    return report


if __name__ == "__main__":
    with one_sentence():
        # careful: a job's process finds `answer` and the configs under this name, not as __main__
        pipeline = importlib.import_module("minirlhf.__main__")
        pipeline.main(parse_config(pipeline.PipelineConfig))
