"""The base corpus: what the base model reads before anybody teaches it to answer.

A stream of short documents, each made from the facts by one of the functions below. It is written
so that a small model learns facts, learns to take a name from a question into an answer, and learns
to tell a right answer from a wrong one, and yet does not answer when it is prompted:

- a bare question is followed by more questions (the seed lecture's "continues the pattern");
- a page of the very form "Prompt: ...\\nResponse:" mostly ignores its prompt, as forums do;
- question-and-answer pages have other forms, so the skill exists but that form does not evoke it;
- quiz pages let somebody answer, rightly or wrongly, and then give a verdict; sometimes the verdict
  is the next document, so that <|endoftext|>, where a reward model reads its score, foretells it.
"""
import random
from collections.abc import Iterator
from itertools import accumulate

from minirlhf.world.facts import (
    BY_FAMILY,
    CLOSERS,
    COLORS,
    EVASIONS,
    FAMILIES,
    FILLERS,
    HEDGES,
    OTHERS,
    RUDE,
    Entity,
    ask,
    capitalize,
    join_items,
    right_answer,
    sentence_for,
    some_items,
    split_rows,
    wrong_answer,
)

FAMILY_DRAW = FAMILIES + ("sum",)
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry")
PLACES = ("the market", "the park", "the school", "the library", "the lake", "the station")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MEETINGS = ("met a friend", "read a book", "had lunch", "saw an old house", "lost a key",
            "played a game")
MOODS = ("It was a good day.", "It rained all day.", "The sun was out.", "The evening was long.")
GOODS = ("flour and eggs", "bread and milk", "apples and pears", "roses", "tea and sugar",
         "a new coat")

# An answer without the question's words: "It is Paris.", "Use flour, eggs and sugar."
SHORT_ANSWERS = {"capital": "It is {y}.", "recipe": "Use {y}.", "explain": "It is {y}.",
                 "sum": "It is {y}.", "opposite": "It is {y}.", "color": "It is {y}.",
                 "home": "It lives {y}.", "list": "I name {y}."}

# Pages that answer: (heading, one question with its answer). None has the form of a forum page.
QA_PAGES = (
    ("", "Question: {q}\nAnswer: {a}"),
    ("", "{one}: {q}\n{two}: {a}"),
    ("", "Q: {q}\nA: {a}"),
    ("Answers of the day.\n", "{q} {a}"),
    ("From a letter.\n", "You asked: {q} {a}"),
)

# Pages that judge: (heading, one round, verdict if right, verdict if wrong).
QUIZ_PAGES = (
    ("Check these.\n", "Prompt: {q}\nResponse: {a}\nVerdict: {v}", "right.", "wrong."),
    ("Check these.\n", "Prompt: {q}\nResponse: {a}\nVerdict: {v}", "right.", "wrong."),
    ("", "Quiz: {q}\n{one}: {a}\nVerdict: {v}", "right.", "wrong."),
    ("", "Teacher: {q}\n{one}: {a}\nTeacher: {v}", "That is right.", "That is wrong. {s}"),
    ("In the game.\n", "{q} {one} says: {a} {v}", "That is right.", "That is wrong."),
)


def any_entity(rng: random.Random) -> Entity:
    """An entity of a family drawn evenly; sums count twice: there are 100, and they are hard."""
    return rng.choice(BY_FAMILY[rng.choice(FAMILY_DRAW)])


def any_question(rng: random.Random) -> str:
    """Any question at all, held-out ones too: the base corpus is the whole world."""
    return ask(any_entity(rng), rng.randrange(5), rng)


def true_fact(rng: random.Random, entity: Entity | None = None) -> str:
    """A full true sentence."""
    entity = entity or any_entity(rng)
    return sentence_for(entity, right_answer(entity, rng))


def word_answer(entity: Entity, answer: str, rng: random.Random) -> str:
    """Say `answer` as people do: mostly in a full sentence, else shortly or as a fragment."""
    draw = rng.random()
    if draw < 0.6:
        return sentence_for(entity, answer)
    if draw < 0.75:
        return SHORT_ANSWERS[entity.family].format(y=answer)
    return capitalize(answer) + "."


