"""Rows of data files in the shapes that people have: our own, and published ones.

The first line decides the shape:
    ours                {"prompt"}, {"prompt", "response"} or {"prompt", "chosen", "rejected"}
    Alpaca              {"instruction", "input", "output"}, or chosen and rejected beside them
    messages            {"messages": [{"role", "content"}, ...]} with one answer, at the end; or
                        lists of that kind as prompt, chosen, rejected (OpenAI, TRL)
    HH-RLHF             {"chosen", "rejected"}: dialogues that share all but the last answer
    HH-RLHF, cut        {"prompt"} that ends in a turn "Assistant:", answers beside it
    TL;DR posts         {"subreddit", "title", "post", "summary"}
    TL;DR comparisons   {"info": a post, "summaries": two texts, "choice": 0 or 1}
    verdicts            {"prompt", "answer_a", "answer_b", "verdict"}, as people/ writes them
Prompts of the first three are plain and get our template. Each shape is read by one function of a
row; a new one is a function and a line in `SHAPES`. A bad line is an error that names file and
line. In the published shapes alone, rows that are well-formed but unusable are dropped, with the
reason: null in place of a text, an empty or repeated answer, a news article in place of a post.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from minirlhf.files.disk import short
from minirlhf.files.notes import ANSWERS
from minirlhf.files.refusals import is_table, suggest

TLDR_TEMPLATE = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"       # HH-RLHF's turns
MAX_SPACE = 100_000                 # characters of white space running; tiktoken fails at a million


# ---- texts ---------------------------------------------------------------------------------------

def longest_space(text: str) -> int:
    """Length of the longest run of white space; 0 for texts too short to matter.

    careful: at a million, the pattern that cuts the text overflows tiktoken's stack, and the panic
    of its Rust code is no `Exception`.
    """
    if len(text) <= MAX_SPACE:
        return 0
    return max((len(run) for run in re.findall(r"\s+", text)), default=0)


def trim(text: str) -> str:
    """A text without white space around it, but with the indentation of its first line.

    One space is no indentation: published answers begin with it. Two or a tab are.
    Example: trim(" Yes. \\n") == "Yes.", trim("\\n    return x\\n") == "    return x".
    """
    if not text[:1].isspace():
        return text.rstrip()
    bare = text.strip()
    before = text[:len(text) - len(text.lstrip())].split("\n")[-1]
    return before + bare if re.fullmatch(r" [ \t]+|\t[ \t]*", before) and bare else bare


def text_of(row: dict, key: str, place: str) -> str:
    """The text under `key` of a row, or an error that names the place."""
    if key not in row:
        raise ValueError(f"{place}: expected {key!r}, found only {short(sorted(row))}")
    text = row[key]
    if not isinstance(text, str):
        raise ValueError(f"{place}: expected text as {key!r}, found {short(text)}")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{place}: expected Unicode text as {key!r}, found half of a surrogate "
                         "pair")
    if longest_space(text) > MAX_SPACE:
        raise ValueError(f"{place}: expected at most {MAX_SPACE} characters of white space in a "
                         f"row in {key!r}, found {longest_space(text)}")
    return text


def find_null(row: dict, *keys: str) -> str:
    """Why a published row is dropped if one of these keys holds null (or pandas' NaN); else ""."""
    for key in keys:
        if key in row and (row[key] is None or row[key] != row[key]):
            return f"null as {key!r}"
    return ""


# ---- one shape after another ---------------------------------------------------------------------

def read_ours(row: dict, place: str) -> dict:
    """Our own format, prompts still plain; an empty text, an equal pair or a key that we do not
    know is an error."""
    keys = ["prompt"] + ["response"] * ("response" in row)
    keys += ["chosen", "rejected"] * ("chosen" in row or "rejected" in row)
    extra = set(row) - {*keys, "kind", "margin"}
    if extra:
        raise ValueError(f"{place}: expected {', '.join(keys)}; found also {short(sorted(extra))}")
    for key in keys:
        if not text_of(row, key, place).strip():
            raise ValueError(f"{place}: expected text as {key!r}, found an empty one")
    kind, margin = row.get("kind", ""), row.get("margin", 0.0)
    if not isinstance(kind, str) or not isinstance(margin, (int, float)):
        raise ValueError(f"{place}: expected text as 'kind' and a number as 'margin', found "
                         f"{short(kind)}, {short(margin)}")
    if "chosen" in row and trim(row["chosen"]) == trim(row["rejected"]):
        raise ValueError(f"{place}: expected two different responses, found "
                         f"{short(row['chosen'])} twice")
    return dict(row)


def read_alpaca(row: dict, place: str) -> dict | str:
    """Stanford Alpaca: the prompt is the instruction, then a blank line and the input, if any.

    Source: tatsu-lab/stanford_alpaca at 7f08532, README.md, "Data Release".
    """
    answers = {"output": "response", "chosen": "chosen", "rejected": "rejected"}
    reason = find_null(row, "instruction", *answers)
    for key in ("history", "system"):                    # of other programs that use these names
        reason = reason or (f"a text under {key!r}" if row.get(key) else "")
    if reason:
        return reason
    prompt = text_of(row, "instruction", place)
    if not find_null(row, "input") and text_of({"input": "", **row}, "input", place).strip():
        prompt = f"{prompt.rstrip()}\n\n{row['input']}"
    texts = {name: text_of(row, key, place) for key, name in answers.items() if key in row}
    return {"prompt": prompt, **texts}


def read_messages(row: dict, place: str) -> dict | str:
    """Lists of {"role", "content"}: a dialogue of one answer, or two that differ in the answer.

    The dialogue is what stands under `prompt`, if anything, and then what stands under `chosen` and
    `rejected`, `response` or `messages`, unless that begins with the question itself.
    """
    keys = [key for key in ("chosen", "rejected") if key in row]
    keys = keys or [key for key in ("messages", "response", "completion") if key in row][:1]
    reason = find_null(row, "prompt", *keys)
    if row.get("label") is False:                        # TRL's unpaired preferences
        reason = reason or "a label that calls the answer bad"
    if reason:
        return reason
    start = read_turns(row["prompt"], "user", place) if "prompt" in row else []
    parts = {key: read_turns(row[key], "assistant", place) for key in keys}
    dialogues = {key: turns if turns and turns[0][0] != "assistant" else start + turns
                 for key, turns in parts.items()} or {"": [*start, ("assistant", "")]}
    record: dict = {}
    for key, turns in dialogues.items():
        found = cut_dialogue(turns)
        if isinstance(found, str):
            return found
        if record.setdefault("prompt", found[0]) != found[0]:
            return "dialogues that part before the last answer"
        if key:
            record[key if key in ANSWERS else "response"] = found[1]
    return record


def read_turns(value, role: str, place: str) -> list[tuple[str, str | None]]:
    """(role, text) of each message of a list; a plain text is one message of `role`."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    ok = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
    if not ok or not all(isinstance(turn.get("role"), str) for turn in value):
        raise ValueError(f"{place}: expected messages, each with a role and a content, found "
                         f"{short(value)}")
    return [(turn["role"], None if find_null(turn, "content") else
             text_of(turn, "content", place)) for turn in value]


def cut_dialogue(turns: list[tuple[str, str | None]]) -> tuple[str, str] | str:
    """Plain prompt and answer of a dialogue, or why there are none."""
    roles = ["system" if role == "developer" else role for role, _ in turns]
    if roles[-1:] != ["assistant"]:
        return "no assistant's answer at the end"
    if roles.count("assistant") > 1:
        return "several assistant's answers"
    if roles[:-1] not in (["user"], ["system", "user"]):
        return "turns that are not those of one user and one assistant"
    if any(text is None for _, text in turns):
        return "null as 'content'"
    return "\n\n".join(text for _, text in turns[:-1] if text.strip()), turns[-1][1]


def read_hh(row: dict, place: str) -> dict | str:
    """Anthropic HH-RLHF: a comparison, or the reason to drop the row.

    The prompt ends with the last "\n\nAssistant:", so that only the last answer is a response.
    """
    reason = find_null(row, "chosen", "rejected")
    if reason:
        return reason
    prompt, turn, chosen = text_of(row, "chosen", place).rpartition(ASSISTANT)
    other_prompt, _, rejected = text_of(row, "rejected", place).rpartition(ASSISTANT)
    if not turn or not prompt.startswith(HUMAN):
        return "no Human and Assistant turns"
    if prompt != other_prompt:
        return "dialogues that part before the last answer"
    if HUMAN in chosen or HUMAN in rejected:
        return "a Human turn after the last answer"
    return {"prompt": prompt + ASSISTANT, "chosen": chosen, "rejected": rejected}


def has_turns(prompt) -> bool:
    """Whether a prompt begins with HH-RLHF's turn of the human and ends in the assistant's."""
    return isinstance(prompt, str) and prompt.lstrip().startswith("Human:") \
        and prompt.rstrip().endswith(ASSISTANT)


def read_cut_hh(row: dict, place: str) -> dict | str:
    """HH-RLHF cut into `prompt` and answers, as Dahoas/full-hh-rlhf has it.

    Where the answers are whole dialogues after all, the prompt at their beginning is cut off.
    """
    keys = [key for key in ANSWERS if key in row]
    reason = find_null(row, "prompt", *keys)
    if reason or not has_turns(row["prompt"]):
        return reason or "no Human and Assistant turns"
    record = {"prompt": "\n\n" + text_of(row, "prompt", place).strip()}
    for key in keys:
        text = text_of(row, key, place)
        whole = text.lstrip().startswith(record["prompt"].lstrip())
        record[key] = text.lstrip().removeprefix(record["prompt"].lstrip()) if whole else text
        if HUMAN in record[key]:
            return "a Human turn after the last answer"
    return record


def repeats_dialogue(row: dict) -> bool:
    """Whether an answer of such a row is the whole dialogue."""
    start = row["prompt"].strip()
    return any(row[key].lstrip().startswith(start) for key in ANSWERS if key in row)


def format_post(post: dict, place: str) -> str:
    """A Reddit post as the prompt of Stiennon et al. 2020.

    Source: openai/summarize-from-feedback at 065ea4e, `query.format_str` of its experiments.
    """
    fields = {key: text_of(post, key, place).strip() for key in ("subreddit", "title", "post")}
    return TLDR_TEMPLATE.format(**fields)


def read_tldr_post(row: dict, place: str) -> dict | str:
    """OpenAI TL;DR, `tldr_3_filtered`: the author's own summary is the demonstration."""
    return find_null(row, "subreddit", "title", "post", "summary") or \
        {"prompt": format_post(row, place), "response": text_of(row, "summary", place)}


def read_tldr_comparison(row: dict, place: str) -> dict | str:
    """OpenAI TL;DR, `comparisons`: two summaries of a post; `choice` is the index of the better.

    Some of its files, as cnndm0, are about news articles instead: those have no post.
    Source: openai/summarize-from-feedback at 065ea4e, README.md, "Comparisons".
    """
    info, summaries, choice = row.get("info"), row.get("summaries"), row.get("choice")
    reason = find_null(row, "info", "summaries", "choice")
    if reason:
        return reason
    ok = (isinstance(info, dict) and type(choice) is int and choice in (0, 1)
          and isinstance(summaries, list) and len(summaries) == 2
          and all(isinstance(summary, dict) for summary in summaries))
    if not ok:
        raise ValueError(f"{place}: expected info (an object), summaries (two objects) and choice "
                         f"(0 or 1), found {short(info)}, {short(summaries)}, {short(choice)}")
    if info.get("post") is None and info.get("article") is not None:
        return "a news article in place of a post"
    reason = find_null(info, "subreddit", "title", "post")
    reason = reason or find_null(summaries[0], "text") or find_null(summaries[1], "text")
    if reason:
        return reason
    texts = [text_of(summary, "text", place) for summary in summaries]
    return {"prompt": format_post(info, place), "chosen": texts[choice],
            "rejected": texts[1 - choice]}


VERDICT = ("a", "b", "tie", "skip")


def read_verdict(row: dict, place: str) -> dict | str:
    """A person's verdict on two answers, from `people/verdicts.py`; its prompt has its template.

    A tie or a skip is no comparison, and a pair that was shown again is one already.
    """
    texts = {key: text_of(row, key, place) for key in ("prompt", "answer_a", "answer_b")}
    verdict = text_of(row, "verdict", place)
    if verdict not in VERDICT:
        raise ValueError(f"{place}: expected {', '.join(VERDICT)} as 'verdict', found "
                         f"{short(verdict)}")
    if row.get("again") is True:
        return "a pair that was shown again"
    if verdict in ("tie", "skip"):
        return f"a {verdict}"
    other = "b" if verdict == "a" else "a"
    return {"prompt": texts["prompt"], "chosen": texts[f"answer_{verdict}"],
            "rejected": texts[f"answer_{other}"]}


# ---- which shape ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class Shape:
    """A shape of rows: its name, the keys by which it is known, those it may have, its reader."""
    name: str
    keys: set[str]
    others: set[str]
    read: Callable[[dict, str], dict | str]
    plain: bool = False                 # its prompts get our template


MESSAGES = Shape("role and content messages (OpenAI, TRL)", {"messages"},
                 {"prompt", "chosen", "rejected", "response", "completion"}, read_messages, True)
CUT_HH = Shape("HH-RLHF's turns as prompt, answers beside it", {"prompt"}, set(ANSWERS),
               read_cut_hh)
OURS = Shape("our own", {"prompt"}, {*ANSWERS, "kind", "margin"}, read_ours, True)
VERDICTS = Shape("verdicts of a person", {"prompt", "answer_a", "answer_b", "verdict"}, {"again"},
                 read_verdict)
HH = Shape("HH-RLHF: two dialogues", {"chosen", "rejected"}, set(), read_hh)
ALPACA = Shape("Alpaca: instruction, input and answers", {"instruction", "output"},
               {"input", "chosen", "rejected"}, read_alpaca, True)
SHAPES = [
    OURS, ALPACA, replace(ALPACA, keys={"instruction", "chosen", "rejected"}), HH,
    Shape("TL;DR posts", {"subreddit", "title", "post", "summary"}, set(), read_tldr_post),
    Shape("TL;DR comparisons", {"info", "summaries", "choice"}, set(), read_tldr_comparison)]


def find_shape(row: dict, place: str) -> Shape:
    """The shape of a file's rows, by the first of them."""
    lists = [key for key in ("prompt", "chosen", "rejected", "completion", "messages")
             if isinstance(row.get(key), list)]
    if is_table(row):
        raise ValueError(f"{place}: expected one row per line, found several{suggest(row)}")
    if lists:
        return MESSAGES
    if VERDICTS.keys <= set(row):
        return VERDICTS
    if has_turns(row.get("prompt")):
        return CUT_HH
    shape = next((shape for shape in SHAPES if shape.keys <= set(row)), None)
    if shape is OURS and set(row) - shape.keys - shape.others:
        try:
            read_ours(row, place)
        except ValueError as error:
            raise ValueError(f"{error}{suggest(row)}") from None
    if shape is HH and ASSISTANT not in str(row["chosen"]) and suggest(row):
        shape = None                                     # the prompt has a name that we do not know
    if shape is None:
        known = [OURS, HH, MESSAGES, *[one for one in SHAPES if one not in (OURS, HH)]]
        expected = "; or ".join(", ".join(sorted(shape.keys)) for shape in known)
        raise ValueError(f"{place}: expected an object with {expected}; found {short(sorted(row))}"
                         f"{suggest(row)}")
    return shape
