"""Ids of special tokens from a checkpoint's tokenizer files, without building the tokenizer."""

from collections.abc import Iterator

from vllm.transformers_utils.repo_utils import get_hf_file_to_dict


def token_id(content: str, folder: str, revision: str | None) -> int | None:
    """The id of a special token"""
    return next((number for text, number in _special(folder, revision) if text == content), None)


def mask_token_id(folder: str, revision: str | None) -> int | None:
    """The id of the tokenizer's mask token"""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        mask = (get_hf_file_to_dict(name, folder, revision) or {}).get("mask_token")
        if mask is not None:
            return token_id(mask["content"] if isinstance(mask, dict) else mask, folder, revision)
    return None


def _special(folder: str, revision: str | None) -> Iterator[tuple[str, int]]:
    config = get_hf_file_to_dict("tokenizer_config.json", folder, revision) or {}
    for number, token in config.get("added_tokens_decoder", {}).items():
        yield token["content"], int(number)
    for token in (get_hf_file_to_dict("tokenizer.json", folder, revision) or {}).get("added_tokens", []):
        yield token["content"], token["id"]
