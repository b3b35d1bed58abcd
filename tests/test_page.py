"""page/: what the page of a run holds, and how it behaves in a real browser."""

import base64
import functools
import hashlib
import json
import os
import re
import shutil
from html.parser import HTMLParser
from typing import get_args

import pytest
from browser import Browser, find_browser
from helpers import (
    ppo_config,
    quietly,
    reward_folder,
    scratch_folder,
    sft_folder,
    toy_tokenizer,
)
from test_ppo_tokens import toy_run

from minirlhf import ppo
from minirlhf.engine.metrics import read_kept
from minirlhf.page.__main__ import PageConfig, main
from minirlhf.page.answers import policies_of, reward_of
from minirlhf.page.collect import (
    check_record,
    collect,
    make_series,
    responses_of,
    result_of,
    samples_of,
    stages_of,
    thinned,
)
from minirlhf.page.write import MOST_BYTES, as_json, fill_template, write_page
from minirlhf.rewards import Ensemble

HOSTILE = ["</script><script>document.title='hacked'</script>", "<img src=x onerror=alert(1)>",
           "\x1b[31mred\x1b[0m", "\u202eevil", "\u2028", "<!--", "{{script}}", "\ud800", "\x00\x7f",
           "]]>", "&lt;", "'\"`${1}"]


def write(folders: list[str], path, **options) -> str:
    """The page as text."""
    quietly(functools.partial(write_page, **{"count": 0, "max_new_tokens": 8, **options}),
            folders, str(path))
    return path.read_text(encoding="utf-8")


