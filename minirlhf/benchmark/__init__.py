"""How fast minirlhf is on this machine, beside a naive baseline and the machine's own limits.

    python -m minirlhf.benchmark            # about a quarter of an hour, 8 GB of memory
    python -m minirlhf.benchmark --quick    # tiny networks: to see that it runs

Nothing that a reader of the three stages needs is in here, and no stage imports it.
"""
