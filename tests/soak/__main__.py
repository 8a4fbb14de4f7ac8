"""`python -m tests.soak`: see the package's docstring and `--help`."""

import argparse

from tests import soak

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=soak.__doc__)
    soak.add_arguments(parser)
    soak.run(parser.parse_args())
