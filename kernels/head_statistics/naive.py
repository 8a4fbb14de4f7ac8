"""The definition, row by row in float64."""

import torch


def head_statistics(logits, mask_id, eos_id, eot_id, suppress_eos, unlikely_ends, entropy):
    """-> token, prob, margin, logsumexp, entropy, see dispatch.py"""
    rows = []
    for r, row in enumerate(logits.double()):
        row = row.clone()
        if suppress_eos is not None and suppress_eos[r]:
            row[eos_id] = -torch.inf
        named = row.clone()
        named[mask_id] = -torch.inf
        token = int(named.argmax())
        if unlikely_ends is not None and unlikely_ends[r]:
            for end in (eos_id, eot_id):
                if end >= 0:
                    row[end] = -torch.inf
        prob = row.softmax(-1)
        first, second = prob.sort(descending=True)[0][:2]
        rows.append((token, prob[token], first - second, row.logsumexp(-1), (prob * (prob + 1e-10).log()).sum()))
    token, *numbers = (torch.tensor(column) for column in zip(*rows, strict=True))
    return token, *(x.double() for x in numbers)
