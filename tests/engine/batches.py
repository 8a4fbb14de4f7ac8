"""Reuse policies and their presets, from the registry."""

from tests.soak.requests import names
from vllm_dlm.methods import methods

CHECKPOINTS = ["llada-tiny", "llada-tiny-gqa", "dream-tiny"]


def with_presets(name: str) -> list[str]:
    """A reuse policy, and of its presets the first and the last."""
    presets = [found for found in names("reuse") if found.startswith(f"{name}/")]
    return [name, *dict.fromkeys(presets[:1] + presets[-1:])]


POLICIES = [found for name in sorted(methods("reuse")) for found in with_presets(name)]
