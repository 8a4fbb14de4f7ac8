"""How much a page of keys promises to a query: UNIQUE's score, mean plus spread.

For a query q and a page with key mean m and spread s, in units of a logit:

    l2, rms   (q · m + lam * |q| * s) / sqrt(d)
    vector    (q · m + lam * sum_c |q_c| * s_c) / sqrt(d)
    diag2     q · m / sqrt(d) + lam * sum_g |q_g|^2 * s_g / d     (s_g: mean variance of channel group g)
    none      q · m / sqrt(d)

The score of a page for a key head is the max, the mean, or the sum of
softmaxes over pages (`softmax_sum`), taken over the heads that share the key
head and over those queries of the request that vote (all, where none does):
they all read the same pages. Pages in the first `sink_pages`, from
`forced_from` on, and pages without statistics score FORCED; those from
`num_pages` on -inf; a score that is not a number counts as the lowest there
is. `half_scores` is the same for the halves of runs of keys, whose statistics
are taken on the way.
"""

from vllm_dlm.kernels.page_scores.dispatch import half_scores, page_scores
from vllm_dlm.kernels.page_scores.naive import FORCED, LOWEST, REDUCTIONS, Reduction

__all__ = ["FORCED", "LOWEST", "REDUCTIONS", "Reduction", "half_scores", "page_scores"]
