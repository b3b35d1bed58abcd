"""Questions for pen and paper, one or more of each lecture. The answers are computed here."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from minirlhf.data import response_mask
from minirlhf.evaluate import win_rate
from minirlhf.exercises.exercise import Question, ones, tensor
from minirlhf.exercises.groups import rloo_advantages
from minirlhf.exercises.penalty import best_policy
from minirlhf.generate import KVCache
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.ppo import PPOConfig, gae, minibatches, policy_loss
from minirlhf.reward_model import bradley_terry_loss
from minirlhf.sft import sft_loss
from minirlhf.siblings.dpo import dpo_loss

SMALL_ERROR = 0.005                 # of an answer that is rounded to three digits


def last_column() -> int:
    """Of a prompt of 5 tokens and a response of 7 in a row of 16."""
    mask = response_mask(torch.tensor([5]), torch.tensor([12]), 16)
    return int(mask[0].nonzero().max())


def attended() -> float:
    """Two equal scores, and a third that may not be seen."""
    q, k = torch.zeros(1, 3, 1), tensor([[0], [0], [9]]).float()
    v = tensor([[1], [3], [100]]).float()
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0, 1, 0].item()


def cache_size() -> int:
    """Numbers in the cache of one row of 100 tokens in GPT-2 124M."""
    cache = KVCache(GPT2Config(), torch.tensor([100]), 100, torch.zeros(1))
    return cache.keys.numel() + cache.values.numel()


def loss_of_three() -> float:
    """Probabilities 1/2, 1/4 and 1."""
    return sft_loss(tensor([0.1, 0.5, 0.25, 1.0]).log(), torch.tensor([[False, True, True, True]]),
                    3).item()


def preferred() -> float:
    """The probability of a margin of 1.2 - 0.2."""
    return math.exp(-bradley_terry_loss(tensor(1.2), tensor(0.2)).item())


def first_advantage() -> float:
    """Of three tokens with a score of 2 at the end."""
    advantages, _ = gae(tensor([0, 0, 2]), tensor([0.5, 1, 1]), ones(1, 3), 1.0, 0.5)
    return advantages[0, 0].item()


def slope() -> float:
    """Of the policy loss at ratio 1.3 and advantage -2."""
    logprobs = tensor([math.log(1.3)]).requires_grad_()
    policy_loss(logprobs, tensor([0]), tensor([-2]), ones(1, 1), 0.2)[0].backward()
    return logprobs.grad.item()


def reweighted() -> float:
    """The second response's probability at the optimum."""
    return best_policy(tensor(0.9, 0.1), tensor(0, 1), 0.5)[1].item()


def steps_per_iteration() -> int:
    """Optimiser steps of an update with the default options."""
    return len(minibatches(PPOConfig(), 0))


