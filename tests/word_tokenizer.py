"""A tokenizer with one word per id, for checkpoints with random weights."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers


def write_tokenizer(vocabulary: int, folder: Path) -> None:
    """Words w0, w1, …; the last two ids are the end of the text and the mask."""
    words = {f"w{i}": i for i in range(vocabulary - 2)} | {"<eos>": vocabulary - 2, "<mask>": vocabulary - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>", "<mask>"])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
