"""Which types a run computes in, for the tests of `--dtype bfloat16`."""

from collections import defaultdict

import torch

from minirlhf import gpt2
from minirlhf.engine import fast, training

# what holds in every trainer's run with bfloat16, on every machine
EXPECTED_DTYPES = {"layers' products": {torch.bfloat16}, "sums over layers": {torch.float32},
                   "hidden states": {torch.float32}, "logits": {torch.float32},
                   "log-probabilities": {torch.float32}, "scores and values": {torch.float32},
                   "weights": {torch.float32}, "gradients": {torch.float32},
                   "moments": {torch.float32}}


def record_dtypes(monkeypatch) -> dict[str, set[torch.dtype]]:
    """Note the types of what the runs from now on compute; the dict fills as they go."""
    dtypes = defaultdict(set)

    def record(owner, name: str, label: str) -> None:
        original = getattr(owner, name)

        def recorded(*arguments, **options):
            result = original(*arguments, **options)
            for tensor in result if isinstance(result, tuple) else (result,):
                dtypes[label].add(tensor.dtype)
            return result

        monkeypatch.setattr(owner, name, recorded)

    record(gpt2.Conv1D, "forward", "layers' products")
    record(gpt2.Block, "forward", "sums over layers")
    record(gpt2.GPT2, "hidden", "hidden states")
    record(fast, "linear", "logits")
    record(fast, "action_logprobs", "log-probabilities")
    record(torch.nn.Linear, "forward", "scores and values")      # the scalar heads; no others
    original_step = training.optimiser_step

    def recorded_step(networks, optimizer, *arguments):
        result = original_step(networks, optimizer, *arguments)
        for parameter in networks.parameters():
            dtypes["weights"].add(parameter.dtype)
            dtypes["gradients"].add(parameter.grad.dtype)
            dtypes["moments"].add(optimizer.state[parameter]["exp_avg_sq"].dtype)
        return result

    monkeypatch.setattr(training, "optimiser_step", recorded_step)
    return dtypes