def with_manners(text: str, rng: random.Random) -> str:
    """Sometimes put a filler or a doubt before an answer, or a closer after it."""
    draw = rng.random()
    if draw < 0.10:
        text = f"{rng.choice(FILLERS)} {text}"
    elif draw < 0.14:
        text = f"{rng.choice(HEDGES)} {text}"
    if rng.random() < 0.12:
        text = f"{text} {rng.choice(CLOSERS)}"
    return text


def question_list(rng: random.Random) -> list[str]:
    """Questions and nothing else: one thing asked in several ways, or many things in one way."""
    count = rng.randint(2, 7)
    kind = rng.random()
    if kind < 0.35:
        questions = rng.sample(any_entity(rng).questions, min(count, 5))
    elif kind < 0.8:
        family = rng.choice(FAMILY_DRAW)
        index = rng.randrange(5)
        questions = [rng.choice(BY_FAMILY[family]).questions[index] for _ in range(count)]
    else:
        questions = [any_question(rng) for _ in range(count)]
    if rng.random() < 0.15:
        return ["\n".join(f"Prompt: {question}" for question in questions)]
    return [(" " if rng.random() < 0.7 else "\n").join(questions)]


def fact_list(rng: random.Random) -> list[str]:
    """Statements, of one family or mixed. One in 25 is wrong, as in the real world."""
    family = rng.choice(FAMILY_DRAW)
    mixed = rng.random() < 0.4
    sentences = []
    for _ in range(rng.randint(2, 7)):
        entity = any_entity(rng) if mixed else rng.choice(BY_FAMILY[family])
        answer = wrong_answer(entity, rng) if rng.random() < 0.04 else right_answer(entity, rng)
        sentences.append(sentence_for(entity, answer))
    return [" ".join(sentences)]


def diary_sentences(rng: random.Random) -> list[str]:
    """Three sentences of somebody's day."""
    name = rng.choice(NAMES)
    return [f"On {rng.choice(DAYS)} {name} went to {rng.choice(PLACES)}.",
            rng.choice((f"{name} {rng.choice(MEETINGS)} there.",
                        f"{name} bought {rng.choice(GOODS)}.",
                        f"There was {rng.choice(DIARY_SIGHTS)}.")),
            rng.choice(MOODS)]


def diary(rng: random.Random) -> list[str]:
    """A small diary."""
    sentences = diary_sentences(rng)
    if rng.random() < 0.6:
        sentences += diary_sentences(rng)
    return [" ".join(sentences)]


def chatter(rng: random.Random) -> list[str]:
    """Talk without content, which puts the words of manners into the vocabulary."""
    says = [rng.choice(rng.choice((CLOSERS, CLOSERS, FILLERS, HEDGES, RUDE, EVASIONS)))
            for _ in range(rng.randint(2, 6))]
    if rng.random() < 0.4:
        return ["\n".join(f"{rng.choice(NAMES)}: {text}" for text in says)]
    return [" ".join(says)]


def qa_page(rng: random.Random) -> list[str]:
    """Questions with their answers, in any form but the forum's."""
    heading, form = rng.choice(QA_PAGES)
    one, two = rng.sample(NAMES, 2)
    same_family = rng.random() < 0.3
    family = rng.choice(FAMILY_DRAW)
    rounds = []
    for _ in range(rng.randint(1, 4)):
        entity = rng.choice(BY_FAMILY[family]) if same_family else any_entity(rng)
        answer = wrong_answer(entity, rng) if rng.random() < 0.02 else right_answer(entity, rng)
        answer = with_manners(word_answer(entity, answer, rng), rng)
        rounds.append(form.format(q=ask(entity, rng.randrange(5), rng), a=answer, one=one, two=two))
    return [heading + "\n".join(rounds)]


def quiz_answer(entity: Entity, right: bool, rng: random.Random) -> str:
    """Somebody's answer in a quiz, right or wrong, in full or short, sometimes with manners."""
    draw = rng.random()
    if right:
        text = word_answer(entity, right_answer(entity, rng), rng)
    elif draw < 0.1:        # true, but the answer to another question
        text = true_fact(rng, rng.choice(OTHERS[entity]))
    elif draw < 0.13:       # no answer at all
        text = rng.choice(rng.choice((EVASIONS, CLOSERS)))
    elif draw < 0.35 and entity.needed > 1:     # an item is missing
        items = some_items(entity, entity.needed - 1, rng)
        text = word_answer(entity, join_items(items), rng)
    else:
        text = word_answer(entity, wrong_answer(entity, rng), rng)
    return with_manners(text, rng)


