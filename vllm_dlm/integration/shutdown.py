"""Makes SIGTERM stop a server immediately, even during a long step.

vLLM's API server stops its engine, which cannot report its requests as aborted
during a long step, and then waits without limit for the streams of these
requests. Whether they end is a race between two callbacks of the event loop,
also with autoregressive models. Here the requests are failed explicitly.
Read in vLLM 0.32 and 0.33: entrypoints/launchers/launcher.py (`handle_shutdown`),
v1/engine/async_llm.py (`shutdown`, `output_handler`, `generate`),
v1/engine/core_client.py (`BackgroundResources`), v1/utils.py (`shutdown`).
"""

from http import HTTPStatus

from vllm_dlm.configuration import is_diffusion_lm


def shutdown(end):
    def shutdown_with_dlm(self, timeout: float | None = None) -> None:
        if not timeout:
            fail_open_requests(self)
        end(self, timeout)
        fail_open_requests(self)  # requests that exceeded `--shutdown-timeout` or arrived in the meantime

    return shutdown_with_dlm


def fail_open_requests(engine) -> None:
    """Fails all open requests with 503, so that load balancers and clients use another server. Runs in another thread
    than the event loop of the requests, and also for engines that never started."""
    handler = getattr(engine, "output_handler", None)
    if handler is None or handler.get_loop().is_closed() or not is_diffusion_lm(engine.model_config):
        return
    from vllm.exceptions import GracefulHTTPError

    why = "The server was stopped before the response was complete."
    error = GracefulHTTPError(why, HTTPStatus.SERVICE_UNAVAILABLE)
    handler.get_loop().call_soon_threadsafe(engine.output_processor.propagate_error, error)
