"""lm_eval's command line, with `vllm_dlm` among its models.

lm_eval 0.4 knows the models that have been registered in its process, and has
no entry points to find others by. Read in lm_eval 0.4.13: api/registry.py, models/__init__.py, __main__.py.
"""

NAME, TARGET = "vllm_dlm", "vllm_dlm.evaluation.lm_eval_model:ServedDLM"


def register() -> None:
    """Names the model; its module is imported when somebody asks for it."""
    import lm_eval.models  # noqa: F401 - its own models first, or the registry takes ours for all there are
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
