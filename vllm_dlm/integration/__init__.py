"""Everything that touches vLLM's private API outside the engine, and nothing else.

`install()` runs in every vLLM process and may run more than once.
"""


def install() -> None:
    from vllm_dlm import metrics
    from vllm_dlm.integration import autoregressive, bodies, canvas, cli, cpu_wheel, prompts, requests, shutdown
    from vllm_dlm.integration.registration import register_models

    cpu_wheel.alias_distribution()
    register_models()
    cli.install()
    canvas.install()
    prompts.install()
    requests.install()
    bodies.install()
    shutdown.install()
    autoregressive.install()
    metrics.install()
