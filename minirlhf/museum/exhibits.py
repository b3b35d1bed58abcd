"""The labels of the museum: each classic mistake, where it was seen, and what catches it.

`EXHIBITS` are mistakes that sit in one function, so that they can be switched on by putting a wrong
twin in its place. `GUARDED` are those that do not; a named test stands guard against each.
Lecture: lectures/06-what-goes-wrong.md, "Bugs that run".
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from minirlhf import generate, gpt2, ppo, ppo_report, sft
from minirlhf.engine import training
from minirlhf.museum import mistakes
from minirlhf.siblings import groups


@dataclass(frozen=True)
class Exhibit:
    """One mistake that can be switched on."""
    name: str
    seen: str                           # where it was found in published code
    places: tuple                       # (owner, name) where the right function is looked up
    wrong: Callable                     # its twin in mistakes.py, whose docstring is the mistake
    stage: str                          # the trainer in which the effect is measured
    test: str                           # file::function in tests/ that fails while it is on
    stops: str = ""                     # the check of the trainer that stops the run, if one does
    options: dict = field(default_factory=dict)     # of the run that shows the effect

    def replacements(self) -> list[tuple]:
        """What `substituted` needs to switch the mistake on."""
        return [(owner, name, self.wrong) for owner, name in self.places]


EXHIBITS = [
    Exhibit("temperature", "the seed lecture; trl pull request 3029; OpenRLHF pull request 853",
            ((generate, "next_logprobs"),), mistakes.next_logprobs, "ppo",
            "test_generate.py::test_log_probabilities_of_the_sampling_equal_those_of_a_full_forward"
            "_pass", "check_rollout"),
    Exhibit("dropout", "the seed lecture; reef pull request 536; trl issue 3500",
            ((gpt2.MLP, "forward"),), mistakes.mlp_forward, "ppo",
            "test_museum.py::test_a_run_keeps_its_invariants", "check_first_ratio"),
    Exhibit("pad_mask", "rlhf-book; minChatGPT; mlabonne/llm-course issue 33",
            ((sft, "make_batch"),), mistakes.make_batch_with_pad_mask, "sft",
            "test_sft.py::test_the_end_token_gets_gradient_and_prompt_and_padding_get_none"),
    Exhibit("late_score", "summarize_from_feedback_details; trl issue 3750",
            ((ppo, "shaped_rewards"),), mistakes.score_one_too_late, "ppo",
            "test_ppo.py::test_the_score_is_exactly_at_the_last_action", "check_rollout"),
    Exhibit("early_whitening", "RLHF_in_notebooks",
            ((ppo, "gae"),), mistakes.gae_whitened_too_early, "ppo",
            "test_ppo.py::test_gae_hand_example"),
    Exhibit("mean_added_back", "RLHF_in_notebooks",
            ((training, "whiten"), (ppo, "whiten")), mistakes.whiten_and_add_the_mean, "ppo",
            "test_training.py::test_whiten_of_the_docstring"),
    Exhibit("negated_kl", "rlhf-book; minChatGPT (k1 negated)",
            ((ppo, "shaped_rewards"),), mistakes.penalty_with_the_wrong_sign, "ppo",
            "test_ppo.py::test_shaped_rewards_hand_example", "check_rollout"),
    Exhibit("inverted_k3", "rlhf-book; minChatGPT (k3 with the ratio inverted)",
            ((ppo, "policy_loss"),), mistakes.policy_loss_with_inverted_ratio, "ppo",
            "test_ppo.py::test_expected_kl_old_is_the_exact_kl_of_the_rollout_policy_to_the_updated"
            "_one"),
    Exhibit("old_minus_new", "the same slip as k3 inverted, in the loss itself",
            ((ppo, "policy_loss"),), mistakes.policy_loss_old_minus_new, "ppo",
            "test_ppo.py::test_policy_loss_cases"),
    Exhibit("unused_mask", "minChatGPT",
            ((training, "masked_mean"), (ppo, "masked_mean"), (ppo_report, "masked_mean")),
            mistakes.masked_mean_without_mask, "ppo",
            "test_properties.py::test_nothing_outside_the_mask_changes_anything"),
    Exhibit("late_clip", "minChatGPT",
            ((sft, "train_step"),), mistakes.train_step_clipped_before_backward, "sft",
            "test_sft.py::test_gradients_are_clipped_after_backward", options={"lr": 3e-3}),
    Exhibit("unclipped_critic", "the seed lecture",
            ((training, "clip_gradients"),), mistakes.clip_policy_only, "ppo",
            "test_ppo.py::test_the_clip_covers_all_that_the_optimiser_owns_and_frozen_networks"
            "_stay"),
    Exhibit("last_metrics", "CleanRL; trl",
            ((ppo_report, "summarise"),), mistakes.summarise_the_last_step, "ppo",
            "test_ppo.py::test_update_equals_a_slow_reference_on_a_ragged_batch"),
    Exhibit("padded_metrics", "CleanRL; trl",
            ((ppo_report, "measure"),), mistakes.measure_with_padding, "ppo",
            "test_ppo_report.py::test_measure_equals_a_slow_reference_on_a_ragged_batch"),
    Exhibit("exact_gelu", "nanoGPT; LearnRLHF",
            ((gpt2.MLP, "forward"),), mistakes.exact_gelu_forward, "sft",
            "test_gpt2.py::test_the_network_equals_a_slow_one_with_attention_written_out"),
    Exhibit("padded_score", "minChatGPT; reward-bench issue 137",
            ((gpt2.ScalarModel, "score"),), mistakes.score_of_the_row, "reward_model",
            "test_reward_model.py::test_a_score_does_not_depend_on_padding"),
    Exhibit("encoded_prompt", "the seed lecture; rllm pull request 272",
            ((ppo, "generate"),), mistakes.generate_with_encoded_prompts, "ppo",
            "test_ppo.py::test_the_rollout_holds_what_the_alignment_law_says", "check_rollout",
            options={"gold": ""}),     # the gold judge would refuse prompts that are cut short
    Exhibit("all_ended", "most programs; trl pull request 1536",
            ((ppo, "generate"),), mistakes.generate_all_ended, "ppo",
            "test_ppo.py::test_the_missing_end_penalty_is_for_rows_that_did_not_end",
            options={"max_new_tokens": 12}),
    Exhibit("sampled_top_k", "ARENA; reasoning-from-scratch; rlhf-book; llm_from_scratch",
            ((generate, "next_logprobs"),), mistakes.next_logprobs_of_the_top, "ppo",
            "test_generate.py::test_log_probabilities_of_the_sampling_equal_those_of_a_full_forward"
            "_pass", "check_rollout"),
    Exhibit("constant_kl", "hands-on-modern-rl (a penalty in the loss without a gradient)",
            ((ppo, "shaped_rewards"),), mistakes.penalty_of_the_batch, "ppo",
            "test_ppo.py::test_shaped_rewards_hand_example", "check_rollout"),
    Exhibit("double_kl", "slime pull request 1247",
            ((ppo, "shaped_rewards"),), mistakes.penalty_counted_twice, "ppo",
            "test_ppo.py::test_shaped_rewards_hand_example", "check_rollout"),
    Exhibit("immediate_return", "llm_from_scratch",
            ((ppo, "gae"),), mistakes.gae_of_immediate_rewards, "ppo",
            "test_ppo.py::test_gae_hand_example"),
    Exhibit("value_after_end", "verl pull request 50; ROLL pull request 447; trl pull request 5303",
            ((ppo, "gae"),), mistakes.gae_beyond_the_end, "ppo",
            "test_ppo.py::test_gae_hand_example"),
    Exhibit("mean_ratio", "hands-on-modern-rl",
            ((ppo, "policy_loss"),), mistakes.policy_loss_of_sequence_means, "ppo",
            "test_properties.py::test_policy_loss_and_gradient_equal_a_token_by_token_reference"),
    Exhibit("dead_critic", "CoursIA pull request 15256",
            ((ppo, "value_loss"),), mistakes.value_loss_without_gradient, "ppo",
            "test_ppo.py::test_update_equals_a_slow_reference_on_a_ragged_batch"),
    Exhibit("surprise", "trl issue 2448; llm_from_scratch",
            ((gpt2, "token_logprobs"), (ppo, "token_logprobs")),
            mistakes.token_logprobs_with_surprise, "ppo",
            "test_properties.py::test_token_logprobs_equal_a_token_by_token_reference",
            options={"ent_coef": 0.05}),
    Exhibit("group_of_equals", "tiny-grpo and programs made from it",
            ((groups, "group_advantages"),), mistakes.group_advantages_of_rounding, "groups",
            "test_groups.py::test_groups_of_equal_rewards_give_exactly_0",
            options={"method": "grpo", "k": 3}),     # the mean of four equal numbers is exact
]


# mistakes that no single wrong function makes: the mistake, where it was seen, the test on guard
GUARDED = [("An option that nothing reads.", "PaLM-rlhf-pytorch; lm-human-preference-details",
            "test_layout.py::test_every_config_field_is_read_and_has_a_comment")]


def find(name: str) -> Exhibit:
    """The exhibit of that name.

    Raises: ValueError with the names that there are.
    """
    for exhibit in EXHIBITS:
        if exhibit.name == name:
            return exhibit
    names = ", ".join(exhibit.name for exhibit in EXHIBITS)
    raise ValueError(f"the museum has no exhibit {name!r}, expected one of {names}")
