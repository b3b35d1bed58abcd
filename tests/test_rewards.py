"""rewards.py: reward models that vote, functions of users, the gold judge, the KL coefficient."""

import os
from typing import get_type_hints

import pytest
import torch
from helpers import (
    ppo_config,
    quietly,
    random_reward_folder,
    share_of_red,
    toy_tokenizer,
)
from rollouts import fresh_rollout

from minirlhf import ppo
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import ScalarModel
from minirlhf.rewards import (
    Ensemble,
    ModelReward,
    adapt_kl_coef,
    is_function,
    load_gold,
    load_reward,
    try_once,
)

END = toy_tokenizer().end_token


# ---- reward models -------------------------------------------------------------------------------

def test_ensembles_take_the_mean_the_minimum_or_the_mean_less_the_variance(tmp_path):
    folders = [random_reward_folder(str(tmp_path / str(seed)), seed) for seed in range(3)]
    ids, lengths = torch.randint(END, (5, 8)), torch.tensor([8, 3, 5, 8, 4])
    with torch.no_grad():
        votes = torch.stack([load_network(ScalarModel, folder).score(ids, lengths)
                             for folder in folders])                                # (3, 5)
        doubt = ((votes - votes.mean(dim=0)) ** 2).mean(dim=0)                      # (5,)
        for how, expected in (("mean", votes.mean(dim=0)), ("min", votes.amin(dim=0)),
                              ("uwo", votes.mean(dim=0) - 0.5 * doubt)):
            reward = load_reward(",".join(folders), how, toy_tokenizer())
            torch.testing.assert_close(reward(ids, None, lengths, toy_tokenizer()), expected)


class Vote:
    """Stands for a reward model that says the same of every response."""

    def __init__(self, vote: float):
        self.vote = vote

    def score(self, ids, lengths) -> torch.Tensor:
        return torch.full((len(ids),), self.vote)


@pytest.mark.parametrize("how, score", [("mean", 2.0), ("min", 1.0), ("uwo", 1.5)])
def test_votes_of_1_and_3_by_hand(how, score):
    reward = ModelReward.__new__(ModelReward)            # without the fingerprint of networks
    reward.models, reward.how = [Vote(1.0), Vote(3.0)], how
    ids, lengths = torch.zeros(2, 3, dtype=torch.long), torch.tensor([3, 3])
    assert reward(ids, None, lengths, None).tolist() == [score, score]


def test_a_reward_model_with_another_tokenizer_is_refused(tmp_path, tiny_tokenizer):
    folder = random_reward_folder(str(tmp_path), 0)
    with pytest.raises(ValueError, match="tokenizer is not the policy's"):
        load_reward(folder, "mean", tiny_tokenizer)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_folder_with_a_colon_in_its_name_is_no_function(tmp_path):
    assert is_function("helpers:share_of_red") and not is_function("checkpoints/reward_model")
    folder = random_reward_folder(str(tmp_path / "rm:2"), 0)
    assert not is_function(folder) and not is_function(f"{folder},{folder}")
    assert len(load_reward(f"{folder},{folder}", "mean", toy_tokenizer()).models) == 2


# ---- functions -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, returned", [("column_reward", r"\(8, 1\)"),
                                            ("list_reward", "list")])
def test_a_reward_function_must_return_one_score_per_response(name, returned):
    words = rf"helpers:{name} returned {returned}, .* shape \(8,\): one score per response"
    with pytest.raises(ValueError, match=words):
        fresh_rollout(ppo_config(reward=f"helpers:{name}"))


def count_of_tokens(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    """A rule that counts: whole numbers."""
    return lengths - prompt_lengths


def test_whole_numbers_are_scores_too():
    cfg = ppo_config(reward="test_rewards:count_of_tokens", missing_end_penalty=0.0)
    _, _, batch = fresh_rollout(cfg)
    assert batch.scores.dtype == torch.float32
    assert torch.equal(batch.scores, (batch.lengths - batch.prompt_lengths).float())


products: list[torch.Tensor] = []


def computing_reward(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    """A rule of a user that multiplies matrices itself."""
    products.append(torch.full((1, 1), 1 / 3) @ torch.ones(1, 1))
    return share_of_red(ids, prompt_lengths, lengths, tokenizer)


def test_functions_of_users_compute_in_float32_in_a_bfloat16_run(tmp_path):
    products.clear()
    quietly(ppo.main, ppo_config(reward="test_rewards:computing_reward", out=str(tmp_path),
                                 gold="test_rewards:computing_reward", dtype="bfloat16"))
    assert len(products) >= 2 * 2                        # in two iterations, by two names
    for product in products:
        assert product.dtype == torch.float32 and product.item() == torch.tensor(1 / 3).item()


def refuses_all(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    raise ValueError(f"{ids.tolist()} with {prompt_lengths.tolist()} and {lengths.tolist()}")


def test_a_function_of_a_user_may_refuse_a_prompt_before_anything_is_computed(tmp_path):
    assert load_gold("") is None
    gold = load_gold("helpers:share_of_red")
    ids, prompt_lengths = torch.tensor([[END, 5, 6, 7]]), torch.tensor([2])
    assert gold(ids, prompt_lengths, torch.tensor([4]), toy_tokenizer()).tolist() == [0.0]
    models = load_reward(random_reward_folder(str(tmp_path), 0), "mean", toy_tokenizer())
    try_once([END, 5], toy_tokenizer(), models, gold, None)
    with pytest.raises(ValueError, match=rf"\[\[{END}, 5, {END}\]\] with \[2\] and \[3\]"):
        try_once([END, 5], toy_tokenizer(), gold, load_gold("test_rewards:refuses_all"))


# ---- the KL coefficient --------------------------------------------------------------------------

def test_adapt_kl_coef_hand_example_and_limits():
    assert adapt_kl_coef(0.1, 9, 6, 64, 10_000) == pytest.approx(0.100128)
    assert adapt_kl_coef(0.1, 6, 6, 64, 10_000) == 0.1
    assert adapt_kl_coef(0.1, 6.6, 6, 100, 1000) == pytest.approx(0.1 * 1.01)
    assert adapt_kl_coef(0.1, 0, 6, 100, 1000) == pytest.approx(0.1 * 0.98)
    assert adapt_kl_coef(0.1, 0.0, 6, 8, 8) > 0           # the shortest horizon that is allowed


def test_ppo_knows_the_votes_that_reward_models_have():
    # its file spells them out, so that its imports stay short
    assert get_type_hints(ppo.PPOConfig)["ensemble"] == Ensemble
