"""UNIQUE's score of a page of keys for a query: mean plus spread.

For a query q and a page with key mean m and spread s, in units of a logit:

    l2, rms   (q · m + lam * |q| * s) / sqrt(d)
    vector    (q · m + lam * sum_c |q_c| * s_c) / sqrt(d)
    diag2     q · m / sqrt(d) + lam * sum_g |q_g|^2 * s_g / d     (s_g: mean variance of channel group g)
    none      q · m / sqrt(d)

The score of a page for a key head is reduced over the query heads that share
the key head and over the queries of the request that vote (all of them if none
is marked), because these read the same pages. The reduction is the max, the
mean, or the sum of softmaxes over pages (`softmax_sum`). Special scores:
- FORCED for the first `sinks` pages, for pages from `forced_from` on, and
  for pages without statistics,
- -inf for pages from `num_pages` on,
- LOWEST for a score that is NaN.

`half_scores` computes the same for the two halves of runs of keys. It computes
their statistics from the keys on the fly.
"""

from vllm_dlm.kernels.page_scores.dispatch import half_scores, page_scores
from vllm_dlm.kernels.page_scores.naive import FORCED, LOWEST, REDUCTIONS, Reduction
from vllm_dlm.kernels.page_scores.queries import ScoringQueries

__all__ = ["FORCED", "LOWEST", "REDUCTIONS", "Reduction", "ScoringQueries", "half_scores", "page_scores"]
