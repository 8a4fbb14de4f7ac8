# make demo: serve the bundled checkpoint and ask it something. make test: run the tests.
# Both make .venv first; ARGS goes to the program: make test ARGS="tests/plugins -x".
PYTHON ?= python3
READY := .venv/ready

# With it vLLM skips the plugin that makes the CPU wheel's command line work.
unexport VLLM_TARGET_DEVICE

.PHONY: demo test environment

demo: $(READY)
	@.venv/bin/python -m vllm_dlm.demo $(ARGS)

test: $(READY)
	@.venv/bin/python -m pytest $(ARGS)

environment: $(READY)

$(READY): pyproject.toml tools/bootstrap.py
	@$(PYTHON) tools/bootstrap.py
	@touch $@