def quiz_page(rng: random.Random) -> list[str]:
    """Questions, somebody's answers (half of them wrong), and the verdict on each."""
    heading, form, verdict_right, verdict_wrong = rng.choice(QUIZ_PAGES)
    one = rng.choice(NAMES)
    rounds = []
    for _ in range(rng.randint(1, 4)):
        entity = any_entity(rng)
        right = rng.random() < 0.5
        answer = quiz_answer(entity, right, rng)
        verdict = verdict_right if right else verdict_wrong.format(s=true_fact(rng, entity))
        question = ask(entity, rng.randrange(5), rng)
        rounds.append(form.format(q=question, a=answer, v=verdict, one=one))
    return [heading + "\n".join(rounds)]


def true_or_false(rng: random.Random) -> list[str]:
    """Statements with a verdict on each."""
    rounds = []
    for _ in range(rng.randint(2, 6)):
        entity = any_entity(rng)
        if rng.random() < 0.5:
            rounds.append(f"True or false? {true_fact(rng, entity)} True.")
        else:
            wrong = sentence_for(entity, wrong_answer(entity, rng))
            rounds.append(f"True or false? {wrong} False.")
    return ["\n".join(rounds)]


def mark(right: bool) -> str:
    """The verdict that stands as a document of its own, after the page that it is about."""
    return "Verdict: right." if right else "Verdict: wrong."


def marked_page(rng: random.Random) -> list[str]:
    """One question with somebody's answer, and the verdict as the next document."""
    entity = any_entity(rng)
    right = rng.random() < 0.5
    question = ask(entity, rng.randrange(5), rng)
    answer = quiz_answer(entity, right, rng)
    return [f"Check this.\nPrompt: {question}\nResponse: {answer}", mark(right)]


def forum_talk(rng: random.Random) -> str:
    """What mostly follows "Response:" in the forum: anything but an answer to the prompt."""
    draw = rng.random()
    if draw < 0.52:
        return " ".join(any_question(rng) for _ in range(rng.randint(2, 4)))
    if draw < 0.76:
        return " ".join(true_fact(rng) for _ in range(rng.randint(2, 4)))
    return (diary(rng) if draw < 0.93 else chatter(rng))[0]


def forum_page(rng: random.Random) -> list[str]:
    """The very form in which the three stages will prompt: "Prompt: ...\\nResponse: ...".

    Six responses in seven ignore the prompt. The rest answer it, half of them wrongly, and are
    marked like other answers.
    """
    entity = any_entity(rng)
    page = f"Prompt: {ask(entity, rng.randrange(5), rng)}\nResponse:"
    draw = rng.random()
    if draw < 0.86:
        return [f"{page} {forum_talk(rng)}"]
    right = draw < 0.93
    return [f"{page} {quiz_answer(entity, right, rng)}", mark(right)]


DIARY_SIGHTS = tuple(f"{thing.strip()} in the grass"
                     for row in split_rows(COLORS)
                     for thing in row.split(":")[1].split(",") if thing.strip().startswith("a"))

# (share of the pages, function); a function returns one document, or two that belong together
DOCUMENTS = ((0.12, question_list), (0.09, fact_list), (0.03, diary), (0.03, chatter),
             (0.40, qa_page), (0.10, quiz_page), (0.02, true_or_false), (0.04, marked_page),
             (0.17, forum_page))
_SHARES = tuple(accumulate(share for share, _ in DOCUMENTS))
_WRITERS = tuple(writer for _, writer in DOCUMENTS)


def corpus(n_characters: int, seed: int) -> Iterator[str]:
    """Yield documents until they hold `n_characters` characters; a seed always gives the same ones.

    The documents come without a separator: pretraining puts <|endoftext|> in front of each. Keep
    their order: a verdict may be the document after the one it is about.
    Raises: ValueError if n_characters is under 1.
    """
    if n_characters < 1:
        raise ValueError(f"n_characters must be at least 1, found {n_characters}")
    rng = random.Random(seed)
    written = 0
    while written < n_characters:
        for document in rng.choices(_WRITERS, cum_weights=_SHARES)[0](rng):
            written += len(document)
            yield document
