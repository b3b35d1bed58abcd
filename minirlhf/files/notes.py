"""What was read of a data file and what not, and what in its texts deserves a word to the user.

Nothing here refuses a row. Counted and printed are: rows that were dropped or not read; prompts
that have a template already, and so get a second one; answers that begin with their prompt again;
end texts, spelled out; other models' marks; margins, which no loss of ours uses.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from minirlhf.files.disk import short

END_TEXT = "<|endoftext|>"          # GPT-2's end token as other programs spell it out
ANSWERS = ("response", "chosen", "rejected")

# Other models' marks of turns and ends, as `<|im_start|>`, `[INST]`, `</s>`, `### Response:`.
MARKS = re.compile(r"<[|\uff5c](?!endoftext\|>)[\w \u2581]{2,40}[|\uff5c]>|\[/?INST\]|<</?SYS>>"
                   r"|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos)>"
                   r"|^#{2,4} ?(?:Instruction|Response|Human|Assistant|Input|Output)\b", re.M)
# The name of whoever is to answer, at the end of a prompt: `Response:`, `TL;DR:`, `A:`.
CALL = re.compile(r"(?:^|\n)\W*((?i:response|assistant|answer|ai|bot|model|output|completion"
                  r"|summary|tl;?dr)|A|GPT)\s?:\W*$"
                  r"|\b(Assistant|ASSISTANT|Response|TL;?DR)\s?:\W*$")
START = re.compile(r"\W*((?:Prompt|Human|User|USER|Instruction|SUBREDDIT)\s?:"
                   r"|Below is an instruction that describes a task)")
TURN = re.compile(r"\n[ \t#*>-]{0,8}((?i:human|assistant|user)\s?:)")
NAME = re.compile(r"\W*((?:Response|Assistant|ASSISTANT|AI|Bot|Answer)\s?:)")    # of an answer


def find_template(prompt: str) -> str:
    """How a plain prompt shows that it has a template already; "" if it does not.

    Example: find_template("Q: Why?\\nA:") == "end in 'A:'", find_template("Why?") == "".
    """
    mark, call = MARKS.search(prompt), CALL.search(prompt[-60:])
    start, turn = START.match(prompt), TURN.search(prompt)
    if mark:
        return f"hold {short(mark.group())}"
    if call:
        return f"end in {short((call.group(1) or call.group(2)) + ':')}"
    if start:
        return f"begin with {short(start.group(1))}"
    return f"hold turns such as {short(turn.group(1))}" if turn else ""


def repeats(prompt: str, answer: str) -> bool:
    """Whether an answer begins with its prompt, of three words at least, again."""
    prompt = prompt.strip()
    return answer.lstrip().startswith(prompt) and len(prompt.split()) >= 3


@dataclass
class Tally:
    """What a reader did with its rows; `report` says it."""
    shape: str = "our own"              # in which shape the rows are
    plain: bool = True                  # their prompts are to get our template
    full: bool = False                  # no other row is wanted
    unused: list[str] = field(default_factory=list)     # keys of the first row that are not read
    read: int = 0                       # rows that were looked at
    used: int = 0                       # of these, rows that came back as records
    total: int = 0                      # rows of the file, as far as they could be counted
    more: bool = False                  # and there are others
    dropped: Counter = field(default_factory=Counter)   # reason -> rows
    notes: Counter = field(default_factory=Counter)     # (kind of note, what was found) -> rows

    def note(self, kind: str, what: str = "") -> None:
        """Count one row or text of which there is something to say."""
        self.notes[kind, what] += 1

    def look(self, record: dict) -> None:
        """Note what is odd in a record whose prompt is not yet in our template."""
        prompt, texts = record["prompt"], [record[key] for key in ANSWERS if key in record]
        template = find_template(prompt.strip()) if self.plain else ""
        if template:
            self.note("template", template)
        if any(repeats(prompt, text) for text in texts):
            self.note("repeated")
        for kind, part in (("end in prompt", [prompt]), ("end inside", texts)):
            if any(END_TEXT in text for text in part):
                self.note(kind)
        odd = [found for text in texts for found in (MARKS.search(text), NAME.match(text)) if found]
        if odd:
            self.note("mark", short(odd[0].group().strip()))
        if "margin" in record:
            self.note("margin")

    def list_dropped(self) -> str:
        """How many rows were dropped for which reason."""
        return ", ".join(f"{number} with {reason}" for reason, number in self.dropped.items())

    def describe_shape(self) -> str:
        """In which shape the rows are, and what of them is not read."""
        keys = ", ".join([short(key) for key in self.unused[:8]] + ["..."] * (len(self.unused) > 8))
        return f"shape: {self.shape}" + (f"; not read: {keys}" if keys else "")

    def report(self, source: str, kind: str) -> list[str]:
        """One line for each thing to say about rows that were read as `kind`."""
        lines = []
        if self.total > self.read or self.more:
            lines.append(f"{self.read} of {'more than ' * self.more}{self.total} rows read: "
                         f"{BOUNDS[kind]} {self.used}; 0 reads all")
        if self.dropped:
            lines.append(f"{self.used} rows read, dropped {self.list_dropped()}")
        for kind, advice in ADVICE.items():
            found = [(number, what) for (name, what), number in self.notes.items() if name == kind]
            counts = [f"{number} of {self.used}" for number, _ in found]
            if found:
                parts = [f"{count} {advice[0]}{' ' * bool(what)}{what}"
                         for count, (_, what) in zip(counts[:4], found)]
                others = sum(number for number, _ in found[4:])
                parts += [f"{others} others alike"] if others else []
                lines.append(f"{', '.join(parts)}{advice[1]}")
        return [f"{source}: {line}" for line in lines]


# The trainers' options that bound how many rows of each kind are read.
BOUNDS = {"demonstrations": "--examples", "comparisons": "--comparisons",
          "prompts": "--prompt_count", "all": "--prompt_count"}
# Each kind of note: what follows the count, and what follows what was found.
ADVICE = {
    "template": ("prompts", ": they look templated already, and our template is put around them; "
                 "give plain prompts, or the Human and Assistant turns of HH-RLHF"),
    "cut": ("rows had the prompt again at the beginning of an answer", ": it was cut off"),
    "repeated": ("rows have an answer that begins with its prompt again",
                 ": the model learns to repeat it; cut it off"),
    "ended": (f"rows had {END_TEXT!r} spelled out at the end of an answer",
              ": it was taken off, as every response gets the real end token"),
    "end inside": (f"rows have {END_TEXT!r} inside an answer",
                   ": it is read as letters and does not end anything"),
    "end in prompt": (f"prompts hold {END_TEXT!r}", ": it is read as letters; set turns apart by "
                      "words, as HH-RLHF does"),
    "mark": ("rows have an answer with", ": it is read as letters, which the model learns to "
             "write"),
    "margin": ("rows have a margin", ": it is not used, every comparison counts alike")}


# ---- as the command prints it --------------------------------------------------------------------

def describe_lengths(name: str, counts: Counter) -> str:
    """One line with quantiles of the rows' lengths in tokens; counts: length -> rows."""
    lengths = sorted(counts.elements())
    shares = {"shortest": 0, "median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1}
    parts = [f"{label} {lengths[int(share * (len(lengths) - 1))]}"
             for label, share in shares.items()]
    return f"tokens in {name}: {', '.join(parts)}"


def shorten(text: str) -> str:
    """A text as Python writes it, on one line of bounded length."""
    text = repr(text)
    return text if len(text) <= 2000 else f"{text[:1000]} ... {text[-1000:]}"
