"""What tokens say, and the automata of holes made of that."""

from collections import defaultdict
from functools import cached_property

from vllm_dlm import automaton
from vllm_dlm.automaton import Automaton, fewest_tokens
from vllm_dlm.shown import shown
from vllm_dlm.template import Hole, TemplateError


class Vocabulary:
    """Of a tokenizer and a model with `size` tokens; `ends`: those that end a hole, see `end_tokens`"""

    def __init__(self, tokenizer, size: int, mask_id: int, ends: list[int]):
        self.tokenizer, self.size, self.mask_id, self.ends = tokenizer, size, mask_id, ends

    @classmethod
    def of(cls, processor) -> "Vocabulary":
        if not hasattr(processor, "dlm_vocabulary"):
            model = processor.model_config
            mask_id = model.hf_config.mask_token_id
            tokenizer, size = processor.get_tokenizer(), model.get_vocab_size()
            processor.dlm_vocabulary = cls(tokenizer, size, mask_id, end_tokens(processor))
        return processor.dlm_vocabulary

    @cached_property
    def special(self) -> frozenset[int]:
        """Tokens that no text of an answer shows"""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        marked = {token for token, how in added.items() if how.special}
        return frozenset(marked | set(self.tokenizer.all_special_ids))

    @cached_property
    def texts(self) -> list[str | None]:
        """Of each token; None of those that are no text, or not a whole number of characters"""
        (anchor, *_) = self.tokenizer.encode("a", add_special_tokens=False)
        known = [token for token in range(min(self.size, len(self.tokenizer))) if token not in self.special]
        before = self.tokenizer.decode([anchor])
        decoded = self._decoded([[anchor, token] for token in known])
        texts: list[str | None] = [None] * self.size
        for token, text in zip(known, decoded, strict=True):
            whole = text.startswith(before) and "\ufffd" not in text and len(text) > len(before)
            texts[token] = text[len(before) :] if whole else None
        return texts

    def _decoded(self, rows: list[list[int]]) -> list[str]:
        if (fast := getattr(self.tokenizer, "backend_tokenizer", None)) is not None:
            return fast.decode_batch(rows, skip_special_tokens=False)
        return [self.tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in rows]

    @cached_property
    def ids_of(self) -> dict[str, list[int]]:
        found = defaultdict(list)
        for token, text in enumerate(self.texts):
            if text is not None:
                found[text].append(token)
        return dict(found)

    @cached_property
    def free(self) -> Automaton:
        return automaton.free(self.size, self.ends, self.mask_id)

    @cached_property
    def string(self) -> Automaton:
        return automaton.string(self.texts, self.ends)

    @cached_property
    def number(self) -> Automaton:
        return automaton.number(self.texts, self.ends)

    def one_of(self, alternatives: tuple[str, ...]) -> Automaton:
        return automaton.one_of(alternatives, self.ids_of, self.encoded, self.texts, self.ends)

    def encoded(self, text: str) -> list[int]:
        """Text as tokens, each of which is a part of it, and no others"""
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        if self.special.intersection(tokens):
            raise TemplateError(f"{shown(text)} has a token in it that is no text")
        if (written := self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)) != text:
            raise TemplateError(f"the tokenizer makes {shown(written)} of {shown(text)}")
        return tokens

    def automaton(self, hole: Hole) -> Automaton:
        if hole.kind != "one of":
            return getattr(self, hole.kind)
        for alternative in hole.alternatives:
            alone = self.one_of((alternative,))
            if (needed := int(fewest_tokens(alone)[list(alone.ends[:-1])].min())) > hole.length:
                raise TemplateError(
                    f"{shown(alternative)} has {needed} tokens at least, and its hole has {hole.length}"
                )
        return self.one_of(hole.alternatives)


def end_tokens(processor) -> list[int]:
    """The end of a sequence, of a turn, and what else the checkpoint says ends an answer; vLLM's own first."""
    config = processor.model_config.hf_config
    listed = processor.generation_config_fields.get("eos_token_id") or []
    own = getattr(processor.get_tokenizer(), "eos_token_id", None)
    listed = [listed] if isinstance(listed, int) else listed
    found = [own, config.eos_token_id, getattr(config, "eot_token_id", None), *listed]
    return list(dict.fromkeys(token for token in found if token is not None))
