"""What a server without the live view answers to requests that want to be watched."""

import httpx
import openai
import pytest

from tests.integration.serving import COPY, options


def test_without_the_flag_there_is_nothing_to_see(server, ask):
    assert [
        httpx.get(f"{server.url}{path}", timeout=60, trust_env=False).status_code for path in ("/dlm", "/dlm/requests")
    ] == [404, 404]
    with pytest.raises(openai.BadRequestError, match="--dlm-view"):
        ask(COPY, extra=options(dlm_watch=1))


def test_frames_want_a_stream(server, ask):
    with pytest.raises(openai.BadRequestError, match="dlm_frames"):
        ask(COPY, extra=options(dlm_frames=1))
    with pytest.raises(openai.BadRequestError, match="dlm_frames"):
        server.client.responses.create(
            model=server.model, input=COPY, max_output_tokens=16, extra_body=options(dlm_frames=1)
        )