class Parts(HTMLParser):
    """What a browser would see as tags, attributes and scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.inside, self.text = [], [], "", {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.inside = tag + dict(attributes).get("type", "")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        self.text[self.inside] = self.text.get(self.inside, "") + data


def values_of(page: str) -> dict:
    return json.loads(Parts(page).text["scriptapplication/json"])


def hostile_run(folder) -> str:
    """A run whose kept responses were written by somebody who means harm."""
    shutil.copytree(toy_run(), folder)
    (folder / "samples.txt").write_bytes("".join(HOSTILE).encode("utf-8", "surrogatepass"))
    records = read_kept(str(folder))
    for record in records:
        count = len(record["tokens"])
        record["tokens"] = (HOSTILE * count)[:count]
        record["policy"] = [[[text, 0.1] for text in HOSTILE] for _ in range(count)]
        record["prompt"] = "".join(HOSTILE)
    (folder / "kept.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


# ---- the file ------------------------------------------------------------------------------------

def test_json_in_a_page_hand_example():
    assert as_json({"a": "</script>"}) == '{"a":"\\u003c/script\\u003e"}'
    text = as_json({"a": HOSTILE})
    assert text.isascii() and not re.search(r"[<>&\x00-\x1f\x7f]", text)
    assert json.loads(text) == {"a": HOSTILE}


def test_no_text_of_a_run_becomes_a_tag_a_script_or_a_placeholder(tmp_path):
    page = write([hostile_run(tmp_path / "run{{data}}<b>")], tmp_path / "page.html")
    harmless = write([toy_run()], tmp_path / "other.html")
    assert Parts(page).tags == Parts(harmless).tags
    assert Parts(page).text["script"] == Parts(harmless).text["script"]
    assert "run{{data}}<b>" in Parts(page).text["title"]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)          # for who prints it
    names = [series["name"] for series in values_of(page)["series"]]
    assert "".join(HOSTILE).startswith(names[0]) and len(names) == 2


def test_the_page_needs_nothing_else_and_only_its_own_script_may_run(tmp_path):
    page = write([toy_run()], tmp_path / "page.html")
    parts = Parts(page)
    assert not {"link", "img", "iframe", "object", "base"} & set(parts.tags)
    assert not [value for name, value in parts.attributes if name == "src"
                or name.startswith("on")]
    assert "@import" not in page and "url(" not in parts.text["style"]
    assert not re.search("innerHTML|outerHTML|insertAdjacentHTML|document.write|eval",
                         parts.text["script"])
    digest = hashlib.sha256(parts.text["script"].encode("utf-8")).digest()
    (policy,) = [value for name, value in parts.attributes if "default-src" in str(value)]
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in policy


def test_a_page_is_bounded_however_long_the_run(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(toy_run(), folder)
    (record, *_), lines = [one for one in read_kept(str(folder)) if one["asked_again"]], []
    for name, value in record.items():
        if isinstance(value, list):
            record[name] = (value * 64)[:64]             # the longest that a run keeps
    for iteration in range(41):
        for prompt in "abcd":
            lines.append(json.dumps({**record, "iteration": iteration, "length": 64,
                                     "prompt": prompt}))
    (folder / "kept.jsonl").write_text("\n".join(lines) + "\n")
    page = write([str(folder), toy_run()], tmp_path / "page.html")
    assert len(page) <= MOST_BYTES
    (first, *_), _ = values_of(page)["series"][0]["runs"]
    stops = [one["iteration"] for one in values_of(page)["series"][0]["runs"][0]]
    assert first["iteration"] == stops[0] == 0 and stops[-1] == 40 and len(stops) < 41


def test_thinned_hand_example():
    assert thinned([0, 1, 2, 3, 4], 3) == [0, 2, 4]
    assert thinned([1, 2], 5) == [1, 2] and thinned((), 2) == []


# ---- what is read --------------------------------------------------------------------------------

def test_responses_are_sorted_by_prompt_for_each_run():
    kept = responses_of(toy_run())
    series = make_series([kept, []], 41)
    assert len(series) == 4 and series[-1]["name"].startswith("first response of the rollout")
    for one in series:
        assert [record["iteration"] for record in one["runs"][0]] == [0, 1, 2]
        assert one["runs"][1] == []
    assert [one["iteration"] for one in make_series([kept], 2)[0]["runs"][0]] == [0, 2]


@pytest.mark.parametrize("change", [
    {"tokens": "red"}, {"tokens": [1, 2]}, {"iteration": 1.5}, {"score": None}, {"score": "1"},
    {"gold": "high"}, {"kl_ref": [0.0]}, {"kl_ref": None}, {"ratio": 1.0}, {"sums": {}},
    {"policy": [[["red"]]]}, {"policy": [[[1, 0.5]]]}, {"ref_policy": {}}, {"ended": 1},
    {"prompt": ["a"]}, {"length": "3"}, {"score": 1e300}, {"kl_coef": True}])
def test_a_damaged_record_is_refused_with_its_place(tmp_path, change):
    folder = tmp_path / "run"
    shutil.copytree(toy_run(), folder)
    first, *others = read_kept(str(folder))
    check_record(first, "here")
    lines = [json.dumps({**first, **change}), *map(json.dumps, others)]
    (folder / "kept.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="kept.jsonl, response 1: expected "):
        write([str(folder)], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_run_of_an_older_version_gives_a_page_of_what_there_is(tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(toy_run(), folder)
    os.unlink(folder / "kept.jsonl")
    values = values_of(write([str(folder)], tmp_path / "page.html"))
    assert values["series"] == [] and len(values["panels"]) == 8
    (sample,) = values["samples"]
    assert "rewards: score - kl_coef * kl_ref" in sample["text"]


def test_a_run_that_is_not_finished_has_a_page_and_its_policy_is_not_asked(tmp_path):
    folder = tmp_path / "going"
    folder.mkdir()
    for name in ("metrics.csv", "kept.jsonl"):
        shutil.copy(os.path.join(toy_run(), name), folder / f"{name}.part")
    with open(folder / "kept.jsonl.part", "a") as file:
        file.write('{"iteration": 3, "asked')        # is being written
    values = values_of(write([str(folder)], tmp_path / "page.html", prompt="Colours for bana?"))
    assert len(values["series"]) == 4 and values["answers"] == []
    assert values["notes"] == [f"{folder} is not finished: its policy is not asked."]


def test_a_curve_that_is_not_finite_is_refused(tmp_path):
    shutil.copytree(toy_run(), tmp_path / "run")
    path = tmp_path / "run" / "metrics.csv"
    path.write_text(path.read_text().replace("\n1,", "\n1e999,"))
    with pytest.raises(ValueError, match="expected finite numbers in metrics.csv"):
        write([str(tmp_path / "run")], tmp_path / "page.html")


def test_only_the_end_of_long_samples_is_shown(tmp_path):
    (tmp_path / "samples.txt").write_text("".join(f"line {i}\n" for i in range(5000)))
    text = samples_of(str(tmp_path))
    assert text.startswith("line ") and text.endswith("line 4999\n") and len(text) <= 6000


def test_folders_of_a_pipeline_stand_for_its_stages(tmp_path):
    for name in ("sft", "ppo", "reward_model", "reward_model_2", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text("step\n1\n")
    (tmp_path / "comparisons.jsonl").write_text("")
    assert [os.path.basename(one) for one in stages_of(str(tmp_path))] == [
        "sft", "reward_model", "reward_model_2", "ppo"]
    (tmp_path / "report.json").write_text('{"plan": {"reward_models": 1}}')
    assert [os.path.basename(one) for one in stages_of(str(tmp_path))] == [
        "sft", "reward_model", "ppo"]                    # the second is of an earlier pipeline
    assert stages_of(str(tmp_path / "ppo")) == [str(tmp_path / "ppo")]
    for folder in (tmp_path / "nothing", tmp_path / "comparisons.jsonl"):
        with pytest.raises(FileNotFoundError, match="expected the folder of a run"):
            stages_of(str(folder))


def test_the_result_table_says_what_each_row_means(tmp_path):
    report = {"win_rate": {"mean": 0.8, "low": 0.77, "high": 0.83},
              "control": {"mean": 0.5, "low": 0.47, "high": 0.53},
              "gold": {"base": -1.65, "sft": 1.9, "rlhf": 3.0}, "seed": 0}
    (tmp_path / "report.json").write_text(json.dumps(report))
    result = result_of(str(tmp_path))
    assert {row["name"]: row["cells"] for row in result["rows"]} == {
        "gold": ["-1.65", "1.90", "3.00"],
        "win_rate": ["", "0.50 [0.47, 0.53]", "0.80 [0.77, 0.83]"]}
    assert all(len(row["meaning"]) > 15 for row in result["rows"])
    for bad in ({"gold": {"sft": "1"}}, {"win_rate": {"mean": 1.0}}, {"gold": 3}):
        (tmp_path / "report.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match="report.json: expected"):
            result_of(str(tmp_path))


# ---- answers -------------------------------------------------------------------------------------

@functools.cache
def run_with_reward_model() -> str:
    folder = os.path.join(scratch_folder(), "page_ppo")
    quietly(ppo.main, ppo_config(reward=reward_folder(), out=folder))
    return folder


def test_base_sft_and_rlhf_are_found_from_the_last_of_them():
    named, notes = policies_of([], [toy_run(), run_with_reward_model()])
    assert list(named) == ["base", "SFT", "RLHF tokens", "RLHF page_ppo"] and notes == []
    assert named["SFT"] == sft_folder()


@pytest.mark.parametrize("how", get_args(Ensemble))
def test_a_run_of_any_vote_has_its_reward_models_scores(how, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    config = {"reward": reward_folder(), "ensemble": how}
    (run / "run.json").write_text(json.dumps({"finished": True, "config": config}))
    assert reward_of([str(run)], toy_tokenizer()).how == how
    (run / "run.json").write_text(json.dumps({"finished": True, "config": {
        **config, "ensemble": "other"}}))
    assert reward_of([str(run)], toy_tokenizer()) is None


def test_your_prompt_is_answered_by_every_policy_with_its_score(tmp_path):
    page = write([run_with_reward_model()], tmp_path / "page.html", prompt="Colours for bana?")
    (asked,) = values_of(page)["answers"]
    assert asked["prompt"] == "Prompt: Colours for bana?\nResponse:"
    assert [one["policy"] for one in asked["answers"]] == ["base", "SFT", "RLHF"]
    for one in asked["answers"]:
        assert isinstance(one["score"], float) and one["gold"] is None
    assert asked["answers"][1]["text"].split()[0] in ("red", "green", "blue")
    assert page == write([run_with_reward_model()], tmp_path / "again.html",
                         prompt="Colours for bana?").replace("again.html", "page.html")


def test_a_function_named_in_a_run_folder_is_not_called(tmp_path, monkeypatch):
    """Reading somebody's folder runs no code of his."""
    monkeypatch.setattr("helpers.share_of_red", None)    # the reward that run.json names
    page = write([toy_run()], tmp_path / "page.html", prompt="Colours for bana?")
    (asked,) = values_of(page)["answers"]
    assert {one["score"] for one in asked["answers"]} == {None}


