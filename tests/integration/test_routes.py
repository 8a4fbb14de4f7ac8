"""What the plugin adds to a server at start, in process."""

import asyncio
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
from fastapi import FastAPI

from vllm_dlm.integration import routes


@pytest.mark.parametrize("diffusion", [True, False])
def test_only_servers_of_diffusion_models_switch_threads_more_often(monkeypatch, diffusion):
    monkeypatch.setattr(routes, "is_diffusion_lm", lambda config: diffusion)
    before = sys.getswitchinterval()
    app = FastAPI()
    app.state.args = Namespace()
    app.state.openai_serving_models = None
    added = routes.Routes()
    added.attach_router(app)
    try:
        asyncio.run(added.init_state(SimpleNamespace(model_config=None), app.state, app.state.args))
        after = sys.getswitchinterval()
    finally:
        sys.setswitchinterval(before)
    assert after == pytest.approx(routes.GIL_SECONDS if diffusion else before)
