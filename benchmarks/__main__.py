"""`python -m benchmarks COMMAND`: one module per command, with `add_arguments(parser)` and `run(args)`."""

import argparse
import importlib
import sys

COMMANDS = {
    "figures": "all times that README and docs/results.md quote, in one run on an idle machine",
    "speed": "tokens per second of the reference loop and of this engine, per policy",
    "kernels": "page-sparse attention against dense kernels, checked and timed; runs without vLLM",
    "decode": "milliseconds per token at long context, vLLM against pages chosen by UNIQUE",
    "costs": "multiply-adds of the policies on LLaDA-8B and Dream-7B, from the cost model",
    "selection": "retrieval and kept attention mass of the selections and of other rules, on the demo checkpoint",
    "prompts": "rows and time of prompts that models which know blocks read, found in the prefix cache or not",
    "quality": "exact match and drift from the exact model of the reuse policies, on the demo checkpoint",
    "view": "what frames, trajectories and watched requests cost, and that nobody pays who does not look",
    "gpu": "all that can be told of a GPU: what is right, and what kernels, denoising, page-sparse decoding reach",
    "redraw": "tables and plots of results, and the pages that quote them, once more from their JSON files",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure vllm_dlm.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        if sys.argv[1:2] == [name]:  # the others need not be importable: `kernels` runs where vLLM is not
            module = importlib.import_module(f"benchmarks.{name}")
            command.description = module.__doc__
            module.add_arguments(command)
    args = parser.parse_args()
    module.run(args)


if __name__ == "__main__":
    main()
