"""How fast minirlhf is on this machine: python -m minirlhf.benchmark. No stage imports it."""
