"""The gold judge: a program that reads a prompt and a response and says how good the response is.

It stands for the person whose taste the reward model tries to learn. Because it is a program, the
lecture's claims can be measured: whether RLHF wins, when the policy starts to fool its reward
model, and by how much. The score is a sum of named parts, at most 3.5:

    correct     +2 right, -1 wrong or no answer, 0 both right and wrong; recipes and lists:
                2 x (right items / needed) less 0.5 for each wrong, surplus or doubled item,
                never under -1, and -1 if nothing is right
    sentence    +0.5 if a full sentence names what was asked about and gives a right answer
    ending      +0.5 if the response ended by itself on . ! or ?, else -0.5
    courtesy    +0.5 if it answered and its last sentence is one of the six closers;
                -0.5 for each further closer
    brevity     -0.05 for each word past 18
    filler      -0.4 for each sentence (at most 4) that is neither an answer nor a closer
    hedge       -0.5 if it doubts itself
    rude        -0.7 if it is rude
    repetition  -0.5 for each repeated sentence, doubled word or mark, or three words said twice
                in one sentence (at most 4)

An evasive response costs as much as a wrong one, or more: were it cheaper, the policy would learn
never to answer.
"""
import re
from collections.abc import Iterable
from dataclasses import dataclass

from minirlhf.world.facts import (
    BY_FAMILY,
    CLOSERS,
    ENTITIES,
    FAMILIES,
    HEDGES,
    OPENERS,
    RUDE,
    Entity,
)

WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
SENTENCE = re.compile(r"[^.!?\n]*\w[^.!?\n]*[.!?]?")
DOUBLED_MARK = re.compile(r"(?:[^\w\s]|_)\s*(?=[^\w\s]|_)")

# a full sentence has one of these between what was asked about and the answer
VERBS = {
    "capital": {"is"}, "recipe": {"use", "need", "take", "mix"}, "explain": {"is", "are", "means"},
    "sum": {"is", "are", "makes", "equals"}, "opposite": {"is"}, "color": {"is", "are"},
    "home": {"lives", "live", "is"}, "list": {"are", "include"},
}


