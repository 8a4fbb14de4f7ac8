"""lm_eval's command line with the additional model `vllm_dlm`.

lm_eval 0.4 has no entry points for models, so the model is registered in its
process. Read in lm_eval 0.4.13: api/registry.py, models/__init__.py,
__main__.py.
"""

NAME, TARGET = "vllm_dlm", "vllm_dlm.evaluation.lm_eval_model:ServedDLM"


def register() -> None:
    """Registers the model. Its module is imported on first use."""
    import lm_eval.models  # noqa: F401 - first, or the registry considers ours to be all models and skips its own
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise SystemExit("lm_eval is missing: pip install 'vllm_dlm[eval]', or lm-eval") from None
    register()
    cli_evaluate()


if __name__ == "__main__":
    main()
