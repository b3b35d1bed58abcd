"""How far a person's verdicts agree: with one another, with the order of showing, with a judge."""

import math

from minirlhf.people.verdicts import identity
from minirlhf.world import judge

Z = 1.959964                            # the normal distribution's middle 95 % is within +-Z


def wilson_interval(count: int, total: int) -> dict[str, float]:
    """The share count / total with its 95 % interval: {"count", "of", "mean", "low", "high"}.

    The interval holds the shares p for which `count` lies within 1.96 standard deviations of
    p * total. Unlike the bootstrap it is not empty when all agree. Example: 9 of 10 give 0.9 with
    0.596 and 0.982; 5 of 5 give 1.0 with 0.566 and 1.0.
    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference,
    Journal of the American Statistical Association 22, pages 209 to 212.
    """
    share, square = count / total, Z * Z / total
    middle = (share + square / 2) / (1 + square)
    reach = Z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return {"count": count, "of": total, "mean": share, "low": max(0.0, middle - reach),
            "high": min(1.0, middle + reach)}


def gold_choice(row: dict) -> str:
    """The answer that the gold judge prefers, "" for none or a prompt outside the text world."""
    try:
        scores = {name: judge(row["prompt"], row[f"answer_{name}"], row.get(f"ended_{name}", True)
                              ).score for name in "ab"}
    except ValueError:
        return ""
    return "" if scores["a"] == scores["b"] else max(scores, key=scores.__getitem__)


def agreement(rows: list[dict]) -> dict:
    """What one person's verdicts (`VerdictFile.rows`) say about the person.

    self: of the pairs that came again, with the order swapped, how many got the same verdict;
    first: of all choices, how many were the answer that stood first: near 0.5 without a habit;
    gold, file: of the choices on which the gold judge (the file that the pairs are from) has one,
    too, how many are the same. Ties and skips are counted and are no choices.
    """
    once = {identity(row): row["verdict"] for row in rows if not row.get("again")}
    verdicts = list(once.values())
    result: dict = {"choices": sum(verdict in ("a", "b") for verdict in verdicts),
                    "ties": verdicts.count("tie"), "skips": verdicts.count("skip")}
    pairs: dict[str, list[tuple[str, str]]] = {"self": [], "first": [], "gold": [], "file": []}
    for row in rows:
        if row.get("again"):
            before = once.get(identity({**row, "again": False}), "skip")
            if "skip" not in (row["verdict"], before):
                pairs["self"].append((row["verdict"], before))
        elif row["verdict"] in ("a", "b"):
            pairs["gold"].append((row["verdict"], gold_choice(row)))
            if str(row.get("a")).startswith("chosen in "):
                pairs["file"].append((row["verdict"], "a"))
        if row["verdict"] in ("a", "b"):
            pairs["first"].append((row["verdict"], row.get("first", "")))
    for name, both in pairs.items():
        known = [mine == other for mine, other in both if other]
        if known:
            result[name] = wilson_interval(sum(known), len(known))
    return result


SENTENCES = {"self": "pairs that came again got the same verdict",
             "first": "choices were the answer that stood first (half, without a habit)",
             "gold": "choices are those of the gold judge",
             "file": "choices are those of the file"}


def describe(report: dict) -> str:
    """`agreement` as text, one line for each figure."""
    lines = [f"{report['choices']} choices, {report['ties']} ties, {report['skips']} skips; in "
             "brackets 95 % intervals"]
    for name, sentence in SENTENCES.items():
        if name in report:
            share = report[name]
            lines.append(f"{share['count']} of {share['of']} {sentence}: {share['mean']:.2f} "
                         f"[{share['low']:.2f}, {share['high']:.2f}]")
    return "\n".join(lines)