def test_a_prompt_that_leaves_no_room_is_told(tmp_path):
    values = values_of(write([toy_run()], tmp_path / "page.html", prompt="so " * 40))
    assert values["answers"] == [] and len(values["notes"]) == 3
    assert values["notes"][0] == "base: no prompt leaves room for 8 new tokens."


def test_the_command_writes_a_page_and_says_where(tmp_path, capsys):
    path = str(tmp_path / "new" / "page.html")
    assert main(PageConfig(runs=f"{toy_run()},{run_with_reward_model()}", prompt_count=2,
                           out=path, max_new_tokens=8)) == path
    assert f"wrote {path}" in capsys.readouterr().out
    values = values_of((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))
    assert values["runs"] == ["tokens", "page_ppo"]
    main(PageConfig(runs=toy_run(), prompt_count=0, out=path))           # over a page of ours
    (tmp_path / "thesis.html").write_text("<title>My thesis</title>")
    with pytest.raises(ValueError, match="thesis.html is there and no page of minirlhf"):
        main(PageConfig(runs=toy_run(), prompt_count=0, out=str(tmp_path / "thesis.html")))
    assert (tmp_path / "thesis.html").read_text() == "<title>My thesis</title>"


@pytest.mark.parametrize("options, words", [
    ({}, "expected the folder of a run"), ({"runs": "a", "out": "a.txt"}, "--out"),
    ({"runs": "a", "prompt_count": 51}, "--prompt_count is 51")])
