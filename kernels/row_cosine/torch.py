"""Products in float32, and sums of them."""

import torch


def row_products(new, old):
    """See dispatch.py"""
    new, old = new.float(), old.float()
    return torch.stack([(new * old).sum(-1), new.square().sum(-1), old.square().sum(-1)])


def row_cosine(new, old):
    """See dispatch.py"""
    product, new_square, old_square = row_products(new, old)
    return product / (new_square.sqrt().clamp_min(1e-8) * old_square.sqrt().clamp_min(1e-8))
