"""The old place of a command that has moved."""

if __name__ == "__main__":
    raise SystemExit("error: the check has moved to: python -m minirlhf.experiments.diagnose_rates")
