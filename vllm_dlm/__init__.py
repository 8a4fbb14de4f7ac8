"""vllm_dlm: masked-diffusion language models (LLaDA, Dream) served by unmodified vLLM."""

__version__ = "0.1.0"


def score(llm, context, continuation, **how):
    """Log-probabilities of continuations given contexts: see `vllm_dlm.scoring.offline.score`."""
    from vllm_dlm.scoring.offline import score as scored

    return scored(llm, context, continuation, **how)


def register() -> None:
    """Entry point of the `vllm.general_plugins` group.

    vLLM calls it once in every process it starts (front-end, engine core,
    workers), so it only records names. Models, schedulers and kernels are
    imported on first use.
    """
    from vllm_dlm.integration import install

    install()
