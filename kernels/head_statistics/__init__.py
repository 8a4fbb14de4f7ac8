"""What greedy decoding wants to know of the head's logits, in one read of them.

Of each row the most probable token, the mask left out, its probability, and
how sure the row is: the gap between its two highest probabilities, or its
negative entropy sum p log(p + 1e-10), as Dream's reference has it. The mask
counts in every sum. The log of a sum follows from all of it, so the entropy
alone takes a second read.

Logits of the end token may be taken for -inf altogether (suppress_eos), those
of end of sequence and of turn for probabilities only (unlikely_ends).
"""

from vllm_dlm.kernels.head_statistics.dispatch import HeadStatistics, head_statistics

__all__ = ["HeadStatistics", "head_statistics"]