def memory() -> float:
    """GiB of four networks of 124M, two of them trained by Adam, in float32."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT2(GPT2Config()).parameters())
    return (2 * 16 + 2 * 4) * parameters / 2**30


def wins() -> float:
    """Answers with gold 0, 1, 1 against 1, 1, 2."""
    return win_rate(np.array([[0, 1, 1]]), np.array([[1, 1, 2]])).item()


def largest_rloo() -> float:
    """Rewards 3, 1, 0, 0."""
    return rloo_advantages(tensor([3, 1, 0, 0])).max().item()


EXERCISES = [
    Question(
        "paper_alignment", 0, 5, "easy", "in which column does the score stand?",
        "A prompt has 5 tokens, the end token in front included. The response has 7 tokens, its "
        "end token included. The row is padded to T = 16. Columns count from 0. Which column of a "
        "per-token tensor is the last action's, so that the score stands there?",
        last_column, "The response's last token is ids[11]. Column t is the action ids[t+1].",
        "Prompt and response are ids[0..11]. The action ids[11] belongs to column 10. Neither the "
        "padding nor T plays a part.",
        slips=((11, "That is the token's place in ids. Column t is the action ids[t+1], so it is "
                "one less."), (14, "That is the last column of the row, which is padding."),
               (9, "That leaves the end token without a score, but it was chosen, too."))),
    Question(
        "paper_attention", 1, 5, "easy", "one row of attention",
        "Three tokens, one head. The second token's query has the same score, 0, with the keys of "
        "the first and the second token, and 9 with that of the third. The values are 1, 3, 100. "
        "What is the second token's output?",
        attended, "Which tokens may the second one see?",
        "It sees the first two, with equal weights: (1 + 3) / 2 = 2. The third is in its future.",
        SMALL_ERROR, slips=((104 / 3, "Equal weights are right, but the third token is in the "
                             "future of the second."),)),
    Question(
        "paper_cache", 1, 10, "medium", "how large is a KV cache?",
        "GPT-2 124M has 12 layers of 12 heads of size 64. How many numbers does its KV cache hold "
        "for one row of 100 tokens?",
        cache_size, "Keys and values, per layer, per head, per token.",
        "2 * 12 layers * 12 heads * 64 * 100 tokens = 1843200 numbers, 7 MB in float32. The logits "
        "of the same row would be 100 * 50257, nearly three times as many.", 1e-6,
        slips=((921600, "That is the keys alone."), (153600, "That is one layer."))),
    Question(
        "paper_sft", 2, 5, "easy", "the loss of one demonstration",
        "The model gives the prompt's last token probability 0.1, and the response's three tokens "
        "0.5, 0.25 and (the end token) 1. What is the SFT loss, in nats per token?",
        loss_of_three, "The prompt's token does not count, the end token does.",
        "-(log 0.5 + log 0.25 + log 1) / 3 = (0.6931 + 1.3863 + 0) / 3 = 0.6931.", SMALL_ERROR,
        slips=((1.0397, "You divide by 2: the end token is a response token, although it costs "
                "nothing here."), (1.0955, "The prompt's token is in your mean."))),
    Question(
        "paper_preference", 3, 5, "easy", "from scores to a probability",
        "The reward model scores two responses 1.2 and 0.2. With what probability does it say that "
        "people prefer the first?",
        preferred, "The sigmoid of the difference.",
        "sigmoid(1.2 - 0.2) = 1 / (1 + exp(-1)) = 0.7311. Scores of 101.2 and 100.2 would say the "
        "same.", SMALL_ERROR,
        slips=((0.7685, "That is the sigmoid of the first score alone."),
               (0.2689, "That is the other response's probability."))),
    Question(
        "paper_gae", 4, 10, "medium", "how much of the score reaches the first token?",
        "A response of three tokens has rewards 0, 0, 2 and values 0.5, 1, 1; gamma is 1, lambda "
        "0.5. What is the advantage of the first token?",
        first_advantage, "First the three errors delta = reward + next value - value.",
        "The errors are 0.5, 0 and 2 + 0 - 1 = 1. From the right the advantages are 1, then "
        "0 + 0.5 * 1 = 0.5, then 0.5 + 0.5 * 0.5 = 0.75.", SMALL_ERROR,
        slips=((0.5, "That is the first error alone, as with lambda 0."),
               (1.5, "That is lambda 1: the score minus the value."))),
    Question(
        "paper_clip", 4, 10, "medium", "does the clip stop this token?",
        "A token has ratio 1.3 and advantage -2; the clip range is 0.2. It is the only token. What "
        "is the derivative of the policy loss by its log-probability?",
        slope, "Which of the two losses is larger, 2.6 or 2.4? Then differentiate that one.",
        "The losses are 2.6 (unclipped) and 2.4 (clipped). The larger one is the unclipped, "
        "2 exp(difference), whose derivative is 2.6. A bad token that has become likelier is "
        "pushed back however far it went.", SMALL_ERROR,
        slips=((0, "That would hold for advantage 2. With -2 the unclipped loss is the larger "
                "one."), (2.4, "The clipped loss has no derivative at all, it is constant."),
               (-2.6, "The sign: minimising must lower the probability."))),
    Question(
        "paper_optimum", 4, 10, "medium", "where does PPO go with a KL penalty?",
        "The reference gives two responses probabilities 0.9 and 0.1; their scores are 0 and 1, "
        "and kl_coef is 0.5. What is the second one's probability under the best policy?",
        reweighted, "Weights 0.9 exp(0 / 0.5) and 0.1 exp(1 / 0.5), then normalise.",
        "0.1 * exp(2) = 0.739 beside 0.9: 0.739 / 1.639 = 0.4509.", SMALL_ERROR,
        slips=((0.1548, "You multiply the score by kl_coef; it is divided."),
               (0.8808, "The reference is missing: that is the optimum of an entropy bonus."))),
    Question(
        "paper_steps", 5, 5, "easy", "how often does Adam step?",
        "With the default options (batch_size 64, minibatch_size 32, epochs 2), how many optimiser "
        "steps does one iteration of PPO make?",
        steps_per_iteration, "Minibatches in an epoch, times epochs.",
        "64 / 32 = 2 minibatches in each of 2 epochs: 4 steps. The ratio is 1 in the first of them "
        "only.", slips=((2, "That is one epoch."),)),
    Question(
        "paper_reward_sum", 5, 5, "easy", "read a token table",
        "In a token table the sum of kl_ref is 3 nats, the score is 1.4 and kl_coef is 0.2. What "
        "is the sum of the rewards?",
        lambda: 1.4 - 0.2 * 3, "Every token pays for its own kl_ref; the score is paid once.",
        "1.4 - 0.2 * 3 = 0.8. PPO checks this for every response of every rollout.", SMALL_ERROR,
        slips=((2.0, "Leaving the reference costs; it is not paid for."),
               (0.2, "The penalty is counted twice."))),
    Question(
        "paper_exchange", 6, 10, "medium", "when is hacking worth it?",
        "Policy A has score 2 at 3 nats from the reference. Policy B has found a hole in the "
        "reward model: score 3 at 12 nats. At which kl_coef are both equally good for PPO?",
        lambda: (3 - 2) / (12 - 3), "score - kl_coef * KL, for both.",
        "2 - 3 b = 3 - 12 b gives b = 1 / 9 = 0.1111. Above it PPO prefers A. The penalty does not "
        "know that B is a hole; it only knows that B is far away.", SMALL_ERROR,
        slips=((9, "That is its inverse: a nat costs kl_coef points of score."),)),
    Question(
        "paper_wins", 7, 5, "easy", "a win rate with ties",
        "To one prompt policy a gives answers with gold 0, 1, 1, policy b with 1, 1, 2. What is "
        "b's win rate, every answer against every answer, ties half?",
        wins, "Nine pairs.",
        "A 1 of b beats the 0 and ties twice: 2 of 3; so does the other. The 2 wins all 3. "
        "7 / 9 = 0.7778.", SMALL_ERROR,
        slips=((5 / 9, "Ties count half, not as lost."), (1, "Ties count half, not as won."))),
    Question(
        "paper_interval", 7, 5, "medium", "how sure are we?",
        "The win rates of 100 prompts have mean 0.6 and standard deviation 0.4. How far does a 95 "
        "% interval reach from the mean (1.96 deviations of the mean)?",
        lambda: 1.96 * 0.4 / math.sqrt(100), "The mean of 100 numbers varies ten times less than "
        "one of them.",
        "1.96 * 0.4 / 10 = 0.0784, so 0.52 to 0.68. For half of it you need 400 prompts.",
        0.03, slips=((0.784, "That is where single prompts lie, not their mean."),
                            (0.04, "That is one deviation of the mean."))),
    Question(
        "paper_memory", 8, 10, "medium", "what do four networks weigh?",
        "PPO with four networks of GPT-2 124M (124.44 million parameters) in float32: policy and a "
        "separate critic are trained by Adam, reference and reward model are frozen. How many GiB "
        "(2**30 bytes) do weights, gradients and Adam's averages take?",
        memory, "16 bytes per trained parameter: weight, gradient, two averages. 4 per frozen one.",
        "(2 * 16 + 2 * 4) * 124.44e6 bytes = 4.98e9 bytes = 4.64 GiB. Activations and logits come "
        "on top.", 0.01,
        slips=((7.42, "Frozen networks have neither gradients nor averages."),
               (1.854, "That is the weights alone; a trained parameter takes 16 bytes."),
               (4.98, "Those are billions of bytes; a GiB is 2**30."))),
    Question(
        "paper_compute", 8, 5, "easy", "is RLHF expensive?",
        "InstructGPT's paper (section 5.1) states 60 petaflop/s-days for its 175B PPO-ptx model "
        "and 3640 for pretraining GPT-3. What share is that, in percent?",
        lambda: 100 * 60 / 3640, "60 / 3640.",
        "60 / 3640 = 1.648 %. Most of what a model can do was paid for before RLHF begins.",
        0.03, slips=((0.01648, "In percent, please."),)),
    Question(
        "paper_rloo", 9, 5, "easy", "a baseline from the others",
        "Four responses to a prompt have rewards 3, 1, 0, 0. What is RLOO's advantage of the best?",
        largest_rloo, "The mean of the other three.",
        "The others' mean is 1 / 3, so 3 - 0.3333 = 2.667.", SMALL_ERROR,
        slips=((2, "Your baseline contains the response itself; that is Dr. GRPO's."),)),
    Question(
        "paper_dpo", 9, 10, "easy", "one comparison under DPO",
        "The policy gives the chosen response log-probability -10 and the rejected one -12; the "
        "reference gives -12 and -11. beta is 0.5. What is DPO's loss?",
        lambda: dpo_loss(tensor(-10) - tensor(-12), tensor(-12) - tensor(-11), 0.5).item(),
        "First the two log-ratios, policy minus reference.",
        "The log-ratios are 2 and -1, their difference is 3, times beta 1.5, and "
        "-log sigmoid(1.5) = 0.2014.", SMALL_ERROR,
        slips=((0.3133, "The reference is missing."), (0.0486, "beta is missing."),
               (1.7014, "The sign: the chosen response's log-ratio minus the rejected one's."))),
]
