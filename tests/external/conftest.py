from tests.page_sparse.conftest import checkpoints, decoder

__all__ = ["checkpoints", "decoder"]
