"""`python -m benchmarks NAME --device cpu|cuda [--model PATH]`: see `--help`."""

from benchmarks.lib import redraw, runner
from benchmarks.lib.report import RESULTS
from benchmarks.lib.suite import parser


def main() -> None:
    options = parser().parse_args()
    if options.name == "redraw":
        redraw.redraw(options.results, options.names)
        return
    done = runner.run(options)
    if done and done.complete and options.name == "all" and options.device == "cpu" and options.results == RESULTS:
        redraw.redraw_pages()


if __name__ == "__main__":
    main()
