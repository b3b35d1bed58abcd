"""What came after PPO: each method as the shortest difference from what the three stages show.

    groups              RLOO, GRPO, Dr. GRPO, REINFORCE++: no critic, several responses per prompt
    dpo                 DPO, IPO, KTO: comparisons train the policy itself, without a reward model
    rejection           best of k, and SFT on it
    where_the_kl_stands what each place of the KL penalty does, by enumeration
"""
