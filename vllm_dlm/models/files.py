"""Errors for truncated weight files, because safetensors reports them without the file name."""

from pathlib import Path

from safetensors import SafetensorError, safe_open


def refuse_unreadable(architecture: str, folder: str) -> None:
    """Reads the file headers of a local checkpoint. A checkpoint in the hub's cache is checked when its tensors are
    read."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise unreadable(architecture, str(path), error) from None


def unreadable(architecture: str, what: str, error: SafetensorError) -> ValueError:
    reason = str(error).splitlines()[0]
    return ValueError(f"{architecture}: {what} cannot be read, the file may be incomplete: {reason}")
