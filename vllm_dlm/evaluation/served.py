"""HTTP client for evaluations: generated texts, likelihoods and rendered chats. Independent of lm_eval."""

import os
from collections.abc import Mapping
from typing import Any

import httpx

#: field of a task's generation_kwargs -> field of the body of /v1/completions
SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "seed": "seed"}
#: names that tasks use for the length of a response; the first one that is given is used
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Served:
    def __init__(self, base_url: str, model: str | None = None, timeout: float = 3600, at_once: int = 16):
        url = base_url.rstrip("/").removesuffix("/v1")
        key = os.environ.get("OPENAI_API_KEY")
        limits = httpx.Limits(max_connections=at_once)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=timeout, limits=limits)
        self.model = model or self._answered(self.http.get("/v1/models"))["data"][0]["id"]

    @staticmethod
    def _answered(response: httpx.Response) -> dict:
        if response.status_code != 200:
            raise ValueError(f"{response.request.url.path}: HTTP {response.status_code}: {response.text[:1000]}")
        return response.json()

    def post(self, path: str, **body: Any) -> dict:
        return self._answered(self.http.post(path, json={"model": self.model, **body}))

    def text(self, prompt: str, kwargs: Mapping[str, Any], usual_length: int, **fixed: Any) -> str:
        """Generates a text. `kwargs`: a task's generation_kwargs; fields that the server would ignore are rejected."""
        given = dict(kwargs)
        lengths = [int(given.pop(name)) for name in LENGTHS if name in given]
        until, sampled = given.pop("until", None) or [], given.pop("do_sample", None)
        body = {SAMPLING[name]: given.pop(name) for name in [*given] if name in SAMPLING}
        if sampled is False or "temperature" not in body:
            body["temperature"] = 0.0
        options = {name: given.pop(name) for name in [*given] if name.startswith("dlm_")}
        if given:
            read = ", ".join(["until", "do_sample", *LENGTHS, *SAMPLING, "dlm_*"])
            raise ValueError(f"generation_kwargs: {', '.join(given)} not supported; supported are {read}")
        body |= {"prompt": prompt, "max_tokens": lengths[0] if lengths else usual_length}
        stop = [until] if isinstance(until, str) else [each for each in until if each]
        fixed["vllm_xargs"] = {**fixed.get("vllm_xargs", {}), **options}
        return self.post("/v1/completions", stop=stop, **{**body, **fixed})["choices"][0]["text"]

    def likelihood(self, context: str, continuation: str, **how: Any) -> tuple[float, bool]:
        """-> (log-probability, whether every token is the most probable one). As in the harness's other models, spaces
        between context and continuation belong to the continuation."""
        stripped = context.rstrip()
        if not stripped:
            raise ValueError("bos: must be set, because this task scores texts without a context")
        body = {"context": stripped, "continuation": context[len(stripped) :] + continuation}
        (score,) = self.post("/v1/dlm/score", **body, **how)["data"]
        return score["logprob"], score["is_greedy"]

    def tokens(self, **body: Any) -> list[int]:
        return self.post("/tokenize", **body)["tokens"]

    def rendered(self, messages: list[dict], generate: bool) -> str:
        """Renders a chat with the server's chat template"""
        ids = self.tokens(
            messages=messages,
            add_generation_prompt=generate,
            continue_final_message=not generate,
            add_special_tokens=False,
        )
        return self.post("/detokenize", tokens=ids)["prompt"]
