"""The demo's vocabulary: 6 specials, 256 bytes, and whole words that each cost one token.

One definition serves training (`encode`) and serving (`write_tokenizer`): the written
tokenizer.json must give the ids the model was trained on, and a test holds it to that.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path


def words(text: str) -> list[str]:
    return text.split()


BOS, EOS, MASK, HEADER_START, HEADER_END, EOT = range(6)
SPECIALS = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|mdm_mask|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
EMBEDDING_ROWS = 512  # rounded up so that a kernel meets no ragged edge

NAMES = words("""
    alice bob carol david emma frank grace henry irene jack karen leo maria nathan olivia peter quinn rachel
    steven tina ursula victor wendy xavier yvonne zach anna brian clara diana eric fiona george hannah ivan
    julia kevin laura martin nina oscar paula ralph sarah thomas violet walter amber bruce daisy edgar flora
    gavin helen isaac jenny kyle lucy mike norah owen polly robert simon
""")
ADJECTIVES = words("""
    red green blue small big old new quiet bright dark warm cold soft heavy slow quick round tall wild calm
""")
NOUNS = words("""
    river house garden stone tree road bird boat field cloud table window horse lamp bridge mountain forest
    market letter wheel kitchen village ship school tower
""")
VERBS = words("""
    follows sees finds holds passes covers moves meets keeps watches carries leaves reaches crosses guards
""")
GLUE = words("""
    The the What is are of and code codes a color Here we go There back again sky sun grass yellow near with
    Copy Reverse Sort Add Remember number tell me in order
""")
LETTERS = list("abcdefghijklmnopqrstuvwxyz")
LINE_STARTS = ["\n\n", *words("user assistant system The What Here There Copy Reverse Sort Add Remember")]
LATER_WORDS = ["Total", "Follow", " from"]  # appended, so that earlier ids do not change

# A word includes its leading space, and each digit is a token, which keeps positions of tasks regular.
PATTERN = r"\n+| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]|\s"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def _byte_symbols() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte, which byte-level tokenizers store."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols.update({byte: chr(256 + rank) for rank, byte in enumerate(others)})
    return symbols


BYTE_SYMBOLS = _byte_symbols()
SYMBOL_BYTES = {symbol: byte for byte, symbol in BYTE_SYMBOLS.items()}


def _symbols(text: str) -> str:
    return "".join(BYTE_SYMBOLS[byte] for byte in text.encode())


def _build_vocabulary() -> dict[str, int]:
    words = LINE_STARTS + [" " + letter for letter in LETTERS]
    words += [" " + word for word in NAMES + ADJECTIVES + NOUNS + VERBS + GLUE] + LATER_WORDS
    entries = SPECIALS + [BYTE_SYMBOLS[byte] for byte in range(256)] + [_symbols(w) for w in words]
    return {entry: rank for rank, entry in enumerate(dict.fromkeys(entries))}


VOCABULARY = _build_vocabulary()
ENTRIES = list(VOCABULARY)
assert len(VOCABULARY) <= EMBEDDING_ROWS
DIGIT_IDS = [VOCABULARY[str(digit)] for digit in range(10)]
_SPLIT = re.compile(PATTERN)


@cache
def _piece_ids(piece: str) -> tuple[int, ...]:
    symbols = _symbols(piece)
    whole = VOCABULARY.get(symbols)
    return (whole,) if whole is not None else tuple(VOCABULARY[s] for s in symbols)


def encode(text: str) -> list[int]:
    """Ids of plain text; special tokens are never parsed out of it."""
    return [i for piece in _SPLIT.findall(text) for i in _piece_ids(piece)]


def decode(ids, keep_specials: bool = False) -> str:
    raw = b""
    for i in map(int, ids):
        if i < len(SPECIALS):
            raw += SPECIALS[i].encode() if keep_specials else b""
        elif i < len(ENTRIES):
            raw += bytes(SYMBOL_BYTES[symbol] for symbol in ENTRIES[i])
    return raw.decode("utf8", "replace")


CHAT_PREFIX = [BOS, HEADER_START, *encode("user"), HEADER_END, *encode("\n\n")]
CHAT_SUFFIX = [EOT, HEADER_START, *encode("assistant"), HEADER_END, *encode("\n\n")]


def chat(content: str) -> list[int]:
    """What the chat template makes of one user message."""
    return CHAT_PREFIX + encode(content) + CHAT_SUFFIX


def write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = dict(VOCABULARY)
    for rank in range(len(vocabulary), EMBEDDING_ROWS):
        vocabulary[f"<|reserved_{rank}|>"] = rank
    # No merges: a piece is either a whole word of the vocabulary or falls apart into bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[BOS],
        "eos_token": SPECIALS[EOS],
        "pad_token": SPECIALS[EOS],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
