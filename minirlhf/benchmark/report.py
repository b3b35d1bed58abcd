"""The benchmark's result as Markdown tables, ready for a page."""

from minirlhf.benchmark.machine import ratio

ROWS = {"sample": "sampling (in the baseline's loop the reference model runs for every token)",
        "sample alone": "sampling, without the reference model's passes",
        "rollout": "sampling and scoring", "update": "update", "iteration": "whole iteration"}
PHASES = ("sample", "score", "update", "iteration")


def show(figure: dict, unit: str, factor: float = 1.0, digits: int = 1) -> str:
    """A figure as text: median (lowest..highest), as in "2.0 (1.0..3.0) s"."""
    middle, low, high = [f"{factor * figure[key]:,.{digits}f}" for key in ("median", "low", "high")]
    return f"{middle} ({low}..{high}) {unit}" if figure["runs"] > 1 else f"{middle} {unit}"


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
    return ("{cpu}, {cores} cores, {threads} threads, {system}, PyTorch {torch}. ".format(
        **result["machine"]) + "Figures are medians (lowest..highest). Limits: the fastest float32 "
        f"product, {limits['gemm'] / 1e9:.0f} GFLOP/s, and the faster of the memory loops, "
        f"{limits['bandwidth'] / 1e9:.1f} GB/s.\n\n" + table(["limit", "measured"], rows))


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
    return ("Each differs from the first in one thing. The share is that of the time at the "
            "machine's limits in the time measured, in the same order.\n\n" + table(titles, rows))


def markdown(result: dict) -> str:
    """All that was measured."""
    parts = ["## The machine's limits", limits_table(result), "## Beside a naive baseline",
             comparison_table(result), "## Critics, precision, sizes", variants_table(result)]
    return "\n\n".join(parts) + "\n"
