"""A throw-away distribution that brings methods, as a user's own package does: modules and a dist-info, without pip."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_dlm.methods import methods


@contextmanager
def installed(folder: Path, points: dict[str, str]) -> Iterator[dict[str, str]]:
    """`points`: name -> "module:Class", of modules that lie in tests/external/methods. They are copied to `folder`,
    where this process finds them while inside; other processes do in the environment that is yielded."""
    modules = {target.partition(":")[0] for target in points.values()}
    for module in modules:
        shutil.copy(Path(__file__).parent / "methods" / f"{module}.py", folder)
    info = folder / "throw_away_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: throw-away-methods\nVersion: 1.0\n")
    listed = "".join(f"{name} = {target}\n" for name, target in points.items())
    (info / "entry_points.txt").write_text(f"[vllm_dlm.methods]\n{listed}")
    sys.path.insert(0, str(folder))
    methods.cache_clear()
    try:
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        yield os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    finally:
        sys.path.remove(str(folder))
        for module in modules:
            sys.modules.pop(module, None)
        methods.cache_clear()
