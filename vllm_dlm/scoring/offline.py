"""Scores from an `LLM`, without a server."""

from typing import Any

from vllm_dlm.integration.registration import is_diffusion_lm
from vllm_dlm.integration.requests import ONLY_DIFFUSION, refuse, server_options_of
from vllm_dlm.scoring.pairs import Text, pairs_of
from vllm_dlm.scoring.scores import How, Read, Score, forwards, resolved


def score(
    llm: Any,
    context: Text | list[Text],
    continuation: Text | list[Text],
    *,
    add_special_tokens: bool = True,
    **how: Any,
) -> list[Score]:
    """Log-probabilities of continuations given contexts, texts or token ids, one of each or lists.

    `how`: see `How`, and docs/evaluation.md."""
    processor = llm.llm_engine.input_processor
    if not is_diffusion_lm(processor.model_config):
        refuse("score", processor.model_config.architecture, ONLY_DIFFUSION)
    method = resolved(How(**how), server_options_of(processor).attention)
    pairs = pairs_of(context, continuation, add_special_tokens, processor)
    asked = [(pair, forward) for pair in pairs for forward in forwards(pair, method)]
    outputs = llm.generate(
        [{"prompt_token_ids": pair.context} for pair, _ in asked],
        [forward.params(pair, method) for pair, forward in asked],
        use_tqdm=False,
    )
    reads: dict[int, list[Read]] = {id(pair): [] for pair in pairs}
    for (pair, forward), output in zip(asked, outputs, strict=True):
        (one,) = output.outputs
        if one.finish_reason != "length":
            raise RuntimeError(f"a forward of a score ended with {one.finish_reason!r}: {one.stop_reason}")
        reads[id(pair)].append(Read.of(forward, pair, one.logprobs))
    return [Score.of(pair, method, reads[id(pair)]) for pair in pairs]
