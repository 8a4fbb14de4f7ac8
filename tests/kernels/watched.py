"""Records the operators that a function would launch, without a GPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watched(TorchDispatchMode):
    """Mode that records the names of operators that would be launches, i.e. neither views nor `prim` operators."""

    def __init__(self, uploads: bool = True):
        """`uploads`: if False, operands on the host are errors, because they would have to be uploaded."""
        super().__init__()
        self.uploads = uploads
        self.launched: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        host = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
        if not self.uploads and any(x.numel() for x in host):
            raise RuntimeError(f"{operator} would upload {[tuple(x.shape) for x in host]}")
        if not operator.is_view and operator.namespace != "prim":
            self.launched.append(operator.name())
        return operator(*args, **(kwargs or {}))
