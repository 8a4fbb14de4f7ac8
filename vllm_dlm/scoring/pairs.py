"""Converts the texts or token ids of a request for scores to pairs of token ids, and checks them.

The size of the whole request is checked (`limits.score_*` of a server; an `LLM` has no limits) before any text is
encoded or list of token ids is read.
"""

from dataclasses import dataclass
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_dlm.configuration import server_options_of
from vllm_dlm.options.limits import Limits
from vllm_dlm.refusal import refuse
from vllm_dlm.request.prompts import prompt_ids
from vllm_dlm.scoring.scores import Method, Pair

Text = str | list[int]

#: type of contexts and continuations, for errors
WANTED = "a text, a list of token ids, or a list of either"


@dataclass(frozen=True)
class PairInputs:
    """Unencoded contexts and continuations, one of each per pair. A shared context or continuation is one object."""

    contexts: list[Text]
    continuations: list[Text]
    processor: Any  # vLLM's InputProcessor

    @classmethod
    def from_request(cls, context: Any, continuation: Any, method: Method, processor, limits: Limits) -> "PairInputs":
        """A single context is paired with each continuation, and a single continuation with each context."""
        given = {"context": context, "continuation": continuation}
        texts = {field: listed(field, value, limits) for field, value in given.items()}
        number = max(map(len, texts.values()))
        for field, own in texts.items():
            if len(own) not in (1, number):
                other = "continuation" if field == "context" else "context"
                refuse(field, f"{len(own)} entries", f"there must be 1 or {number}, the number of entries of {other}")
        if number * method.mc_num > limits.score_draws:
            what = f"{method.mc_num} draws for each of {number} pairs"
            refuse_above("mc_num", what, limits, "score_draws")
        ids = sum(len(each) for own in texts.values() for each in own if isinstance(each, list))
        contexts, continuations = (own if len(own) == number else own * number for own in texts.values())
        characters = ids + sum(len(each) for each in [*contexts, *continuations] if isinstance(each, str))
        if characters > limits.score_characters:
            what = f"{characters} characters and token ids"
            refuse_above("context and continuation", what, limits, "score_characters")
        for before, after in zip(contexts, continuations, strict=True):
            if isinstance(after, str) and not isinstance(before, str):
                refuse("continuation", after, "it must be token ids if the context is")
        return cls(contexts, continuations, processor)

    def texts(self) -> dict[str, str]:
        """Texts to encode -> field to name in an error about their length. The texts of a pair are encoded together, as
        in other evaluations, because the tokens at their border depend on both."""
        found: dict[str, str] = {}
        for context, continuation in zip(self.contexts, self.continuations, strict=True):
            if isinstance(context, str):
                found[context] = "context"
                if isinstance(continuation, str):
                    found[context + continuation] = "context and continuation"
        return found

    def encode(self, add_special_tokens: bool) -> dict[str, list[int]]:
        """Token ids of each text. vLLM's renderer checks the number of characters first, then the number of tokens."""
        renderer, params = self.processor.renderer, self.tokenize_params(add_special_tokens)
        encoded = {}
        for text, field in self.texts().items():
            try:
                encoded[text] = renderer.tokenize_prompt({"prompt": text}, params)["prompt_token_ids"]
            except VLLMValidationError:
                self.refuse_length(text, field)
        return encoded

    async def encode_async(self, add_special_tokens: bool) -> dict[str, list[int]]:
        """Like `encode`, in the renderer's own threads, one text at a time."""
        renderer, params = self.processor.renderer, self.tokenize_params(add_special_tokens)
        encoded = {}
        for text, field in self.texts().items():
            try:
                prompt = await renderer.tokenize_prompt_async({"prompt": text}, params)
            except VLLMValidationError:
                self.refuse_length(text, field)
            encoded[text] = prompt["prompt_token_ids"]
        return encoded

    def tokenize_params(self, add_special_tokens: bool):
        return self.processor.renderer.default_cmpl_tok_params.with_kwargs(add_special_tokens=add_special_tokens)

    def refuse_length(self, text: str, field: str):
        room = f"the model's length of {self.processor.model_config.max_model_len} tokens"
        refuse(field, f"a text of {len(text)} characters", f"it must fit into {room}")

    def pairs(self, encoded: dict[str, list[int]]) -> list[Pair]:
        """`encoded`: result of `encode`. A context shared by several pairs is checked once and stays one list."""
        own = {text: prompt_ids(ids, True, None, self.processor) for text, ids in encoded.items()}
        pairs = []
        for context, continuation in zip(self.contexts, self.continuations, strict=True):
            before = own[context] if isinstance(context, str) else context
            if isinstance(continuation, str):
                assert isinstance(context, str)
                continuation = own[context + continuation][len(before) :]
            pairs.append(Pair(before, continuation))
        for pair in pairs:
            check_lengths(pair, self.processor)
        for field in ("context", "continuation"):
            for ids in {id(ids): ids for ids in (getattr(pair, field) for pair in pairs)}.values():
                check_tokens(field, ids, self.processor)
        return pairs


def listed(field: str, given: Any, limits: Limits) -> list[Text]:
    """The texts or lists of token ids of a field. Only the first token id of a list is checked here, see
    `check_tokens`."""
    if is_text(given):
        return [given]
    if not isinstance(given, list) or not given:
        refuse(field, given, f"it must be {WANTED}, none of them empty")
    if len(given) > limits.score_pairs:
        refuse_above(field, f"{len(given)} pairs", limits, "score_pairs")
    if not all(map(is_text, given)):
        refuse(field, given, f"it must be {WANTED}, none of them empty")
    return given


def is_text(given: Any) -> bool:
    return isinstance(given, str) or (isinstance(given, list) and bool(given) and type(given[0]) is int)


def refuse_above(field: str, what: str, limits: Limits, limit: str):
    refuse(field, what, f"at most {getattr(limits, limit)} are allowed (--dlm-config limits.{limit})")


def check_lengths(pair: Pair, processor) -> None:
    model = processor.model_config
    options = server_options_of(model)
    number, answer = len(pair.context), len(pair.continuation)
    for field, ids in (("context", pair.context), ("continuation", pair.continuation)):
        if not ids:
            refuse(field, ids, "it must have at least one token")
    if options.canvas.max is not None and answer > options.canvas.max:
        refuse("continuation", f"{answer} tokens", f"the maximum canvas of this server is {options.canvas.max}")
    if number + answer > options.canvas_length(number, answer, model.max_model_len):
        both, room = f"{number} and {answer} tokens", model.max_model_len
        refuse("context and continuation", both, f"they must fit into the model's length of {room} tokens")


def check_tokens(field: str, ids: list[int], processor) -> None:
    """Uses a few passes in C over a list that is no longer than the model's length."""
    model = processor.model_config
    mask_id, vocabulary = model.hf_config.mask_token_id, model.get_vocab_size()
    if set(map(type, ids)) != {int}:
        refuse(field, ids, f"it must be {WANTED}")
    if min(ids) >= 0 and max(ids) < vocabulary and mask_id not in ids:
        return
    wrong = next(token for token in ids if not 0 <= token < vocabulary or token == mask_id)
    refuse(field, wrong, f"token ids must be between 0 and {vocabulary - 1}, except the mask, {mask_id}")
