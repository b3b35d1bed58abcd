"""The laboratory: claims about RLHF as experiments with seeds and controls, in the text world.

`EXPERIMENTS` names the files of this folder that are experiments, in the order of `lab all`.
"""

EXPERIMENTS = ("beta", "overoptimisation", "cures", "biased_labels", "collapse", "stages",
               "credit", "details", "forgetting", "epochs_of_the_reward_model", "kl_estimators",
               "memory", "execution", "siblings", "labels", "judges")
