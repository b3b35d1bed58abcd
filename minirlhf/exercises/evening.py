"""The end of the course: a task for one evening, with a checklist."""

TASK = """The task of one evening
=======================
Make a policy that was not there before: with a reward of your own, with labels of your own, or with
a data set of your own. From SFT to a report of one page.

Choose one
  reward   write a function in my_reward.py (README, "Your own data, your own reward") that pays for
           something that you can see in a response: short, polite, no repetition, an answer in two
           sentences. Start from checkpoints/sft of `python -m minirlhf`.
  labels   judge pairs of answers: python -m minirlhf.label --answers sampled. Your verdicts are
           comparisons: python -m minirlhf.reward_model --data checkpoints/labels/verdicts.jsonl
  data     your own demonstrations and comparisons as .jsonl files. 1,000 and 2,000 rows are enough
           to see something; python -m minirlhf.data FILE shows how they are read.

Before you run anything (30 minutes)
  [ ] Write down in one sentence what shall get better, and how you will notice.
  [ ] Write down what the policy could do to get the reward without doing what you mean.
  [ ] Say what is held out, so that nothing that you train on is in the evaluation.
  [ ] Guess the win rate over SFT.

SFT (30 minutes)
  [ ] python -m minirlhf.data FILE: are template, end token and mask what you expect?
  [ ] The held-out loss falls; where it turns up again, you stop.
  [ ] Read ten samples. Do they end by themselves?

The reward (45 minutes)
  [ ] Reward model: held-out accuracy with the number of comparisons beside it; calibration error.
      Function: its value for five responses that you wrote by hand, good and bad.
  [ ] Which of two responses that differ in length alone scores higher?
  [ ] The scores of SFT's own responses: mean 0 and deviation 1, or kl_coef means something else.

PPO (60 minutes)
  [ ] The first run is short: --iterations 5. ratio_first is 0, kl_ref is 0 in iteration 0.
  [ ] Read a token table: is the score at the last action, and do the rewards add up?
  [ ] The run: score, kl_ref, entropy, response_len. python -m minirlhf.diagnose says what it sees.
  [ ] A second seed. A figure that changes its sign with the seed is no result.
  [ ] One run with a fifth of the kl_coef, on purpose: does it find what you were afraid of?

Does it work? (30 minutes)
  [ ] python -m minirlhf.evaluate: win rate over SFT with its interval, and the control near 0.5.
  [ ] Read twenty pairs yourself, blinded (--judge person). Do you agree with the figure?
  [ ] Length: would the win rate stand if both were equally long?

The report (45 minutes, one page)
  [ ] What you wanted; what you did, as commands that somebody can run; seeds and versions.
  [ ] One picture (python -m minirlhf.plots), one table with intervals, two pairs of answers.
  [ ] What did not work, and what you do not know.
  [ ] The guess from the beginning beside the result.
"""
