"""Statistics of the head's logits that greedy decoding needs, in one read of the logits.

For each row:
- the most probable token other than the mask, and its probability,
- the margin: the gap between the two highest probabilities,
- the log-sum-exp,
- optionally the negative entropy sum p log(p + 1e-10), as in Dream's reference.
  It needs the log-sum-exp first and therefore a second read.
The mask token counts in every sum.

`suppress_eos` sets the logit of the end-of-sequence token to -inf everywhere.
`unlikely_ends` sets the logits of the end of sequence and the end of turn to
-inf for probabilities, but not for the choice of the token.
"""

from vllm_dlm.kernels.head_statistics.dispatch import HeadStatistics, head_statistics

__all__ = ["HeadStatistics", "head_statistics"]
