"""Real dialogues through the rows of all three stages: only the last answer is ever an action."""

import pytest
import torch

from minirlhf import ppo, reward_model, sft
from minirlhf.data import ASSISTANT, HUMAN, read_records, response_mask

COUNT = 60                          # rows of the real file


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
        reward_model.RewardModelConfig(data=hh_file, comparisons=COUNT), gpt2_tokenizer, 10_000)
    cfg = ppo.PPOConfig(prompts=hh_file, prompt_count=COUNT, batch_size=8, minibatch_size=8)
    prompts = ppo.collect_prompts(cfg, gpt2_tokenizer, 10_000)
    assert [row.prompt for row in demonstrations] == [row.prompt for row in comparisons] == prompts
    assert [row.response for row in demonstrations] == [row.chosen for row in comparisons]


def test_chosen_and_rejected_of_a_real_comparison_part_only_after_the_prompt(hh_file,
                                                                           gpt2_tokenizer):
    rows = reward_model.collect(
        reward_model.RewardModelConfig(data=hh_file, comparisons=COUNT), gpt2_tokenizer, 10_000)
    for row in rows:
        prompt_lengths = torch.tensor([len(row.prompt)])
        for answer in (row.chosen, row.rejected):
            length = torch.tensor([len(row.prompt) + len(answer)])
            assert int(response_mask(prompt_lengths, length, int(length)).sum()) == len(answer)
        assert row.chosen != row.rejected
