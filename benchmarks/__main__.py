"""`python -m benchmarks COMMAND`: one module per command, with `add_arguments(parser)` and `run(args)`."""

import argparse
import importlib

COMMANDS = {
    "speed": "tokens per second of the reference loop and of this engine, per policy",
    "costs": "multiply-adds of the policies on LLaDA-8B and Dream-7B, from the cost model",
    "selection": "retrieval and kept attention mass of the selections and of other rules, on the demo checkpoint",
    "quality": "exact match and drift from the exact model of the reuse policies, on the demo checkpoint",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure vllm_dlm.")
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {}
    for name, text in COMMANDS.items():
        modules[name] = importlib.import_module(f"benchmarks.{name}")
        modules[name].add_arguments(commands.add_parser(name, help=text, description=modules[name].__doc__))
    args = parser.parse_args()
    modules[args.command].run(args)


if __name__ == "__main__":
    main()
