"""Texts of the vocabulary's tokens, and automata of template holes built from them."""

from functools import cached_property

from vllm_dlm.client_cache import ClientCache
from vllm_dlm.options.texts import Layout
from vllm_dlm.request import hole_automata
from vllm_dlm.request.hole_automata import TokenTexts
from vllm_dlm.request.served_model import ServedModel
from vllm_dlm.request.template import Hole, TemplateError
from vllm_dlm.shown import shown

#: automaton of a hole's alternatives as plain data, and the minimum number of tokens of each alternative
KnownAlternatives = tuple[dict, tuple[int | None, ...]]


class Vocabulary:
    """Texts of a tokenizer's tokens for a model with `size` tokens. `ends`: tokens that end a hole"""

    def __init__(self, tokenizer, size: int, mask_id: int, ends: list[int]):
        self.tokenizer, self.size, self.mask_id, self.ends = tokenizer, size, mask_id, ends
        #: layouts of accepted templates, by text
        self.layouts: ClientCache[str, Layout] = ClientCache("layouts")
        self.alternatives: ClientCache[tuple[str, ...], KnownAlternatives] = ClientCache("alternatives")

    @cached_property
    def special(self) -> frozenset[int]:
        """Tokens that are never shown in an answer's text"""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        marked = {token for token, how in added.items() if how.special}
        return frozenset(marked | set(self.tokenizer.all_special_ids))

    @cached_property
    def no_text(self) -> frozenset[int]:
        """Tokens that are not part of an answer's text"""
        return self.special | {self.mask_id, *self.ends}

    @cached_property
    def texts(self) -> TokenTexts:
        """Text of each token; None for tokens without text or with incomplete characters"""
        (anchor, *_) = self.tokenizer.encode("a", add_special_tokens=False)
        known = [token for token in range(min(self.size, len(self.tokenizer))) if token not in self.no_text]
        before = self.tokenizer.decode([anchor])
        decoded = self._decoded([[anchor, token] for token in known])
        texts: list[str | None] = [None] * self.size
        for token, text in zip(known, decoded, strict=True):
            whole = text.startswith(before) and "\ufffd" not in text and len(text) > len(before)
            texts[token] = text[len(before) :] if whole else None
        return TokenTexts(texts)

    def _decoded(self, rows: list[list[int]]) -> list[str]:
        if (fast := getattr(self.tokenizer, "backend_tokenizer", None)) is not None:
            return fast.decode_batch(rows, skip_special_tokens=False)
        return [self.tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows]

    @cached_property
    def free(self) -> dict:
        return hole_automata.free(self.size, self.ends, self.mask_id).plain()

    @cached_property
    def string(self) -> dict:
        return hole_automata.string(self.texts.texts, self.ends).plain()

    @cached_property
    def number(self) -> dict:
        return hole_automata.number(self.texts.texts, self.ends).plain()

    def encoded(self, text: str) -> list[int]:
        """Encodes a text without special tokens and such that decoding restores it; raises TemplateError otherwise"""
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        if self.no_text.intersection(tokens):
            raise TemplateError(f"{shown(text)} contains a token that has no text or ends an answer")
        if (written := self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)) != text:
            raise TemplateError(f"the tokenizer changes {shown(text)} to {shown(written)}")
        return tokens


class HoleAutomata:
    """The distinct automata of a template's holes as plain data"""

    def __init__(self, vocabulary: Vocabulary, holes: list[Hole]):
        self.vocabulary = vocabulary
        self.plain, self.numbers = list[dict](), list[int]()  # automata, and the index of each hole's automaton
        self.alternatives: dict[tuple[str, ...], KnownAlternatives] = {}
        known: dict[tuple[str, tuple[str, ...]], int] = {}
        for hole in holes:
            made = self._made(hole)
            number = known.setdefault((hole.kind, hole.alternatives), len(known))
            if number == len(self.plain):
                self.plain.append(made)
            self.numbers.append(number)

    def _made(self, hole: Hole) -> dict:
        if hole.kind != "one of":
            return getattr(self.vocabulary, hole.kind)
        key = hole.alternatives
        if (known := self.alternatives.get(key) or self.vocabulary.alternatives.get(key)) is None:
            texts, ends = self.vocabulary.texts, self.vocabulary.ends
            made = hole_automata.one_of(key, texts, self.vocabulary.encoded, ends)
            known = made.automaton.plain(), made.fewest
        self.alternatives[key] = known
        for alternative, fewest in zip(key, known[1], strict=True):
            if fewest is None:
                raise TemplateError(f"no sequence of tokens has the text {shown(alternative)}")
            if fewest > hole.length:
                raise TemplateError(f"{shown(alternative)} has at least {fewest} tokens, and its hole {hole.length}")
        return known[0]

    def keep(self) -> None:
        """Caches the alternatives once the template is accepted."""
        for key, known in self.alternatives.items():
            self.vocabulary.alternatives.put(key, known)


def vocabulary_of(model: ServedModel) -> Vocabulary:
    """The vocabulary of an input processor"""
    processor = model.processor
    if not hasattr(processor, "dlm_vocabulary"):
        tokenizer, size = processor.get_tokenizer(), model.vocabulary_size
        processor.dlm_vocabulary = Vocabulary(tokenizer, size, model.mask_id, model.end_tokens())
    return processor.dlm_vocabulary
