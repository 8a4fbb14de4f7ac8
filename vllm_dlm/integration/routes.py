"""Routes of this plugin: scores on a server of a diffusion model, and the live view with `--dlm-view`.

vLLM attaches routes of plugins before the engine exists and the model is known. The route of scores is therefore added
later, still before the server listens. Read in vLLM 0.32: plugins/endpoint_plugins/interface.py,
entrypoints/launchers/{app.py,api_server/entry.py}.
"""

import sys
from argparse import Namespace
from typing import Any

from vllm_dlm.configuration import is_diffusion_lm

#: maximum seconds for which a thread keeps the GIL while others wait. The event loop releases it with every system call
#: and then waits this long for threads that encode texts and templates. With Python's default of 5 ms, encoding the
#: templates of 50 requests delays /health by 370 ms.
GIL_SECONDS = 5e-4


def load_endpoint_plugins(load):
    def load_with_dlm(supported_tasks=None):
        own = [Routes()] if "generate" in (supported_tasks or ()) else []
        return [*load(supported_tasks), *own]

    return load_with_dlm


class Routes:
    """An `EndpointPlugin` of vLLM. It imports the modules of a route only on servers with this route."""

    name = "vllm_dlm"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        self.app: Any = app
        self.attached: list[Any] = []
        if getattr(app.state.args, "dlm_view", False):
            from vllm_dlm.view.routes import ViewPlugin

            self.attach(ViewPlugin())

    def attach(self, plugin: Any) -> None:
        plugin.attach_router(self.app)
        self.attached.append(plugin)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        if engine_client is not None and is_diffusion_lm(engine_client.model_config):
            from vllm_dlm.scoring.route import ScorePlugin

            self.attach(ScorePlugin())
            sys.setswitchinterval(GIL_SECONDS)
        for plugin in self.attached:
            await plugin.init_state(engine_client, state, args)
