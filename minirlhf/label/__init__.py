"""You are the labeller: pairs of answers, your verdicts, how far they agree."""
