# make demo: serve the bundled checkpoint and ask it something. make check: formatting, lint and types.
# make test: run the tests, in minutes. make test-slow: the slow sweeps that it leaves out. make test-all: all of them.
# make pretend: vLLM's code for GPUs on a machine without one.
# All make .venv first; ARGS goes to the program: make test ARGS="tests/plugins -x".
PYTHON ?= python3
READY := .venv/ready

# With it vLLM skips the plugin that makes the CPU wheel's command line work.
unexport VLLM_TARGET_DEVICE

.PHONY: demo check test test-slow test-all pretend environment

demo: $(READY)
	@.venv/bin/python -m vllm_dlm.demo $(ARGS)

check: $(READY)
	@.venv/bin/python -m ruff format --check
	@.venv/bin/python -m ruff check
	@.venv/bin/python -m mypy

# Tests that share an engine or a server stay in one of the two processes: see tests/scheduling.py.
PYTEST := .venv/bin/python -m pytest -n 2 --dist loadfile

test: $(READY)
	@$(PYTEST) $(ARGS)

test-slow: $(READY)
	@$(PYTEST) -m slow $(ARGS)

test-all: $(READY)
	@$(PYTEST) -m "slow or not slow" $(ARGS)

# With VLLM=FOLDER vLLM's Python files are those of FOLDER/vllm, say of an unpacked wheel for GPUs.
pretend: $(READY)
	@PYTHONPATH=$(VLLM) .venv/bin/python -m tests.pretended_gpu $(ARGS)

environment: $(READY)

$(READY): pyproject.toml tools/bootstrap.py
	@$(PYTHON) tools/bootstrap.py
	@touch $@
