import pytest

from tests.quantization import operators


@pytest.fixture(scope="session", autouse=True)
def _operators():
    operators.provide()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Of quantized copies, made once"""
    return tmp_path_factory.mktemp("quantized")
