import pytest

from tests.view.browsing import browser, exported, visit
from tests.view.mock import mock

__all__ = ["browser", "exported", "visit"]


@pytest.fixture
def server():
    with mock() as server:
        yield server
