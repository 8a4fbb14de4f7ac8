"""Attention with a soft mask over pages, with which UNIQUE trains a model to read few pages in serving.

A query scores the pages of its sequence as serving does (`page_scores`). The
pages it must read (sink, recent, unfinished) are open. The best of the other
pages would be read, as many as the budget leaves room for. The query's
threshold tau is halfway between the last score that is kept and the first that
is not, and by default no gradient flows through it. A page of score s is open
to the degree m = sigmoid((s - tau) / T), and

    attention = softmax(q · k / sqrt(d) + log m_page(k)).

Temperature T = 0 is the mask of serving: m = 1 where s >= tau, else 0.
Gradients reach keys and queries through the logits and, while T > 0, through
the scores and the statistics of the pages.
"""

from vllm_dlm.kernels.soft_page_attention.dispatch import measure, soft_page_attention
from vllm_dlm.kernels.soft_page_attention.gate import Gate

__all__ = ["Gate", "measure", "soft_page_attention"]
