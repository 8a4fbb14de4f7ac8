"""Torch reductions, one read of the logits each. The entropy is computed only if requested."""

import torch


def head_statistics(logits, mask_id, eos_id, eot_id, suppress_eos, unlikely_ends, entropy):
    """-> token, prob, margin, logsumexp, entropy, see dispatch.py"""
    logits = logits.float().clone()
    if suppress_eos is not None:
        logits[:, eos_id].masked_fill_(suppress_eos, -torch.inf)
    kept = logits[:, mask_id].clone()
    logits[:, mask_id] = -torch.inf
    token = logits.argmax(-1)
    logits[:, mask_id] = kept
    if unlikely_ends is not None:
        for end in (eos_id, eot_id):
            if end >= 0:
                logits[:, end].masked_fill_(unlikely_ends, -torch.inf)
    lse = logits.logsumexp(-1)
    first, second = logits.topk(2).values.sub_(lse[:, None]).exp_().unbind(1)
    prob = (logits.gather(1, token[:, None])[:, 0] - lse).exp_()
    if entropy:
        probs = logits.sub_(lse[:, None]).exp_()
        return token, prob, first - second, lse, (probs * (probs + 1e-10).log_()).sum(-1)
    return token, prob, first - second, lse, lse[:0]