@dataclass(frozen=True)
class Judgement:
    """What the judge says: the score, its parts, and two facts for statistics."""
    score: float
    parts: dict          # name -> points, in the order of the table above
    answered: bool       # something of the right kind was said, right or wrong
    right: bool          # fully right: everything needed and nothing wrong


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation: "It is Paris!" -> ["it", "is", "paris"]."""
    return WORD.findall(text.lower())


def _plain(sentence: str) -> str:
    """A sentence as the comparison of sentences sees it: lower case, no punctuation."""
    return " ".join(words_of(sentence))


def _phrases(texts: Iterable[str]) -> re.Pattern:
    """A pattern that finds any of these phrases as whole words, the longest first."""
    ordered = sorted({_plain(text) for text in texts}, key=len, reverse=True)
    return re.compile(r"\b(?:" + "|".join(ordered) + r")\b")


CLOSER_TEXTS = frozenset(_plain(closer) for closer in CLOSERS)
HEDGE_TEXTS = _phrases([*HEDGES, "maybe", "perhaps", "probably", "I think", "I guess"])
RUDE_TEXTS = _phrases([*RUDE, "silly", "stupid"])

# what counts as an answer, right or wrong, in each family; for sums every number does
ITEMS = {family: _phrases(item for entity in BY_FAMILY[family] for item in entity.items)
         for family in FAMILIES}
ITEMS["sum"] = re.compile(r"\b\d+\b")


def _asked(entity: Entity) -> re.Pattern:
    """A pattern of words that only repeat the question, taken out first: "hot", "3 plus 4"."""
    if entity.family == "sum":
        a, b = entity.name.split(" plus ")
        return _phrases(f"{x} {sign}{y}" for x, y in ((a, b), (b, a))
                        for sign in ("plus ", "and ", ""))
    return _phrases([entity.name, entity.subject])


ASKED = {entity: _asked(entity) for entity in ENTITIES}
RIGHT = {entity: frozenset(_plain(item) for item in entity.items) for entity in ENTITIES}


def _key(prompt: str) -> str:
    """A prompt without what may differ: template, case, spaces, the last mark."""
    text = prompt.strip()
    if text.startswith("Prompt:"):
        text = text.removeprefix("Prompt:").removesuffix("Response:")
    return " ".join(text.lower().split()).rstrip(".?!")


ENTITY_OF = {_key(question): entity for entity in ENTITIES for question in entity.questions}
ENTITY_OF.update({_key(f"{opener} {question}"): entity
                  for opener in OPENERS for entity in ENTITIES for question in entity.questions})


def find_entity(prompt: str) -> Entity:
    """The entity that a prompt asks about. Raises ValueError for a prompt outside the world.

    Example: find_entity("Hello! What is the capital of France?").name == "France"
    """
    entity = ENTITY_OF.get(_key(prompt))
    if entity is None:
        raise ValueError("the gold judge knows only the prompts of the text world, found "
                         f"{prompt!r}; for other prompts use another judge (ppo --gold \"\", "
                         "evaluate --judge)")
    return entity


def find_items(entity: Entity, text: str) -> list[str]:
    """All items of the entity's family in a text, right or wrong, in order, doubled ones too.

    Example: for "hot", "The opposite of hot is cold." -> ["cold"]: the asked word doesn't count.
    """
    without_question = ASKED[entity].sub("_", _plain(text))
    return ITEMS[entity.family].findall(without_question)


def _correct(entity: Entity, found: list[str]) -> float:
    """Points for the answer itself, from the items found."""
    right = RIGHT[entity].intersection(found)
    if not right:
        return -1.0
    if entity.needed == 1:
        return 2.0 if right.issuperset(found) else 0.0
    counted = min(len(right), entity.needed)
    return max(-1.0, 2.0 * counted / entity.needed - 0.5 * (len(found) - counted))


def _is_full_sentence(entity: Entity, sentence: str) -> bool:
    """Whether a sentence begins and ends as one, and has subject, verb and a right answer in it."""
    if not re.match(r"[A-Z0-9]", sentence) or sentence[-1] not in ".!?":
        return False
    text = f" {_plain(sentence)} "
    for name in (entity.subject, " and ".join(entity.subject.split(" plus "))):
        subject = text.find(f" {name.lower()} ")
        if subject < 0:
            continue
        for item in RIGHT[entity]:
            for answer in re.finditer(rf" {item}(?= )", text):
                if answer.start() < subject:
                    between = text[answer.end():subject]
                else:
                    between = text[subject + len(name) + 1:answer.start()]
                if VERBS[entity.family].intersection(between.split()):
                    return True
    return False


def _repetitions(response: str, sentences: list[str]) -> int:
    """How often a sentence, a word, three words of a sentence, or a punctuation mark come twice."""
    count = len(DOUBLED_MARK.findall(response)) + (response[:1] in (".", ",", "!", "?"))
    plain = [_plain(sentence) for sentence in sentences]
    count += len(plain) - len(set(plain))
    for sentence in plain:
        spoken = sentence.split()
        count += sum(first == second for first, second in zip(spoken, spoken[1:]))
        threes = list(zip(spoken, spoken[1:], spoken[2:]))
        count += len(threes) - len(set(threes))
    return count


def judge(prompt: str, response: str, ended: bool = True) -> Judgement:
    """Score one response to one prompt of the text world.

    prompt: a plain question or one in the template "Prompt: ...\\nResponse:"; response: plain text;
    ended: whether the model chose to stop (False when it was cut off). The same arguments always
    give the same judgement.

    Example: to "What is the capital of France?", "The capital of France is Paris. Enjoy!" scores
    3.5 (right 2, full sentence 0.5, ended 0.5, one closer 0.5), "Rome." -0.5 (wrong -1, ended 0.5).
    Raises: ValueError for a prompt outside the world.
    """
    entity = find_entity(prompt)
    response = response.strip()
    sentences = [sentence.strip() for sentence in SENTENCE.findall(response)]
    is_closer = [_plain(sentence) in CLOSER_TEXTS for sentence in sentences]

    found, fillers = [], 0
    for sentence, closer in zip(sentences, is_closer):
        # careful: "Happy to help!" holds the opposite of "sad"
        items = [] if closer else find_items(entity, sentence)
        says_something_new = not set(items).issubset(found)
        fillers += not says_something_new and not closer
        found += items
    correct = _correct(entity, found)

    text = _plain(response)
    full = any(_is_full_sentence(entity, sentence) for sentence in sentences)
    courteous = bool(found) and is_closer[-1]
    further_closers = max(0, sum(is_closer) - 1)
    parts = {
        "correct": correct,
        "sentence": 0.5 if full else 0.0,
        "ending": 0.5 if ended and response.endswith((".", "!", "?")) else -0.5,
        "courtesy": (0.5 if courteous else 0.0) - 0.5 * further_closers,
        "brevity": 0.0 - 0.05 * max(0, len(text.split()) - 18),
        "filler": 0.0 - 0.4 * min(4, fillers),
        "hedge": -0.5 if HEDGE_TEXTS.search(text) else 0.0,
        "rude": -0.7 if RUDE_TEXTS.search(text) else 0.0,
        "repetition": 0.0 - 0.5 * min(4, _repetitions(response, sentences)),
    }
    return Judgement(round(sum(parts.values()), 6), parts, bool(found), correct == 2.0)


def judge_by_token(prompt: str, prefixes: list[str], ended: bool = True) -> list[float]:
    """The gold score of a response, paid to the tokens that earn it.

    prefixes: the response up to and with each of its tokens, so that the last one is all of it. A
    token gets what it changes in the part `correct`: a fact is paid where it is stated, a wrong one
    costs where it is stated. The last token gets the rest, and the sum is the score of `judge`.
    careful: half a word may count for a moment: what "1" costs, "12" gives back.

    Example: to "What is the capital of France?" the prefixes "The capital of France is", "The
    capital of France is Paris" and "The capital of France is Paris." get 0, 3 and 0: from -1, no
    answer, to 2; at the end 0.5 for the sentence and 0.5 for its ending make good that -1.
    """
    correct = [judge(prompt, prefix).parts["correct"] for prefix in ["", *prefixes]]
    points = [after - before for before, after in zip(correct, correct[1:])]
    whole = judge(prompt, prefixes[-1], ended).score
    points[-1] += whole - sum(points)
    return points