def test_options_that_give_no_page_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        PageConfig(**options)


# ---- in a browser --------------------------------------------------------------------------------

in_a_browser = pytest.mark.skipif(not find_browser(), reason="there is no Chromium here")
TOKEN = ".response:first-child .token"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page about two runs, one of them hostile."""
    folder = tmp_path_factory.mktemp("page")
    path = folder / "page.html"
    write([toy_run(), hostile_run(folder / "hostile"), sft_folder(), reward_folder()], path,
          prompt="Colours for bana?")
    return path


@in_a_browser
def test_everything_is_drawn_without_a_complaint_and_hostile_text_is_inert(page):
    with Browser() as browser:
        browser.open(page)
        assert browser.run("[...document.querySelectorAll('section')].map(s => s.id)") == [
            "curves", "answers", "tokens", "samples"]
        panels = len(values_of(page.read_text(encoding="utf-8"))["panels"])
        assert panels == 13                              # SFT 1, reward model 4, PPO 8
        assert browser.run("document.querySelectorAll('figure > svg polyline').length") >= panels
        browser.run("document.querySelector('#series').selectedIndex = 3")
        browser.run("document.querySelector('#series').dispatchEvent(new Event('change'))")
        browser.point(TOKEN, click=True)
        assert browser.run("document.title").startswith("minirlhf: ")
        assert browser.run("document.querySelectorAll('img, iframe').length") == 0
        assert browser.run("document.querySelectorAll('script').length") == 2
        text = browser.run("document.body.innerText")
        assert "</script><script>" in text and "␛[31mred␛[0m" in text and "<U+202E>evil" in text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
        assert browser.errors == []


@in_a_browser
def test_the_switch_changes_the_colours_and_the_slider_the_answer(page):
    records = [one for one in read_kept(toy_run()) if one["asked_again"]][::3]
    shown = f"[...document.querySelectorAll('{TOKEN} .value')].map(e => e.textContent)"
    colours = (f"[...document.querySelectorAll('{TOKEN}')].map(e => e.className + "
               "getComputedStyle(e).backgroundImage + getComputedStyle(e).backgroundColor)")
    with Browser() as browser:
        browser.open(page)
        looks = []
        for name in ("kl_ref", "rewards", "old_values", "advantages"):
            browser.point(f"input[value={name}]", click=True)
            values = [float(text.replace("−", "-")) for text in browser.run(shown)]
            assert values == pytest.approx(records[-1][name], abs=0.0051), name
            looks.append(browser.run(colours))
            for value, look in zip(records[-1][name], looks[-1]):
                assert ("below" in look) == (value < -0.005) or abs(value) < 0.006
        assert len(set(map(tuple, looks))) == 4
        browser.point("input[value=ratio]", click=True)
        assert set(browser.run(shown)) == {"–"}          # these are not trained on
        browser.run("document.querySelector('#stop').focus()")
        for record in records[-2::-1]:
            browser.press("ArrowLeft")
            text = browser.run(f"[...document.querySelectorAll('{TOKEN} .text')]"
                               ".map(e => e.textContent).join('')")
            assert text == "".join(record["tokens"]).replace(" ", "␣")
            assert browser.run("document.querySelector('#stop-text').textContent").startswith(
                f"{record['iteration']} (")
        assert browser.errors == []


@in_a_browser
def test_the_table_adds_up_as_it_says(page):
    table = ".response:first-child table:has(tfoot)"
    cells = (f"[...document.querySelectorAll('{table} tr')].map(r => [...r.cells].map("
             "c => c.textContent.replace('−', '-')))")
    with Browser() as browser:
        browser.open(page)
        head, *rows, total = browser.run(cells)
        for name in ("old_logprobs", "ref_logprobs", "kl_ref", "rewards"):
            column = head.index(name)
            assert sum(float(row[column]) for row in rows) == pytest.approx(
                float(total[column]), abs=0.0006 * (len(rows) + 1)), name
        law = browser.run("document.querySelector('.law').textContent").replace("−", "-")
        score, kl_coef, kl_ref, rewards = map(float, re.findall(r"-?\d+\.\d+", law))
        assert score - kl_coef * kl_ref == pytest.approx(rewards, abs=0.002)
        assert rewards == float(total[head.index("rewards")])


@in_a_browser
def test_the_keyboard_reaches_every_token_and_enter_shows_the_alternatives(page):
    (record,) = [one for one in read_kept(toy_run()) if one["asked_again"]][-3:-2]
    focused = "document.activeElement.querySelector('.text').textContent"
    with Browser() as browser:
        browser.open(page)
        browser.run("document.querySelector('input[name=measure]:checked').focus()")
        browser.press("Tab")
        words = [token.replace(" ", "␣") for token in record["tokens"]]
        assert browser.run(focused) == words[0]
        assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        for key, place in (("End", -1), ("ArrowRight", -1), ("Home", 0), ("ArrowRight", 1)):
            browser.press(key)
            assert browser.run(focused) == words[place]
        readout = browser.run("document.querySelector('.readout').textContent")
        assert f"kl_ref {record['kl_ref'][1]:.3f}".replace("-", "−") in readout
        assert browser.run("document.querySelectorAll('.others table').length") == 0
        browser.press("Enter")
        tables = browser.run("[...document.querySelectorAll('.others table')].map(t => [...t."
                             "tBodies[0].rows].map(r => [...r.cells].map(c => c.textContent)))")
        for name, rows in zip(("policy", "ref_policy"), tables):
            expected = [[token.replace(" ", "␣") + " ◀ chosen" * (token == record["tokens"][1]),
                         f"{share:.3f}", ""] for token, share in record[name][1]]
            assert rows == expected
        assert browser.run("document.activeElement.getAttribute('aria-pressed')") == "true"
        assert browser.errors == []


@in_a_browser
def test_pointing_at_a_token_shows_its_numbers(page):
    record = [one for one in read_kept(toy_run()) if one["asked_again"]][-3]
    with Browser() as browser:
        browser.open(page)
        browser.point(TOKEN)
        readout = browser.run("document.querySelector('.readout').textContent")
        for name in ("old_logprobs", "kl_ref", "rewards", "old_values", "advantages", "entropy"):
            assert f"{name} {record[name][0]:.3f}".replace("-0.000", "0.000").replace(
                "-", "−") in readout


@in_a_browser
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_a_phone_and_can_be_read_in_light_and_dark(page, dark):
    with Browser(width=360, dark=dark) as browser:
        browser.open(page)
        assert browser.run("document.documentElement.scrollWidth") == 360
        ink, paper = browser.run("[getComputedStyle(document.body).color, "
                                 "getComputedStyle(document.body).backgroundColor]")
        one, other = sorted(luminance(colour) for colour in (ink, paper))
        assert (other + 0.05) / (one + 0.05) > 7         # WCAG 2, contrast AAA
        assert (luminance(paper) < 0.5) == dark


def luminance(colour: str) -> float:
    """Relative luminance of a CSS colour rgb(r, g, b), as WCAG 2 defines it."""
    parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear))


@in_a_browser
def test_controls_have_labels_and_pictures_have_words(page):
    with Browser() as browser:
        browser.open(page)
        assert browser.run("[...document.querySelectorAll('input, select')].every("
                           "e => e.labels.length === 1 && e.labels[0].textContent.trim())")
        assert browser.run("[...document.querySelectorAll('svg[role=img]')].every("
                           "e => e.getAttribute('aria-label').length > 10)")
        assert browser.run("document.documentElement.lang") == "en"


def test_the_template_is_filled_in_one_pass():
    page = fill_template("{{data}} & {{script}}", {"a": "{{style}}"})
    assert "{{data}} &amp; {{script}}" in page and '{"a":"{{style}}"}' in page


def test_collect_names_a_run_once():
    values = collect([toy_run(), os.path.join(toy_run(), "."), toy_run()])
    assert values["runs"] == ["tokens"]
