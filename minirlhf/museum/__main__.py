"""The museum of classic mistakes: shows them, and what they do to a run.

    python -m minirlhf.museum                      # the exhibits
    python -m minirlhf.museum --show late_score    # the wrong code beside the right one
    python -m minirlhf.museum --run late_score     # a short run with the mistake, and one without

In:  for --run the finished stages of `python -m minirlhf`. Out: text; of --run also
     `museum.json` with the figures, and a picture.

A mistake is switched on by putting a wrong function in the place of the right one, from outside:
the trainers know nothing of it. Each is caught by the test on its label.
Lecture: lectures/06-what-goes-wrong.md, "Bugs that run".
"""

import ast
import inspect
import os
import textwrap
from dataclasses import dataclass

from minirlhf.engine.fields import Count, check_fields
from minirlhf.engine.options import one_sentence, parse_config, printable
from minirlhf.files.disk import write_json
from minirlhf.museum.effect import FIGURES, effect_table, measure, read_effects
from minirlhf.museum.exhibits import EXHIBITS, GUARDED, Exhibit, find
from minirlhf.museum.short_runs import check_stages
from minirlhf.plots import BLUE, ORANGE, Panel, curve, write_picture


@dataclass(frozen=True)
class MuseumConfig:
    """Options of `python -m minirlhf.museum`."""
    show: str = ""                      # exhibit whose code and measured effect are printed
    run: str = ""                       # exhibits to run, with commas, or all
    seeds: Count = 3                    # runs with the mistake, and as many without
    stages: str = "checkpoints"         # folder with tiny, sft and reward_model, for --run
    out: str = "checkpoints/museum"     # folder of museum.json, which grows, and the pictures
    results: str = "lectures/results/museum.json"    # measured effects that --show prints

    def __post_init__(self):
        check_fields(self)
        for names in (self.show, self.run):
            for name in [] if names in ("", "all") else names.split(","):
                find(name)


# ---- text ----------------------------------------------------------------------------------------

def body_of(function) -> list[str]:
    """The lines of a function without its signature and docstring."""
    lines = textwrap.dedent(inspect.getsource(function)).rstrip().split("\n")
    (definition,) = ast.parse("\n".join(lines)).body
    has_text = isinstance(definition.body[0], ast.Expr)      # a docstring
    return lines[definition.body[1 if has_text else 0].lineno - 1:]


def both_codes(exhibit: Exhibit) -> str:
    """The right function and its wrong twin, one below the other."""
    owner, name = exhibit.places[0]
    right, wrong = getattr(owner, name), exhibit.wrong
    return "\n".join([f"right: {right.__module__}.{right.__qualname__}", *body_of(right), "",
                      f"WRONG: {wrong.__module__}.{wrong.__name__}", *body_of(wrong)])


def label(exhibit: Exhibit) -> str:
    """What stands beside an exhibit."""
    caught = f"caught by  tests/{exhibit.test}"
    if exhibit.stops:
        caught += f"\n           and, while the trainer runs, by {exhibit.stops}"
    return f"{exhibit.name}: {exhibit.wrong.__doc__}\nseen in    {exhibit.seen}\n{caught}"


def list_exhibits() -> str:
    """All exhibits, one line each, and what else is guarded."""
    lines = [f"{len(EXHIBITS)} mistakes that can be switched on (--show NAME, --run NAME):", ""]
    lines += [f"  {exhibit.name:18}{exhibit.wrong.__doc__}" for exhibit in EXHIBITS]
    lines += ["", "Mistakes that no wrong function makes, and the test that guards against them:"]
    lines += [f"\n  {mistake}  ({seen})\n      tests/{test}" for mistake, seen, test in GUARDED]
    return "\n".join(lines)


def show(exhibit: Exhibit, results: str) -> str:
    """Label, code, and the measured effect if there is one. Our own results need not be there."""
    parts = [label(exhibit), both_codes(exhibit)]
    ours = results == MuseumConfig.results
    effects = {} if ours and not os.path.lexists(results) else read_effects(results)
    if exhibit.name in effects:
        parts.append(printable(f"Measured ({results}):\n{effect_table(effects[exhibit.name])}"))
    else:
        parts.append(f"Its effect: python -m minirlhf.museum --run {exhibit.name}")
    return "\n\n".join(parts)


# ---- runs ----------------------------------------------------------------------------------------

def draw_runs(exhibit: Exhibit, rows: list[list[dict]], path: str) -> None:
    """Curves of the right and the wrong run, three to a row."""
    x, panels = "step" if "step" in rows[0][0] else "iteration", []
    for name in FIGURES[exhibit.stage]:
        lines = [curve(rows[0], x, name, "right", BLUE), curve(rows[1], x, name, "wrong", ORANGE)]
        panels.append(Panel(name, x, "", lines))
    write_picture([panels[i:i + 3] for i in range(0, len(panels), 3)], path)


def run_exhibits(cfg: MuseumConfig) -> dict:
    """Run some exhibits or all, print what they do, and save it beside what was measured before."""
    check_stages(cfg.stages, "tiny", "sft", "reward_model")
    path = os.path.join(cfg.out, "museum.json")
    os.makedirs(cfg.out, exist_ok=True)
    effects, right_runs = read_effects(path) if os.path.exists(path) else {}, {}
    for exhibit in EXHIBITS if cfg.run == "all" else map(find, cfg.run.split(",")):
        effect, rows = measure(exhibit, cfg.seeds, cfg.stages, right_runs)
        effects[exhibit.name] = effect
        print(f"{label(exhibit)}\n\n{effect_table(effect)}\n", flush=True)
        draw_runs(exhibit, rows, os.path.join(cfg.out, f"{exhibit.name}.png"))
        shown = {other.name: effects[other.name] for other in EXHIBITS if other.name in effects}
        write_json(path, {"seeds": list(range(cfg.seeds)), "effects": shown})
    print(f"wrote {path} and a picture of each")
    return effects


def main(cfg: MuseumConfig) -> dict:
    """List, show or run; returns the effects of what was run."""
    if cfg.run:
        return run_exhibits(cfg)
    if cfg.show == "all":
        print("\n\n\n".join(show(exhibit, cfg.results) for exhibit in EXHIBITS))
    else:
        print(show(find(cfg.show), cfg.results) if cfg.show else list_exhibits())
    return {}


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(MuseumConfig))
