"""The recorded run that fills holes, over HTTP."""

from tests.conftest import GOLDEN
from tests.engine.test_infill import recorded_infill
from tests.integration.serving import serving


def test_recorded_infill_over_http(tmp_path, golden_runs):
    checkpoint = GOLDEN / "checkpoints" / "dream-tiny"
    settings = ("--dtype", "float32", "--max-model-len", "256", "--kv-cache-memory-bytes", str(16 << 20))
    with serving(tmp_path / "log.txt", *settings, checkpoint=checkpoint) as server:
        (prompt, params), recorded = recorded_infill(golden_runs, mask=397)
        asked = {
            "model": server.model, "prompt": prompt["prompt_token_ids"], "max_tokens": params.max_tokens,
            "temperature": 0,
        }  # fmt: skip
        extra = {"ignore_eos": True, "return_token_ids": True, "vllm_xargs": params.extra_args}
        answer = server.client.completions.create(**asked, extra_body=extra)
        assert tuple(answer.choices[0].token_ids) == recorded
        pieces = list(server.client.completions.create(**asked, extra_body=extra, stream=True))
        assert tuple(token for piece in pieces for token in piece.choices[0].token_ids or ()) == recorded
