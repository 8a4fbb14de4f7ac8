"""Attention through a soft mask over pages: what UNIQUE trains with, so that page-sparse inference changes nothing.

A query scores the pages of its sequence as serving does (`page_scores`). The
pages it must read (sink, recent, unfinished) are open; of the others as many
as the budget leaves room for would be read, and halfway between the last of
these and the next lies the query's threshold tau, through which no gradient
flows. A page of score s is open by m = sigmoid((s - tau) / T), and

    attention = softmax(q · k / sqrt(d) + log m_page(k)).

Temperature T = 0 is the mask of serving: m = 1 where s >= tau, else 0.
Gradients reach keys and queries through the logits and, while T > 0, through
the scores and the statistics of the pages.
"""

from vllm_dlm.kernels.soft_page_attention.dispatch import measure, soft_page_attention
from vllm_dlm.kernels.soft_page_attention.gate import Gate

__all__ = ["Gate", "measure", "soft_page_attention"]
