"""Look at the text world: `python -m minirlhf.world` prints samples of all that is in it.

    python -m minirlhf.world --write FOLDER       # also demonstrations.jsonl, prompts.jsonl, ...

With `--write` the records go into files, in the formats that the trainers read.
"""
import argparse
import json
import os
from collections import Counter
from itertools import islice

from minirlhf.engine.options import check, one_sentence
from minirlhf.files.disk import write_atomically
from minirlhf.world import corpus, demonstrations, held_out_prompts, judge, prompts


def show_documents(seed: int) -> None:
    """Print the first documents of the base corpus."""
    print("The base corpus begins (documents are separated by a line):")
    for document in islice(corpus(100_000, seed), 12):
        print("-" * 40)
        print(document)


def show_demonstrations(records: list[dict]) -> None:
    """Print a few demonstrations with their judgements, and how all of them score."""
    judged = [judge(record["prompt"], record["response"]) for record in records]
    print("\nDemonstrations, and what the gold judge says of them:")
    for record, judgement in list(zip(records, judged))[:12]:
        parts = ", ".join(f"{name} {points:+.2f}"
                          for name, points in judgement.parts.items() if points)
        print(f"{judgement.score:5.2f}  {record['prompt']}  ->  {record['response']}  ({parts})")
    scores = sorted(judgement.score for judgement in judged)
    quantiles = [scores[int(share * (len(scores) - 1))] for share in (0.05, 0.25, 0.5, 0.75, 0.95)]
    right = sum(judgement.right for judgement in judged) / len(judged)
    longest = max(len(record["response"].split()) for record in records)
    print(f"{len(records)} demonstrations: mean gold {sum(scores) / len(scores):.2f}, "
          f"5/25/50/75/95% quantiles {'/'.join(f'{value:.1f}' for value in quantiles)}, "
          f"fully right {right:.1%}, longest {longest} words")


def write_records(folder: str, name: str, records: list[dict]) -> None:
    """Write one JSON object per line."""
    path = os.path.join(folder, name)
    check(not os.path.lexists(path), f"{path} is there already; name another folder")
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_atomically(path, "".join(lines).encode("utf-8"))
    print(f"{len(records)} lines in {path}")


def main() -> None:
    """Parse the options, show the samples, write the files."""
    parser = argparse.ArgumentParser(prog="python -m minirlhf.world",
                                     description="Show samples of the text world.")
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is drawn")
    parser.add_argument("--count", type=int, default=2000, help="records to make")
    parser.add_argument("--write", metavar="FOLDER", help="also write the records into files here")
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"--count must be at least 1, found {args.count}")
    records = demonstrations(args.count, args.seed)
    held_out = held_out_prompts(args.count, args.seed)
    show_documents(args.seed)
    show_demonstrations(records)
    print("\nHeld-out prompts:", *(record["prompt"] for record in held_out[:8]), sep="\n  ")
    print("  of each kind:", dict(Counter(record["kind"] for record in held_out)))
    if args.write:
        write_records(args.write, "demonstrations.jsonl", records)
        write_records(args.write, "prompts.jsonl", prompts(args.count, args.seed))
        write_records(args.write, "held_out_prompts.jsonl", held_out)


if __name__ == "__main__":
    with one_sentence():
        main()
