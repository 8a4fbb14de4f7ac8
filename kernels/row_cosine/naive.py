"""The definition, in float64."""

import torch


def row_products(new, old):
    """[3, n] float64"""
    new, old = new.double(), old.double()
    return torch.stack([torch.stack([a @ b, a @ a, b @ b]) for a, b in zip(new, old, strict=True)], 1)


def row_cosine(new, old):
    """[n] float64"""
    product, new_square, old_square = row_products(new, old)
    return product / (new_square.sqrt().clamp_min(1e-8) * old_square.sqrt().clamp_min(1e-8))
