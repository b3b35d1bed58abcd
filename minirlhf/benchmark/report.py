"""The benchmark's result as Markdown tables, ready for a page."""

from minirlhf.benchmark.machine import ratio

ROWS = {"sample": "sampling (in the baseline's loop the reference model runs for every token)",
        "sample alone": "sampling, without the reference model's passes",
        "rollout": "sampling and scoring", "update": "update", "iteration": "whole iteration"}
PHASES = ("sample", "score", "update", "iteration")


def show(figure: dict, unit: str, factor: float = 1.0, digits: int = 1) -> str:
    """A figure as text: median (lowest..highest), as in "2.0 s (1.0..3.0)"; small times in ms."""
    if unit == "s" and figure["median"] < 0.1:
        unit, factor, digits = "ms", 1000 * factor, 1
    middle, low, high = [f"{factor * figure[key]:,.{digits}f}" for key in ("median", "low", "high")]
    text = f"{middle} {unit}".strip()
    return f"{text} ({low}..{high})" if figure["runs"] > 1 else text


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    ruler = ["---"] + ["---:"] * (len(titles) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [titles, ruler, *rows])


def limits_table(result: dict) -> str:
    """Matrix products and memory."""
    limits = result["limits"]
    rows = [[f"torch.mm, {shape}", show(speed, "GFLOP/s", 1e-9, 0)]
            for shape, speed in limits["products"].items()]
    rows += [[f"memory, {loop}", show(speed, "GB/s", 1e-9)]
             for loop, speed in limits["memory"].items()]
    machine = result["machine"]
    where = "{cpu}, {cores} cores, {threads} threads, {system}, PyTorch {torch}".format(**machine)
    where = f"{machine['gpu']}; {where}" if "gpu" in machine else where
    float32, bfloat16 = [limits["gemm"][dtype] / 1e9 for dtype in ("float32", "bfloat16")]
    return (f"{where}. Figures are medians (lowest..highest). Limits: the fastest product, "
            f"{float32:,.0f} GFLOP/s in float32 and {bfloat16:,.0f} in bfloat16, and the faster of "
            f"the memory loops, {limits['bandwidth'] / 1e9:,.1f} GB/s.\n\n"
            + table(["limit", "measured"], rows))


def comparison_table(result: dict) -> str:
    """The baseline beside ours, which is the first of the variants."""
    first, rows = next(iter(result["variants"].values())), []
    for name, text in ROWS.items():
        naive, ours = first["naive"][name], first["seconds"][name.removesuffix(" alone")]
        cells = [show(naive, "s"), show(ours, "s", digits=2), show(ratio(naive, ours), "x")]
        rows.append([text, *cells])
    titles = ["phase", "baseline", "ours", "baseline / ours"]
    return (f"{result['iteration']}, a reward that costs nothing. Ours takes one step per epoch, "
            f"the baseline one per response.\n\n{table(titles, rows)}")


def variants_table(result: dict) -> str:
    """Seconds, share of the limits and memory of iterations that differ in one thing."""
    rows = []
    for name, variant in result["variants"].items():
        cells, memory, seconds = ["not measured"] * 5, variant["memory"], variant["seconds"]
        if seconds:
            shares = [100 * variant["limits"][phase] / seconds[phase]["median"] for phase in PHASES]
            cells = [show(seconds[phase], "s", digits=2) for phase in PHASES]
            cells.append(" / ".join(f"{share:.0f}" for share in shares) + " %")
        rows.append([name, *cells, f"{memory / 1e9:.2f} GB" if memory else "not measured"])
    titles = ["iteration", "sampling", "scoring", "update", "whole", "share", "peak memory"]
    return ("Each differs from the first in one thing. The share is the time at the machine's "
            "limits, divided by the time measured: of sampling, scoring, update and whole.\n\n"
            + table(titles, rows))


def decoding_table(result: dict) -> str:
    """One step of sampling by stock products and by ours."""
    rows = []
    for name, steps in result["decoding"].items():
        stock, ours = steps["stock"], steps["ours"]
        rows.append([name, show(stock["step"], "ms", 1000), show(ours["step"], "ms", 1000),
                     show(ratio(ours["step"], stock["step"]), "", digits=2).strip(),
                     show(stock["first"], "s", digits=2), show(ours["first"], "s", digits=2)])
    titles = ["batch", "step, stock", "step, ours", "ours / stock", "first token, stock",
              "first token, ours"]
    return ("A decoding step of the first network. The first token's time is that of the prompts' "
            "pass and, in ours, of laying the weights out.\n\n" + table(titles, rows))


def trl_table(result: dict) -> str:
    """TRL's trainer, and ours with its networks and with a shared critic."""
    trl, variants = result["trl"], result["variants"]
    ours = {name: variants[name] for name in (trl["beside"], next(iter(variants)))}
    versions = "TRL {trl}, transformers {transformers}, PyTorch {torch}".format(**trl)
    rows = [[f"{versions}, separate critic", show(trl["sample"], "s", digits=2),
             show(trl["iteration"], "s", digits=2), "", f"{trl['memory'] / 1e9:.2f} GB"]]
    for name, variant in ours.items():
        seconds, memory = variant["seconds"], variant["memory"]
        rows.append([f"ours, {name}", show(seconds["sample"], "s", digits=2),
                     show(seconds["iteration"], "s", digits=2),
                     show(ratio(trl["iteration"], seconds["iteration"]), "x", digits=2),
                     f"{memory / 1e9:.2f} GB" if memory else "not measured"])
    return ("The same sizes, in the same run. TRL's reward model is a network of one narrow "
            "layer.\n\n" + table(["trainer", "sampling", "whole iteration", "TRL / ours",
                                   "peak memory"], rows))


def markdown(result: dict) -> str:
    """All that was measured."""
    parts = ["## The machine's limits", limits_table(result), "## Beside a naive baseline",
             comparison_table(result), "## Critics, precision, sizes", variants_table(result)]
    if "decoding" in result:
        parts += ["## A decoding step", decoding_table(result)]
    if "trl" in result:
        parts += ["## Beside TRL", trl_table(result)]
    return "\n\n".join(parts) + "\n"
