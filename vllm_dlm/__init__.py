"""vllm_dlm: masked-diffusion language models (LLaDA, Dream) served by unmodified vLLM."""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of the `vllm.general_plugins` group.

    vLLM calls it once in every process it starts (front-end, engine core,
    workers), so it only records names; models, schedulers and kernels are
    imported when vLLM asks for them.
    """
    from vllm_dlm.integration import install

    install()
