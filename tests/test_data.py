"""From text to rows of ids: template, padding, masks, records, and real dialogues in all stages."""

import json
import random

import pytest
import torch

from minirlhf import data, ppo, reward_model, sft
from minirlhf.data import (
    encode_prompt,
    encode_response,
    fit_rows,
    format_prompt,
    pad,
    read_prompts,
    read_records,
    response_mask,
)
from minirlhf.files.formats import ASSISTANT, HUMAN, trim

# ---- templates and rows --------------------------------------------------------------------------

def test_the_template_strips_and_refuses_an_empty_prompt():
    assert format_prompt(" Hi? ") == "Prompt: Hi?\nResponse:"
    assert format_prompt("{prompt}") == "Prompt: {prompt}\nResponse:"
    with pytest.raises(ValueError, match="empty"):
        format_prompt(" \n")


def test_a_sequence_is_end_token_prompt_space_response_end_token(tiny_tokenizer):
    end = tiny_tokenizer.end_token
    prompt = encode_prompt(tiny_tokenizer, format_prompt("Hi?"))
    response = encode_response(tiny_tokenizer, " Paris.\n")
    assert (prompt[0], response[-1]) == (end, end)
    whole = tiny_tokenizer.encode("Prompt: Hi?\nResponse: Paris.")
    assert prompt[1:] + response[:-1] == whole


def test_prompt_and_response_tokenized_apart_equal_the_whole(tiny_tokenizer):
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choice("ab1.,'?\n é") for _ in range(rng.randrange(1, 12)))
        if text.strip():
            template = format_prompt(text)
            apart = encode_prompt(tiny_tokenizer, template) + encode_response(tiny_tokenizer, text)
            whole = tiny_tokenizer.encode(template + " " + trim(text))
            assert apart[1:-1] == whole


def test_rows_that_are_too_long_are_dropped_and_counted():
    assert fit_rows([[1, 2], [1, 2, 3]], 2) == ([[1, 2]], 1)
    assert fit_rows([], 2) == ([], 0)


# ---- padding and masks ---------------------------------------------------------------------------

def test_padding_follows_the_worked_example():
    ids, lengths = pad([[5, 6], [7]], 0)
    assert ids.tolist() == [[5, 6], [7, 0]] and lengths.tolist() == [2, 1]
    assert ids.dtype == lengths.dtype == torch.long
    for rows in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            pad(rows, 0)


def test_the_mask_follows_the_worked_example():
    mask = response_mask(torch.tensor([2]), torch.tensor([5]), 6)
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [[0, 1, 1, 1, 0]]


def test_the_end_token_that_the_policy_chose_is_in_the_mask_and_its_padding_twin_is_not():
    end = 9
    ids, lengths = pad([[end, 1, 2, end], [end, 1, 3, 4, 5]], end)
    mask = response_mask(torch.tensor([2, 2]), lengths, ids.shape[1])
    actions = ids[:, 1:]
    assert actions[0][mask[0]].tolist() == [2, end]          # the padding is an end token too
    assert actions[1][mask[1]].tolist() == [3, 4, 5]


def test_the_mask_equals_a_slow_reference_on_random_lengths():
    rng = random.Random(2)
    for _ in range(300):
        width = rng.randrange(1, 9)
        lengths = [rng.randrange(1, width + 1) for _ in range(rng.randrange(1, 5))]
        prompt_lengths = [rng.randrange(1, length + 1) for length in lengths]
        mask = response_mask(torch.tensor(prompt_lengths), torch.tensor(lengths), width)
        assert mask.shape == (len(lengths), width - 1)
        for row in range(len(lengths)):
            for column in range(width - 1):
                action_is_response = prompt_lengths[row] <= column + 1 < lengths[row]
                assert mask[row, column].item() == action_is_response


def test_lengths_that_cannot_be_are_refused():
    for prompt_length, length, width in ((0, 3, 4), (4, 3, 5), (2, 6, 5)):
        with pytest.raises(ValueError, match="prompt length"):
            response_mask(torch.tensor([prompt_length]), torch.tensor([length]), width)


# ---- prompts for a policy ------------------------------------------------------------------------

def test_prompts_that_leave_no_room_are_left_out_and_too_few_are_refused(tiny_tokenizer, tmp_path,
                                                                       capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Hi?"}\n{"prompt": "%s", "kind": "long"}\n{"prompt": "Oh", '
                    '"kind": "short"}\n' % ("a " * 50), encoding="utf-8")
    first = encode_prompt(tiny_tokenizer, format_prompt("Hi?"))
    context = len(first) + 4
    prompts, too_long = read_prompts(str(path), tiny_tokenizer, context, 4, count=0, seed=0)
    assert (prompts[0].ids, len(prompts[0]), prompts[0].kind) == (first, len(first), "")
    assert [prompt.text for prompt in prompts] == [format_prompt("Hi?"), format_prompt("Oh")]
    assert (prompts[1].kind, too_long) == ("short", 1)
    assert "2 prompts (1 that leave no room for 4 new tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="2 prompts that leave room .*, expected at least 3"):
        read_prompts(str(path), tiny_tokenizer, context, 4, count=0, seed=0, fewest=3)
    with pytest.raises(ValueError, match="0 prompts that leave room"):
        read_prompts(str(path), tiny_tokenizer, context, context, count=0, seed=0)


