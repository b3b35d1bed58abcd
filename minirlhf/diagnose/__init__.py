"""What is healthy and what is not in a run's metrics, in plain words: python -m minirlhf.diagnose.

`ppo_illnesses` and `sft_illnesses` say what an illness looks like, `report` reads a folder and
writes the text. `experiments/diagnose_rates.py` counts how often an illness is recognised.
"""
