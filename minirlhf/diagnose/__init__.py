"""What is healthy and what is not in a run's metrics, in plain words: python -m minirlhf.diagnose.

`illnesses` holds the list, `report` reads a folder and writes the text, `causes` and `check` make
runs ill on purpose and count what is recognised.
"""
