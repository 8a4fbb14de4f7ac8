"""The recorded runs that fill holes, over HTTP, in a stream and not. (Their prompts are random tokens, no chat's.)"""

import pytest

from tests.conftest import GOLDEN
from tests.engine.test_golden import requests_of
from tests.engine.test_infill import recorded_infill
from tests.integration.serving import serving

MASKS_IN_PROMPT = "llada.infill_masks_in_prompt_g16_b16_s8_t0"


def dream(golden_runs):
    (prompt, params), recorded = recorded_infill(golden_runs, mask=397)
    return prompt, params, recorded


def llada(golden_runs):
    """LLaDA's reference returns the masks that it had no quota left for; here they are filled."""
    ((prompt, params, recorded),) = requests_of(MASKS_IN_PROMPT, golden_runs[MASKS_IN_PROMPT])
    return prompt, params, tuple(None if token == 392 else token for token in recorded)


@pytest.mark.slow
@pytest.mark.parametrize(("checkpoint", "recorded_by"), [("dream-tiny", dream), ("llada-tiny", llada)])
def test_recorded_infill_over_http(tmp_path, golden_runs, checkpoint, recorded_by):
    settings = ("--dtype", "float32", "--max-model-len", "256", "--kv-cache-memory-bytes", str(16 << 20))
    prompt, params, recorded = recorded_by(golden_runs)
    with serving(tmp_path / "log.txt", *settings, checkpoint=GOLDEN / "checkpoints" / checkpoint) as server:
        asked = {
            "model": server.model,
            "prompt": prompt["prompt_token_ids"],
            "max_tokens": params.max_tokens,
            "temperature": 0,
        }
        extra = {"ignore_eos": True, "return_token_ids": True, "vllm_xargs": params.extra_args}
        answer = server.client.completions.create(**asked, extra_body=extra)
        pieces = list(server.client.completions.create(**asked, extra_body=extra, stream=True))
        streamed = [token for piece in pieces for token in piece.choices[0].token_ids or ()]
    for got in (answer.choices[0].token_ids, streamed):
        assert len(got) == len(recorded)
        assert all(want is None or token == want for token, want in zip(got, recorded, strict=True))
