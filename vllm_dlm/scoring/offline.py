"""Scores from an `LLM`, without a server."""

from itertools import islice
from typing import Any

from vllm_dlm.configuration import is_diffusion_lm, server_options_of
from vllm_dlm.options.limits import UNLIMITED
from vllm_dlm.refusal import ONLY_DIFFUSION, refuse
from vllm_dlm.scoring.pairs import PairInputs, Text
from vllm_dlm.scoring.scores import How, PairScore, Score, jobs, resolved

#: number of forwards per call of the LLM, which bounds the memory of their masks
AT_ONCE = 1024


def score(
    llm: Any,
    context: Text | list[Text],
    continuation: Text | list[Text],
    *,
    add_special_tokens: bool = True,
    **how: Any,
) -> list[Score]:
    """Log-probabilities of continuations given contexts. Both are texts or token ids, one of each or lists.

    `how`: see `How`, and docs/evaluation.md. The limits of a server do not apply."""
    processor = llm.llm_engine.input_processor
    if not is_diffusion_lm(processor.model_config):
        refuse("score", processor.model_config.architecture, ONLY_DIFFUSION)
    fields = How(**how)
    method = resolved(fields, server_options_of(processor.model_config).attention)
    inputs = PairInputs.from_request(context, continuation, method, processor, UNLIMITED)
    scores = [PairScore(pair, method) for pair in inputs.pairs(inputs.encode(add_special_tokens))]
    to_do = jobs(scores)
    while part := list(islice(to_do, AT_ONCE)):
        outputs = llm.generate(
            [{"prompt_token_ids": own.pair.context} for own, _, _ in part],
            [params for _, _, params in part],
            priority=[fields.priority] * len(part),
            use_tqdm=False,
        )
        for (own, forward, _), output in zip(part, outputs, strict=True):
            (one,) = output.outputs
            if one.finish_reason != "length":
                raise RuntimeError(f"a forward of a score ended with {one.finish_reason!r}: {one.stop_reason}")
            own.add(forward, one.logprobs)
    return [own.score() for own in scores]
