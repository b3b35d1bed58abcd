"""Best-of-n: draw n responses, keep the one with the best score. Its value and its KL, exactly.

Optimisation without training: the larger n, the more pressure on the score. From N drawn responses
the mean over all subsets of n is known exactly, so that N drawn ones serve for every n up to N, and
without the noise of choosing some subsets.

Shapes: N responses to one prompt.
"""

import math
from collections import defaultdict

import numpy as np

from minirlhf.engine.options import check


def best_of_n(scores: np.ndarray, values: np.ndarray, n: int) -> float:
    """Expected value of the response with the best score among n; scores, values (N,), n <= N.

    The i-th smallest score of N is the best of C(i-1, n-1) subsets of n, out of C(N, n). Responses
    with equal scores are drawn alike, so each has their mean value. With `values` = `scores` it is
    the expected best score. The mean over n drawn by chance would be the same, with more noise.

    Example: scores .1 .4 .7 .9 with values 1 3 2 0: n = 1 gives 1.5, n = 2 gives 7/6, n = 3 gives
    0.5, n = 4 gives 0.
    Source: Nakano et al. 2021 (arXiv 2112.09332), appendix I; with equal scores: ours.
    """
    N = len(scores)
    check(1 <= n <= N, f"best of {n} from {N} responses: expected n from 1 to {N}")
    order = np.argsort(scores, kind="stable")                                       # (N,)
    ordered, gold = scores[order], values[order].astype(np.float64)                 # (N,) each
    _, group, sizes = np.unique(ordered, return_inverse=True, return_counts=True)
    gold = (np.bincount(group, weights=gold) / sizes)[group]                        # (N,)
    total = math.comb(N, n)
    shares = np.array([math.comb(i, n - 1) / total for i in range(N)])              # (N,)
    return float(shares @ gold)


def best_of_n_kl(responses: list, scores: np.ndarray, n: int) -> float:
    """KL(best-of-n || policy) in nats, for a policy that gives each of these N responses equally.

    Equal responses in the list are one response with their common probability; `scores` (N,) must
    be equal for them. Of responses with equal scores best-of-n keeps the first that was drawn. So
    all that have score s get together F(s)^n - F(below s)^n, with F the share of responses up to s,
    in proportion to their probabilities.

    Example: two responses, equally likely, n = 2: the better one has 3/4, and the KL is
    1/4 log(1/2) + 3/4 log(3/2) = 0.1308. If all scores are equal it is 0.
    careful: the policy is known by N draws only, and the KL cannot exceed log N. With 128 distinct
    ones it is 0.0104 below the bound at n = 64.
    """
    check(len(responses) == len(scores) > 0 and n >= 1, "expected a score for each response")
    counts = defaultdict(int)                            # score -> draws with it
    score_of = {}
    for response, score in zip(responses, scores.tolist()):
        check(score_of.setdefault(response, score) == score, f"{response!r} has two scores")
        counts[score] += 1
    below, kl = 0.0, 0.0
    for score in sorted(counts):
        share = counts[score] / len(scores)
        kept = (below + share) ** n - below ** n
        below += share
        if kept > 0:                                     # of tiny powers nothing is left
            kl += kept * math.log(kept / share)
    return kl


def best_of_n_bound(n: int) -> float:
    """The largest KL that best-of-n can have, nats: of very many responses, no two score alike.

    Example: 0 for n = 1, 0.1931 for 2, 1.8351 for 16, 3.1745 for 64.
    Source: Beirami et al. 2024 (arXiv 2401.01879), section 3.
    """
    return math.log(n) - (n - 1) / n


# ---- Gao's curves --------------------------------------------------------------------------------

def fit_curve(kl: np.ndarray, gain: np.ndarray, kind: str) -> dict[str, float]:
    """Fit Gao's curve to gold's gain over the start: {"alpha", "beta", "residual"}.

    With d = sqrt(kl): kind "bon" is gain = d (alpha - beta d), kind "rl" is
    gain = d (alpha - beta log d). Points with kl 0 say nothing and are left out. `residual` is the
    root mean square of what the fit misses.

    Example: kl 1, 4, 9 with gain 1, 0, -3 is d (2 - d) exactly: alpha 2, beta 1, residual 0.
    Source: Gao, Schulman, Hilton 2022 (arXiv 2210.10760), section 3.
    """
    check(kind in ("bon", "rl"), f"expected the kind bon or rl, found {kind!r}")
    used = kl > 0
    d, gain = np.sqrt(kl[used]), gain[used]                                         # (points,)
    check(len(d) >= 3, f"expected at least 3 points with a KL above 0, found {len(d)}")
    second = -d * d if kind == "bon" else -d * np.log(d)                            # (points,)
    columns = np.stack([d, second], axis=1)                                         # (points, 2)
    solution = np.linalg.lstsq(columns, gain, rcond=None)[0]                        # (2,)
    return {"alpha": float(solution[0]), "beta": float(solution[1]),
            "residual": float(np.sqrt(np.mean((columns @ solution - gain) ** 2)))}
