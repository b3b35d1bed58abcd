"""The benchmark's result as Markdown tables, ready for the README."""

GIGA = 1e9


def show(found: dict | None, factor: float = 1.0, digits: int = 1, unit: str = "") -> str:
    """A figure as text: the median, and the spread of several runs behind it.

    Example: {"median": 2, "low": 1, "high": 3, "runs": 3} becomes "2.0 (1.0..3.0)".
    """
    if found is None:
        return "not measured"
    numbers = [f"{factor * found[name]:,.{digits}f}{unit}" for name in ("median", "low", "high")]
    return f"{numbers[0]} ({numbers[1]}..{numbers[2]})" if found["runs"] > 1 else numbers[0]


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    ruler = ["---"] + ["---:"] * (len(titles) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [titles, ruler, *rows])


def limits_table(result: dict) -> str:
    """Matrix products and memory."""
    machine, limits = result["machine"], result["limits"]
    rows = [[f"torch.mm, {shape}", show(found, 1 / GIGA, 0) + " GFLOP/s"]
            for shape, found in limits["products"].items()]
    rows += [[f"gpt2.product, {shape}", show(found, 1 / GIGA, 0) + " GFLOP/s"]
             for shape, found in limits["product"].items()]
    rows += [[f"memory, {name}", show(found, 1 / GIGA, 1) + " GB/s"]
             for name, found in limits["memory"].items()]
    text = (f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
            f"{machine['system']}, PyTorch {machine['torch']}, float32. Figures are medians "
            f"(lowest..highest). Limits: the fastest torch.mm, {limits['gemm'] / GIGA:.0f} "
            "GFLOP/s, and the faster of the memory loops, "
            f"{limits['bandwidth'] / GIGA:.1f} GB/s.\n\n")
    return text + table(["limit", "measured"], rows)


ROWS = [("sample", "sampling (in the baseline's loop the reference model runs for every token)"),
        ("sample alone", "sampling, without the reference model's passes"),
        ("rollout", "sampling and scoring"),
        ("update", "update"), ("optimizer", "of it, the optimiser's steps"),
        ("iteration", "whole iteration")]


def comparison_table(result: dict) -> str:
    """The baseline beside ours."""
    found, setting = result["comparison"], result["setting"]
    rows = []
    for name, text in ROWS:
        naive = found["naive"][name] if found["naive"] else None
        ours = found["ours"]["sample" if name == "sample alone" else name]
        times = show(found["ratios"][name]) + " x" if naive else ""
        if naive or name in found["ours"]:
            rows.append([text, show(naive) + " s" if naive else "", show(ours, digits=2) + " s",
                         times])
    if found["transformers"]:
        rows.append(["sampling by transformers' generate, same weights",
                     show(found["transformers"], digits=2) + " s",
                     show(found["ours"]["sample"], digits=2) + " s",
                     show(found["transformers_ratio"], digits=2) + " x"])
    absent = "" if found["transformers"] else ("\n\ntransformers is not installed: its `generate` "
                                               "was not measured.")
    return (f"{setting['parameters'] / 1e6:.1f}M parameters, {setting['prompts']} prompts of "
            f"{setting['prompt_tokens']} tokens, {setting['new_tokens']} new tokens, "
            f"{setting['epochs']} PPO epochs, shared critic, a reward that costs nothing. Ours "
            "takes one optimiser step an epoch, the baseline one a response.\n\n"
            + table(["phase", "other", "ours", "other / ours"], rows) + absent)


def shares_table(result: dict) -> str:
    """Each phase against its limit."""
    rows = []
    for name, found in result["shares"].items():
        seconds, flops, speed = result["comparison"]["ours"][name], "", ""
        if found["flops"]:
            flops = f"{found['flops'] / 1e12:.3f}"
            speed = f"{found['flops'] / seconds['median'] / GIGA:.0f} GFLOP/s"
        rows.append([name, flops, f"{found['limit']:.2f} s", show(seconds, digits=2) + " s", speed,
                     show(found["share"], 100, 0, " %")])
    note = ("The limit of scoring and update is their arithmetic at the rate of torch.mm "
            "(gpt2.product may be faster), the optimiser's steps included in the time; that of a "
            "decoding step is reading all weights once, or its arithmetic if that takes longer."
            "\n\n")
    return note + table(["phase", "TFLOP", "at its limit", "measured", "reached",
                         "share of the limit"], rows)


def speed_table(result: dict) -> str:
    """Tokens a second."""
    rows = [[batch, show(found["prefill"], digits=0), show(found["decode"], digits=1),
             show(found["step"], 1000, 0) + " ms", show(found["read"], 1 / GIGA, 1) + " GB/s",
             show(found["share"], 100, 0, " %")] for batch, found in result["speed"].items()]
    return table(["batch", "prefill, tokens/s", "decode, tokens/s", "decoding step", "weights read",
                  "of the bandwidth"], rows)


def memory_table(result: dict) -> str:
    """Peak memory of an iteration."""
    rows = [[f"{critic} critic", f"{peak / GIGA:.2f} GB" if peak else "not measured here"]
            for critic, peak in result["memory"].items()]
    return table(["PPO iteration, process of its own", "peak resident memory"], rows)


AXES = {"prompts": "batch", "new_tokens": "response, tokens", "config": "model"}
PHASES = ["sample", "score", "update", "iteration"]


def growth_table(result: dict, axis: str) -> str:
    """Seconds of the phases along one size."""
    rows = [[name] + [show(found[phase], digits=2) + " s" for phase in PHASES]
            for name, found in result["growth"][axis].items()]
    return table([AXES[axis]] + PHASES, rows)


def overhead_table(result: dict) -> str:
    """Time outside tensor operations."""
    rows = []
    for name, found in result["overhead"].items():
        rows.append([name, show(found["seconds"], 1000, 0) + " ms",
                     f"{100 * found['outside_from']:.0f} to {100 * found['outside_to']:.0f} %"])
    return table(["phase of the embedded pipeline (tiny network)", "time",
                  "outside tensor operations"], rows)


def markdown(result: dict) -> str:
    """Everything that was measured."""
    parts = ["## The machine's limits", limits_table(result),
             "## A PPO iteration beside a naive baseline", comparison_table(result),
             "## Our phases and their limits", shares_table(result),
             "## Generation", speed_table(result), "## Memory", memory_table(result)]
    if result["growth"]:
        parts += ["## How time grows", "Seconds of an iteration's phases. One size changes, the "
                  "others are those of the comparison above."]
        parts += [growth_table(result, axis) for axis in result["growth"]]
    parts += ["## The embedded pipeline", overhead_table(result)]
    return "\n\n".join(parts) + "\n"
