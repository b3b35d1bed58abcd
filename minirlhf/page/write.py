"""Puts the data, the style and the scripts into one HTML file."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

from minirlhf.engine.options import check, printable
from minirlhf.files.disk import write_atomically
from minirlhf.page.answers import answer_prompts
from minirlhf.page.collect import collect, make_series

HERE = Path(__file__).parent
MOST_BYTES = 2_000_000              # of a page; beyond it, iterations of the slider are left out
STOPS = (41, 20, 10, 5, 2)          # iterations of the slider, the most that fit


def as_json(values: dict) -> str:
    """JSON that can stand within an HTML element: no character of it means anything to HTML.

    All but plain ASCII is escaped, so that neither a terminal nor a line separator sees it.
    Example: as_json({"a": "</script>"}) == '{"a":"\\u003c/script\\u003e"}'.
    """
    text = json.dumps(values, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def fill_template(title: str, values: dict) -> str:
    """The whole page. Its script runs because its hash is in the page, and no other script does."""
    template, style, *scripts = [
        (HERE / name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "curves.js", "page.js")]
    script = "\n" + "\n".join(scripts)                   # as it stands between its tags
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    parts = {"title": html.escape(printable(title)), "style": style, "script": script,
             "data": as_json(values), "hash": f"sha256-{digest}"}
    # careful: in one pass, so that a response that says {{script}} stays what it is
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def write_page(folders: list[str], path: str, *, prompt: str = "",
               prompts: str = "minirlhf.world:held_out_prompts", count: int = 8,
               max_new_tokens: int = 32, seed: int = 0) -> int:
    """Write the page about `folders` to `path`; returns its size in bytes.

    Raises: FileNotFoundError for a folder that is no run's, ValueError for damaged files.
    """
    values = collect(folders)
    responses, sft, ppo = values.pop("responses"), values.pop("sft"), values.pop("ppo")
    values["answers"], values["notes"] = answer_prompts(
        sft, ppo, prompt=prompt, prompts=prompts, count=count, max_new_tokens=max_new_tokens,
        seed=seed)
    title = "minirlhf: " + ", ".join(folders)
    for stops in STOPS:
        values["series"] = make_series(responses, stops)
        data = fill_template(title[:200], values).encode("utf-8")
        if len(data) <= MOST_BYTES:
            break
    check(len(data) <= MOST_BYTES, f"the page would have {len(data)} bytes, expected at most "
          f"{MOST_BYTES}; give fewer runs, or a lower --prompt_count")
    write_atomically(path, data)
    return len(data)