# ---- what a file holds ---------------------------------------------------------------------------

def test_the_label_table_marks_the_response_and_its_end_token(tiny_tokenizer):
    prompt = encode_prompt(tiny_tokenizer, format_prompt("Hi?"))
    table = data.label_table(tiny_tokenizer, prompt, encode_response(tiny_tokenizer, "is"))
    marked = [line.split("  ")[-1] for line in table.split("\n") if " yes " in line]
    assert marked == ["' is'", "'<|endoftext|>'"]


def test_the_command_shows_counts_drops_lengths_and_labels(tmp_path, tiny_tokenizer, capsys):
    tiny_tokenizer.save(str(tmp_path / "tokenizer"))
    start = f"{HUMAN} a{ASSISTANT}"
    rows = [{"chosen": start + " d", "rejected": start + " e"},
            {"chosen": start + " d", "rejected": start + " d"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cfg = data.DataConfig(data=str(path), kind="all", tokenizer=str(tmp_path / "tokenizer"), show=1)
    records = data.main(cfg)
    out = capsys.readouterr().out
    assert len(records) == 1
    for text in ("dropped 1 with two equal responses", "1 rows", "tokens in prompt: shortest",
                 "tokens in rejected: shortest 3, median 3", "chosen:\nposition"):
        assert text in out
    for name, wrong in (("kind", "pairs"), ("show", -1)):
        with pytest.raises(ValueError, match=f"--{name} is {wrong!r}, expected"):
            data.DataConfig(**{name: wrong})


# ---- dialogues in all three stages ---------------------------------------------------------------

COUNT = 60                          # rows of the real file


def test_only_the_last_answer_of_a_dialogue_is_an_action(tiny_tokenizer):
    prompt = encode_prompt(tiny_tokenizer, f"{HUMAN} a{ASSISTANT} b{HUMAN} c{ASSISTANT}")
    response = encode_response(tiny_tokenizer, " d")
    ids, lengths = pad([prompt + response], tiny_tokenizer.end_token)
    mask = response_mask(torch.tensor([len(prompt)]), lengths, ids.shape[1])
    actions = ids[:, 1:][mask].tolist()
    assert tiny_tokenizer.decode(actions, skip_end=False) == " d<|endoftext|>"


@pytest.fixture
def hh_file(shared_data) -> str:
    return str(shared_data / "hh-harmless-base-test.jsonl.gz")


def test_the_loss_sees_the_last_answer_of_real_dialogues_and_nothing_else(hh_file, gpt2_tokenizer):
    records = read_records(hh_file, "demonstrations", count=COUNT)
    turns = [record["prompt"].count(ASSISTANT) for record in records]
    assert max(turns) > 2                                # there are dialogues of several turns
    rows = sft.collect(sft.SFTConfig(data=hh_file, examples=COUNT, held_out=1), "", gpt2_tokenizer,
                       10_000)
    ids, mask = sft.make_batch(rows, gpt2_tokenizer.end_token)
    for row, record in enumerate(records):
        actions = ids[row, 1:][mask[row]].tolist()
        assert actions[-1] == gpt2_tokenizer.end_token
        assert gpt2_tokenizer.decode(actions) == " " + record["response"].strip()
        states = ids[row, :len(rows[row].prompt)].tolist()
        assert gpt2_tokenizer.decode(states) == record["prompt"]
        assert record["prompt"].startswith(HUMAN) and record["prompt"].endswith(ASSISTANT)
        assert HUMAN not in gpt2_tokenizer.decode(actions)


def test_all_stages_tokenize_a_real_prompt_alike(hh_file, gpt2_tokenizer):
    demonstrations = sft.collect(sft.SFTConfig(data=hh_file, examples=COUNT, held_out=1), "",
                                 gpt2_tokenizer, 10_000)
    comparisons = reward_model.collect(
        reward_model.RewardModelConfig(data=hh_file, comparisons=COUNT), "", gpt2_tokenizer,
        10_000)
    cfg = ppo.PPOConfig(prompts=hh_file, prompt_count=COUNT, batch_size=8, minibatch_size=8)
    prompts, too_long = read_prompts(cfg.prompts, gpt2_tokenizer, 10_000, cfg.max_new_tokens,
                                     count=cfg.prompt_count, seed=cfg.seed)
    ids = [prompt.ids for prompt in prompts]
    assert [row.prompt for row in demonstrations] == [row.prompt for row in comparisons] == ids
    assert too_long == 0
    assert [row.response for row in demonstrations] == [row.chosen for row in comparisons]


def test_both_answers_of_a_real_comparison_follow_the_same_prompt(hh_file, gpt2_tokenizer):
    records = read_records(hh_file, "comparisons", count=COUNT)
    rows = reward_model.collect(
        reward_model.RewardModelConfig(data=hh_file, comparisons=COUNT), "", gpt2_tokenizer,
        10_000)
    assert len(rows) == len(records)
    for row, record in zip(rows, records):
        for answer, text in ((row.chosen, record["chosen"]), (row.rejected, record["rejected"])):
            whole = gpt2_tokenizer.decode(row.prompt + answer)
            assert whole == record["prompt"] + " " + text.strip()
            assert answer[-1] == gpt2_tokenizer.end_token
        assert row.chosen != row.rejected
