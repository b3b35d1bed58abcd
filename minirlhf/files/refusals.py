"""Rows of shapes that are not read: what they look like, and the command that makes them ours.

Each conversion is an expression for `lines.convert`. Where a data set has scores in place of a
choice, the higher one is chosen and ties are left out.
"""

from minirlhf.files.disk import short
from minirlhf.files.lines import ROWS, convert

PROMPTS = ("prompt", "question", "query", "instruction", "problem", "input")
RESPONSES = ("response", "completion", "answer", "output", "solution", "target", "summary")

SCORED = ("({'prompt': PROMPT, 'chosen': high[1], 'rejected': low[1]} for row in ROWS "
          "for low, high in [sorted([(row['score_0'], row['answer_0']), "
          "(row['score_1'], row['answer_1'])])] if low[0] < high[0])")
# The keys by which a published set is known, its name, and its rows in our format.
KNOWN = [
    ({"question", "answer_0", "answer_1", "score_0", "score_1"}, "WebGPT's comparisons",
     SCORED.replace("PROMPT", "row['question']['full_text']")),
    ({"history", "human_ref_A", "human_ref_B", "labels"}, "SHP",
     "({'prompt': row['history'], 'chosen': row['human_ref_' + 'BA'[row['labels']]], "
     "'rejected': row['human_ref_' + 'AB'[row['labels']]]} for row in ROWS)"),
    ({"question", "response_j", "response_k"}, "Stack Exchange pairs",
     "({'prompt': row['question'], 'chosen': row['response_j'], 'rejected': row['response_k']} "
     "for row in ROWS)"),
    ({"instruction", "completions"}, "UltraFeedback's ratings",
     "({'prompt': row['instruction'], 'chosen': c[-1]['response'], 'rejected': c[0]['response']} "
     "for row in ROWS for c in [sorted(row['completions'], key=lambda c: c['overall_score'])] "
     "if c and c[0]['overall_score'] < c[-1]['overall_score'])"),
    ({"instruction", "context", "response"}, "Dolly",
     "({'prompt': row['instruction'] + '\\n\\n' + row['context'], 'response': row['response']} "
     "for row in ROWS)"),
    ({"conversations"}, "ShareGPT's conversations",
     "({'messages': [{'role': {'human': 'user', 'gpt': 'assistant'}.get(turn['from'], "
     "turn['from']), 'content': turn['value']} for turn in row['conversations']]} "
     "for row in ROWS)"),
    ({"prompt", "response_0", "response_1", "better_response_id"}, "PKU-SafeRLHF",
     "({'prompt': row['prompt'], 'chosen': row['response_' + str(row['better_response_id'])], "
     "'rejected': row['response_' + str(1 - row['better_response_id'])]} for row in ROWS)"),
    ({"prompt", "completion", "label"}, "answers that are called good or bad",
     "({'prompt': row['prompt'], 'response': row['completion']} for row in ROWS if row['label'])"),
    ({"conversation_a", "conversation_b", "winner"}, "Chatbot Arena",
     "({'chosen': row['conversation_' + row['winner'][-1]], "
     "'rejected': row['conversation_' + 'ba'[row['winner'] == 'model_b']]} "
     "for row in ROWS if row['winner'].startswith('model_'))")]


def is_table(row: dict) -> bool:
    """Whether a row is a whole table: each of several keys holds a column, as pandas writes it."""
    columns = [list(value.values()) if isinstance(value, dict) else value for value in row.values()]
    return len(row) > 1 and all(isinstance(column, list) and len(column) > 0
                                and all(isinstance(cell, str) for cell in column[:2])
                                for column in columns)


def suggest(row: dict) -> str:
    """What rows like this one seem to be and how to convert them, after "; "; "" if unknown."""
    for keys, name, rows in KNOWN:
        if keys <= set(row):
            return f"; this looks like {name}; {convert(rows.replace('ROWS', ROWS))}"
    key, value = next(iter(row.items()), ("", None))
    if len(row) == 1 and isinstance(value, list):
        rows = f"json.load(open('FILE', encoding='utf-8-sig'))[{key!r}]"
        return f"; this looks like all rows in one list; {convert(rows)}"
    if is_table(row):
        rows = ("(dict(zip(table, cells)) for table in [json.load(open('FILE', "
                "encoding='utf-8-sig'))] for cells in zip(*[column.values() if isinstance(column, "
                "dict) else column for column in table.values()]))")
        return f"; this looks like a table by columns; {convert(rows)}"
    if set(row) <= {"text", "meta"} and row:
        return "; python -m minirlhf.pretrain learns from text without prompt and response"
    return suggest_names(row)


def suggest_names(row: dict) -> str:
    """A conversion by the names of the keys: `question` and `answer` are prompt and response."""
    texts = [key for key in row if isinstance(row[key], str)]
    pairs = [("prompt", key) for key in PROMPTS if key in texts][:1]
    if "chosen" in texts and "rejected" in texts:
        pairs += [("chosen", "chosen"), ("rejected", "rejected")]
    else:
        pairs += [("response", key) for key in RESPONSES if key in texts][:1]
    if len(pairs) < 2 or pairs[0][0] != "prompt":
        return ""
    fields = ", ".join(f"{name!r}: row[{key!r}]" for name, key in pairs)
    found = ", ".join(name if name == key else f"{name} ({short(key)})" for name, key in pairs)
    return f"; to use {found} alone, {convert(f'({{{fields}}} for row in {ROWS})')}"
