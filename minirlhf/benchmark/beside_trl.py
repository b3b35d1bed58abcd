"""PPO iterations of TRL's own trainer; run by an interpreter that has it, and never imported.

    PYTHON minirlhf/benchmark/beside_trl.py '{"runs": 3, "threads": 2, ...}'

TRL's last releases with PPO are 1.x (`trl.experimental.ppo`); 1.9.2 was tried. It has a separate
critic, and its reward model is a network: here one of one narrow layer, which costs nothing. The
last line that is printed has the versions, seconds of each iteration and of its sampling, and the
peak memory, as JSON.
"""

import json
import sys
import tempfile
import time

import torch


def networks(options: dict):
    """Policy, reference, critic and reward model of GPT-2's shape, random, without dropout."""
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "num_labels": 1,
             "vocab_size": options["vocab_size"], "pad_token_id": options["vocab_size"] - 1}
    sizes = GPT2Config(n_embd=options["n_embd"], n_layer=options["n_layer"],
                       n_head=options["n_head"], n_positions=options["n_positions"], **quiet)
    tiny = GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=options["n_positions"], **quiet)
    return (GPT2LMHeadModel(sizes), GPT2LMHeadModel(sizes), GPT2ForSequenceClassification(sizes),
            GPT2ForSequenceClassification(tiny))


def make_tokenizer(vocab_size: int):
    """A tokenizer that TRL can ask for its special tokens; there is no text here."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    words = {f"w{number}": number for number in range(vocab_size)}
    last, before = f"w{vocab_size - 1}", f"w{vocab_size - 2}"
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token=last)),
                                   pad_token=last, eos_token=before, padding_side="left")


def main(options: dict) -> dict:
    """Train for runs + 1 iterations; the first is not counted."""
    import transformers
    import trl
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    rows, total = options["batch_size"], options["runs"] + 1
    sampling, ends = [], [time.perf_counter()]
    generate = ppo_trainer.batch_generation

    def timed_generation(*arguments, **named):
        """TRL's generation, whose seconds are noted."""
        started = time.perf_counter()
        result = generate(*arguments, **named)
        sampling.append(time.perf_counter() - started)
        return result

    class Clock(transformers.TrainerCallback):
        """Notes when the training begins and when each iteration ends."""

        def on_train_begin(self, *arguments, **named):
            """The first iteration begins."""
            ends[:] = [time.perf_counter()]

        def on_step_end(self, *arguments, **named):
            """An iteration ends."""
            ends.append(time.perf_counter())

    ppo_trainer.batch_generation = timed_generation
    policy, ref_policy, critic, reward_model = networks(options)
    prompts = torch.randint(0, options["vocab_size"] - 2, (rows * total, options["prompt_tokens"]))
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            output_dir=folder, per_device_train_batch_size=rows, num_mini_batches=1,
            num_ppo_epochs=options["epochs"], response_length=options["max_new_tokens"],
            local_rollout_forward_batch_size=rows, total_episodes=rows * total, temperature=1.0,
            num_sample_generations=0, save_strategy="no", report_to="none", use_cpu=True,
            bf16=False, gradient_checkpointing=False, learning_rate=1e-6, disable_tqdm=True)
        trainer = PPOTrainer(args, make_tokenizer(options["vocab_size"]), policy, ref_policy,
                             reward_model, Dataset.from_dict({"input_ids": prompts.tolist()}),
                             critic, callbacks=[Clock()])
        trainer.train()
    seconds = [after - before for before, after in zip(ends, ends[1:])]
    with open("/proc/self/status", encoding="utf-8") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
    return {"trl": trl.__version__, "transformers": transformers.__version__,
            "torch": torch.__version__, "iteration": seconds[1:], "sample": sampling[1:],
            "memory": peak}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
