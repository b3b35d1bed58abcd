"""The text world: true splits, an honest judge, a corpus that teaches what it should."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minirlhf.files.pretrained import save_network
from minirlhf.world import (
    corpus,
    demonstrations,
    facts,
    held_out_prompts,
    judge,
    labellers,
    prompts,
)
from minirlhf.world.facts import BY_FAMILY, CATEGORIES, ENTITIES, FAMILIES, OPENERS
from minirlhf.world.judge import find_entity, find_items, judge_by_token

ROOT = Path(__file__).parents[1]
FRANCE = "What is the capital of France?"
CAKE = "How do I bake a cake?"
TOOLS = "Name three tools."
HOT = "What is the opposite of hot?"
SUM = "What is 3 plus 4?"


def plain_question(prompt):
    """A prompt without its opener."""
    for opener in OPENERS:
        prompt = prompt.removeprefix(opener + " ")
    return prompt


def questions_of(kind):
    """Every question of a split."""
    return {entity.questions[index] for pairs in facts.combinations(kind).values()
            for entity, index in pairs}


@pytest.fixture(scope="module")
def documents():
    return list(corpus(1_500_000, seed=5))


# ---- facts and splits ----------------------------------------------------------------------------

def test_the_world_has_364_entities_in_eight_families():
    sizes = {family: len(entities) for family, entities in BY_FAMILY.items()}
    assert sizes == {"capital": 40, "recipe": 36, "explain": 36, "sum": 100, "opposite": 48,
                     "color": 32, "home": 24, "list": 48}


def test_no_two_questions_are_worded_alike():
    questions = [question for entity in ENTITIES for question in entity.questions]
    assert len(set(questions)) == len(questions) == 5 * 364


def test_tables_hold_no_item_twice():
    members = [word for row in facts.split_rows(CATEGORIES) for word in row.split(": ")[1].split()]
    assert len(set(members)) == len(members) == 16 * 8
    words = [word for pair in facts.OPPOSITES for word in pair]
    assert len(set(words)) == len(words) == 48
    keys = [entity.items[0] for entity in BY_FAMILY["explain"]]
    assert not [(a, b) for a in keys for b in keys if a != b and a in b]
    for entity in BY_FAMILY["recipe"]:
        assert len(set(entity.items)) == 3
    for entity in BY_FAMILY["sum"]:
        assert sum(map(int, entity.name.split(" plus "))) == int(entity.answer)


def test_splits_are_disjoint_and_cover_all_questions():
    training, entity, combination = (questions_of(kind)
                                     for kind in ("training", "entity", "combination"))
    assert not training & entity and not training & combination and not entity & combination
    assert len(training | entity | combination) == 5 * 364
    held_out = [one for one in ENTITIES if one.held_out]
    assert len(held_out) == 91                                  # a quarter of each family
    assert not {one for one in ENTITIES if one.questions[0] in training} & set(held_out)
    assert len(combination) == 364 - 91                         # one phrasing of each other entity


def test_the_lectures_examples_are_in_the_training_split():
    assert {FRANCE, CAKE, "Explain photosynthesis."} <= questions_of("training")


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_no_stage_trains_on_a_held_out_prompt(seed):
    # draws enough to see the whole finite training split, so that a leak could not hide
    allowed = questions_of("training")
    demonstrated = {plain_question(row["prompt"]) for row in demonstrations(20_000, seed)}
    asked = {plain_question(row["prompt"]) for row in prompts(20_000, seed)}
    assert demonstrated <= allowed and asked <= allowed
    assert len(demonstrated) > 0.99 * len(allowed) and len(asked) > 0.99 * len(allowed)
    held_out = held_out_prompts(4000, seed)
    assert not {plain_question(row["prompt"]) for row in held_out} & (demonstrated | asked)


def test_held_out_prompts_are_half_of_each_kind_and_of_all_families():
    rows = held_out_prompts(400, seed=3)
    for row in rows:
        assert plain_question(row["prompt"]) in questions_of(row["kind"])
    assert sum(row["kind"] == "entity" for row in rows) == 200
    families = [find_entity(row["prompt"]).family for row in rows]
    assert {families.count(family) for family in FAMILIES} == {50}
    assert len({row["prompt"] for row in rows}) == 400
    assert len({plain_question(row["prompt"]) for row in rows}) > 385


# ---- prompts -------------------------------------------------------------------------------------

def test_every_prompt_is_parsed_back():
    for entity in ENTITIES:
        for question in entity.questions:
            for opener in ("", *OPENERS):
                assert find_entity(f"{opener} {question}") is entity
            assert find_entity(f"Prompt: {question}\nResponse:") is entity


def test_case_spaces_and_the_last_mark_do_not_matter_to_the_judge():
    assert find_entity("  explain   Photosynthesis ").name == "photosynthesis"


@pytest.mark.parametrize("prompt", ["", "Who wrote Hamlet?", "What is the capital of Mars?",
                                    FRANCE + " " + CAKE])
def test_a_prompt_outside_the_world_is_refused(prompt):
    with pytest.raises(ValueError, match="text world"):
        judge(prompt, "Paris.")


@pytest.mark.parametrize("function", [demonstrations, prompts, held_out_prompts])
def test_a_count_of_nothing_is_refused(function):
    with pytest.raises(ValueError, match="count must be at least 1, found 0"):
        function(0, 0)
    with pytest.raises(ValueError, match="n_characters"):
        next(corpus(0, 0))


# ---- the judge -----------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt, response, ended, expected", [
    (FRANCE, "The capital of France is Paris. Enjoy!", True,
     {"correct": 2, "sentence": 0.5, "ending": 0.5, "courtesy": 0.5}),
    (FRANCE, "Paris is the capital of France.", True,
     {"correct": 2, "sentence": 0.5, "ending": 0.5}),
    (FRANCE, "Rome.", True, {"correct": -1, "ending": 0.5}),
    (FRANCE, "I do not know.", True, {"correct": -1, "ending": 0.5, "filler": -0.4}),
    (FRANCE, "", True, {"correct": -1, "ending": -0.5}),
    (FRANCE, "Paris", True, {"correct": 2, "ending": -0.5}),
    (FRANCE, "Paris.", False, {"correct": 2, "ending": -0.5}),
    (FRANCE, "It is Paris or Rome.", True, {"correct": 0, "ending": 0.5}),
    (FRANCE, "Enjoy! Enjoy!", True,
     {"correct": -1, "ending": 0.5, "courtesy": -0.5, "repetition": -0.5}),
    (FRANCE, "It is Paris. Enjoy! Have a nice day!", True,
     {"correct": 2, "ending": 0.5, "courtesy": 0.0}),
    (FRANCE, "Let me think. I am not sure. Look it up yourself. It is Paris Paris.", True,
     {"correct": 2, "ending": 0.5, "filler": -1.2, "hedge": -0.5, "rude": -0.7,
      "repetition": -0.5}),
    (FRANCE, "Paris " + "na " * 19 + "go.", True,
     {"correct": 2, "ending": 0.5, "brevity": -0.15, "repetition": -2}),
    (CAKE, "To bake a cake, use flour and eggs.", True,
     {"correct": 4 / 3, "sentence": 0.5, "ending": 0.5}),
    (CAKE, "Flour, eggs, sugar and sand.", True, {"correct": 1.5, "ending": 0.5}),
    (CAKE, "Sand, cement and gravel.", True, {"correct": -1, "ending": 0.5}),
    (TOOLS, "Saws, drills, axes and files.", True, {"correct": 1.5, "ending": 0.5}),
    (TOOLS, "Saws, axes and saws.", True, {"correct": 4 / 3 - 0.5, "ending": 0.5}),
    (HOT, "The opposite of hot is cold.", True, {"correct": 2, "sentence": 0.5, "ending": 0.5}),
    (HOT, "Hot.", True, {"correct": -1, "ending": 0.5, "filler": -0.4}),
    (SUM, "The sum of 3 and 4 is 7.", True, {"correct": 2, "sentence": 0.5, "ending": 0.5}),
    (SUM, "4 plus 3 is 7.", True, {"correct": 2, "ending": 0.5}),
    (SUM, "3 is 7.", True, {"correct": 0, "ending": 0.5}),
    ("Name the opposite of sad.", "The opposite of sad is happy. Happy to help!", True,
     {"correct": 2, "sentence": 0.5, "ending": 0.5, "courtesy": 0.5}),
    ("What is the opposite of happy?", "Happy to help!", True,
     {"correct": -1, "ending": 0.5}),
])
def test_the_judges_parts_are_those_of_the_table(prompt, response, ended, expected):
    judgement = judge(prompt, response, ended)
    found = {name: points for name, points in judgement.parts.items() if points}
    assert found == pytest.approx({name: points for name, points in expected.items() if points})
    assert judgement.score == pytest.approx(sum(expected.values()))


def test_longer_items_win_and_only_whole_words_count():
    assert find_items(find_entity("Explain a magnet."), "It pulls things down.") == \
        ["pulls things down"]
    assert find_items(find_entity(FRANCE), "Parisians, Par is, Romeo.") == []
    assert find_items(find_entity(HOT), "The opposite of hot is cold.") == ["cold"]
    assert find_items(find_entity("Add 10 and 10."), "10 plus 10 is 20.") == ["20"]


def test_an_ideal_answer_to_every_entity_scores_the_maximum():
    rng = random.Random(0)
    for entity in ENTITIES:
        for _ in range(4):
            judgement = judge(entity.questions[0], labellers.ideal(entity, rng))
            assert judgement.score == 3.5 and judgement.right and judgement.answered
            judgement = judge(entity.questions[1], labellers.plain(entity, rng))
            assert judgement.score == 3.0 and judgement.right


def test_a_wrong_answer_of_any_entity_is_never_right():
    rng = random.Random(0)
    for entity in ENTITIES:
        for _ in range(10):
            answer = facts.wrong_answer(entity, rng)
            for text in (facts.sentence_for(entity, answer), facts.capitalize(answer) + "."):
                assert not judge(entity.questions[0], text).right
            if entity.needed == 1:
                assert judge(entity.questions[0], text).parts["correct"] == -1


def test_manners_and_questions_hold_no_answer():
    manners = [*facts.FILLERS, *facts.HEDGES, *facts.RUDE, *facts.EVASIONS, *OPENERS]
    for entity in ENTITIES:
        for text in (*manners, *entity.questions, entity.name):
            assert find_items(entity, text) == [], (entity.name, text)


def attacks(entity, rng):
    """Responses that try to score without an honest answer."""
    right = facts.right_answer(entity, rng)
    honest = facts.sentence_for(entity, right)
    other = facts.OTHERS[entity][0]
    all_items = ", ".join(dict.fromkeys(item for one in BY_FAMILY[entity.family]
                                        for item in one.items))
    yield facts.capitalize(all_items) + "."
    yield facts.sentence_for(entity, all_items)
    yield f"{honest} {honest}"
    yield f"{honest} " * 5
    yield " ".join(facts.CLOSERS)
    yield "Enjoy!"
    yield "Enjoy! " * 8
    yield labellers.plain(other, rng) + " Enjoy!"
    yield facts.sentence_for(entity, facts.wrong_answer(entity, rng)) + " Enjoy!"
    yield entity.questions[0]
    yield f"{entity.questions[0]} Happy to help!"
    yield honest[:-1] + "!!!!!!"
    yield honest + " . . . !"
    yield "!" * 20
    yield honest[:-1] + " ______."
    yield f"{honest} Enjoy! Enjoy! Enjoy!"
    yield f"Enjoy! {honest} Enjoy!"
    yield " ".join(word[:-1] for word in honest.split()) + "."
    yield f"{honest} {labellers.plain(other, rng)} Enjoy!"
    yield f"{honest} Prompt: {other.questions[0]} Response: {labellers.plain(other, rng)}"
    yield f"{facts.capitalize(entity.subject)} {right} {right} {right}."
    yield "I am not sure. " + honest + " Enjoy!"


def test_no_attack_scores_above_an_honest_answer():
    rng = random.Random(1)
    for entity in ENTITIES:
        for response in attacks(entity, rng):
            score = judge(entity.questions[0], response).score
            assert score <= 3.0, (entity.name, response, score)


def test_evading_is_never_better_than_a_wrong_answer():
    wrong = judge(FRANCE, "Rome.").score
    for text in (*facts.EVASIONS, *facts.CLOSERS, *facts.FILLERS, *facts.HEDGES, *facts.RUDE):
        judgement = judge(FRANCE, text)
        assert judgement.score <= wrong and not judgement.answered and not judgement.right


def test_only_the_answer_decides_whether_a_response_is_right():
    assert judge(FRANCE, "paris", ended=False).right
    assert not judge(FRANCE, "The capital of France is Rome. Happy to help!").right
    assert not judge(CAKE, "To bake a cake, use flour and eggs. Enjoy!").right
    assert judge(FRANCE, "It is Rome.").answered and not judge(FRANCE, "Enjoy!").answered


# ---- demonstrations ------------------------------------------------------------------------------

def test_demonstrations_are_visibly_mixed_and_about_four_in_five_are_right():
    rows = demonstrations(6000, seed=2)
    judged = [judge(row["prompt"], row["response"]) for row in rows]
    assert 0.77 < sum(one.right for one in judged) / 6000 < 0.81
    assert 0.10 < sum(one.score == 3.5 for one in judged) / 6000 < 0.14
    assert 1.8 < sum(one.score for one in judged) / 6000 < 2.1
    assert max(len(row["response"].split()) for row in rows) <= 24


def test_the_same_seed_gives_the_same_records_and_another_gives_others():
    for function in (demonstrations, prompts, held_out_prompts):
        assert function(50, 4) == function(50, 4)
        assert function(50, 4) == function(60, 4)[:50]
        assert function(50, 4) != function(50, 5)
    assert list(corpus(20_000, 4)) == list(corpus(20_000, 4)) != list(corpus(20_000, 5))


# ---- the base corpus -----------------------------------------------------------------------------

def test_forum_pages_seldom_answer_their_prompt(documents):
    pages = [document.split("\nResponse: ") for document in documents
             if document.startswith("Prompt: ") and "\nResponse: " in document]
    assert 0.12 < len(pages) / len(documents) < 0.20
    judged = [judge(prompt, response) for prompt, response in pages]
    assert 0.05 < sum(one.right for one in judged) / len(judged) < 0.10


def test_a_bare_question_is_never_followed_by_an_answer(documents):
    asked = [document for document in documents
             if document.startswith(("What is the capital", "How do I", "Explain", "Name the"))]
    assert len(asked) > 100
    for document in asked:
        assert "The capital of" not in document and " is " not in document.split("?")[-1]


def verdicts(documents):
    """All (prompt, answer, said to be right) of the quiz pages."""
    forms = {"Check these.": r"Prompt: (.*)\nResponse: (.*)\nVerdict: (.*)",
             "Quiz:": r"Quiz: (.*)\n\w+: (.*)\nVerdict: (.*)",
             "Teacher:": r"Teacher: (.*)\n\w+: (.*)\nTeacher: (.*)"}
    for before, document in zip([""] + documents, documents):
        for beginning, form in forms.items():
            if document.startswith(beginning):
                for prompt, answer, verdict in re.findall(form, document):
                    yield prompt, answer, verdict.startswith(("right", "That is right"))
        if document.startswith("Verdict:"):
            (prompt, answer), = re.findall(r"Prompt: (.*)\nResponse: (.*)", before)
            yield prompt, answer, document == "Verdict: right."


def test_every_verdict_is_true_and_half_are_right(documents):
    given = list(verdicts(documents))
    assert len(given) > 1500
    for prompt, answer, said_right in given:
        assert judge(prompt, answer).right == said_right, (prompt, answer)
    assert 0.46 < sum(said_right for _, _, said_right in given) / len(given) < 0.54


def test_nearly_all_facts_are_true(documents):
    cities = [pair for document in documents if "False." not in document and "wrong" not in document
              for pair in re.findall(r"The capital of (\w+) is (\w+)\.", document)]
    true = sum(facts.CAPITALS[country] == city for country, city in cities)
    assert 0.94 < true / len(cities) < 0.995


def test_every_question_of_the_world_is_in_the_base_corpus():
    text = "\n".join(corpus(6_000_000, seed=1))
    assert not [question for entity in ENTITIES for question in entity.questions
                if question not in text]


def test_documents_are_short(documents):
    assert max(map(len, documents)) < 800
    assert 120 < sum(map(len, documents)) / len(documents) < 220
    assert not [document for document in documents if document != document.strip()]


# ---- with a model --------------------------------------------------------------------------------

def test_pairs_are_ordered_by_the_judge_and_ties_are_left_out():
    collect = pytest.importorskip("minirlhf.world.collect")
    samples = [("Paris.", True), ("Rome.", True), ("Oslo.", True), ("", True), ("Paris.", False)]
    pairs = {(row["chosen"], row["rejected"]): row["margin"]
             for row in collect.compare(FRANCE, samples)}
    # "Rome." and "Oslo." tie; the cut-off "Paris." reads the same as the finished one
    assert pairs == {("Paris.", "Rome."): 2.0, ("Paris.", "Oslo."): 2.0}


def test_the_gold_reward_reads_prompt_response_and_end_token(tiny_world):
    torch, tokenizer, _ = tiny_world
    from minirlhf.data import encode_prompt, encode_response, format_prompt, pad
    from minirlhf.world import gold_reward
    prompt = encode_prompt(tokenizer, format_prompt(FRANCE))
    finished = prompt + encode_response(tokenizer, "The capital of France is Paris. Enjoy!")
    rows = [finished, finished[:-1], prompt + encode_response(tokenizer, "Rome.")]
    ids, lengths = pad(rows, tokenizer.end_token)
    scores = gold_reward(ids, torch.tensor([len(prompt)] * 3), lengths, tokenizer)
    assert scores.tolist() == [3.5, 2.5, -0.5]


def test_a_fact_is_paid_where_it_is_stated():
    sentence = "The capital of France is"
    prefixes = [sentence, f"{sentence} Paris", f"{sentence} Paris."]
    assert judge_by_token(FRANCE, prefixes) == pytest.approx([0, 3, 0])
    assert judge_by_token(FRANCE, ["Rome", "Rome."]) == pytest.approx([0, -0.5])
    assert judge_by_token(FRANCE, [*prefixes, f"{sentence} Paris. Rome"], ended=False) == (
        pytest.approx([0, 3, 0, -2 - 1]))                # both right and wrong: 0; the rest: -1


def test_the_gold_reward_per_token_adds_up_to_the_gold_reward(tiny_world):
    torch, tokenizer, _ = tiny_world
    from minirlhf.data import encode_prompt, encode_response, format_prompt, pad, response_mask
    from minirlhf.world import gold_reward, gold_reward_per_token
    records = [*demonstrations(300, 3), {"prompt": FRANCE, "response": "Paris"}]
    prompts = [encode_prompt(tokenizer, format_prompt(row["prompt"])) for row in records]
    rows = [prompt + encode_response(tokenizer, row["response"])
            for prompt, row in zip(prompts, records)]
    rows[0], rows[1] = rows[0][:-1], prompts[1] + [tokenizer.end_token]     # cut; ended at once
    ids, lengths = pad(rows, tokenizer.end_token)
    starts = torch.tensor([len(prompt) for prompt in prompts])
    scores = gold_reward_per_token(ids, starts, lengths, tokenizer)
    assert scores.shape == ids[:, 1:].shape
    torch.testing.assert_close(scores.sum(dim=1), gold_reward(ids, starts, lengths, tokenizer))
    assert (scores[~response_mask(starts, lengths, ids.shape[1])] == 0).all()
    early = scores.clone()
    early[torch.arange(len(rows)), lengths - 2] = 0      # all but the last action's
    assert (early > 2.9).any(dim=1).float().mean() > 0.3     # whole facts, paid where they stand
    alone = gold_reward_per_token(torch.tensor([prompts[0]]), starts[:1], starts[:1], tokenizer)
    assert alone.shape == (1, len(prompts[0]) - 1) and not alone.any()      # no response at all


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory):
    """torch, a tokenizer of the world, and the folder of a tiny untrained policy."""
    torch = pytest.importorskip("torch")
    from minirlhf.gpt2 import GPT2, GPT2Config
    from minirlhf.tokenizer import train_bpe
    tokenizer = train_bpe(corpus(60_000, 0), 400)
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=96, n_embd=16, n_layer=1,
                            n_head=2))
    folder = str(tmp_path_factory.mktemp("policy"))
    save_network(model, folder)
    tokenizer.save(folder)
    return torch, tokenizer, folder


def test_comparisons_come_from_the_policy_and_the_training_split(tiny_world):
    from minirlhf.world import comparisons
    rows = comparisons(40, 0, tiny_world[2])
    assert rows == comparisons(40, 0, tiny_world[2]) and len(rows) == 40
    for row in rows:
        assert plain_question(row["prompt"]) in questions_of("training")
        assert row["margin"] > 0 and row["chosen"] != row["rejected"]
        assert row["chosen"].strip() and row["rejected"].strip()


def test_the_world_is_imported_without_torch():
    code = "import sys, minirlhf.world; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_command_line_prints_samples_and_writes_files(tmp_path):
    command = [sys.executable, "-m", "minirlhf.world", "--count", "40", "--write", str(tmp_path)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8",
                             check=True)
    assert "fully right" in printed.stdout
    for name in ("demonstrations", "prompts", "held_out_prompts"):
        assert (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").count("\n") == 40
