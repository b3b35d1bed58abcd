"""minirlhf: RLHF from scratch in pure PyTorch, written to be read beside the lectures."""
