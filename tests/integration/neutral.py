"""Requests to an autoregressive server, and what is compared of its answers with and without the plugin."""

import json
import re
from pathlib import Path
from typing import Any

import httpx

MODEL = "model"
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
MESSAGES = [{"role": "user", "content": "w1 w2 w3"}]
SCHEMA = {"type": "object", "properties": {"w1": {"type": "integer"}}, "required": ["w1"]}


def complete(**fields) -> tuple[str, str, dict]:
    usual = {"model": MODEL, "prompt": "w5 w6 w7", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    return "POST", COMPLETIONS, usual | fields


def chat(**fields) -> tuple[str, str, dict]:
    usual = {"model": MODEL, "messages": MESSAGES, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    return "POST", CHAT, usual | fields


#: name -> (method, path, body)
REQUESTS: dict[str, tuple[str, str, Any]] = {
    "completion": complete(),
    "token ids": complete(prompt=[5, 6, 7], return_token_ids=True),
    "two prompts": complete(prompt=["w5 w6", "w7"]),
    "streamed": complete(stream=True),
    "streamed with usage": complete(stream=True, stream_options={"include_usage": True}),
    "log-probabilities": complete(logprobs=3),
    "echo": complete(echo=True),
    "echo with log-probabilities": complete(echo=True, logprobs=2),
    "prompt log-probabilities": complete(prompt_logprobs=1),
    "three choices": complete(n=3, seed=7, temperature=1.0),
    "stop": complete(stop=["w1"], max_tokens=24),
    "stop token": complete(stop_token_ids=[9], max_tokens=24),
    "penalties": complete(presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2),
    "logit bias": complete(logit_bias={"12": 100}),
    "bad words": complete(bad_words=["w12"]),
    "least tokens": complete(min_tokens=3, ignore_eos=False),
    "without max_tokens": complete(max_tokens=None),
    "beam search": complete(use_beam_search=True, n=2),
    "choice": complete(structured_outputs={"choice": ["w1", "w2"]}),
    "priority": complete(priority=3),
    "suffix": complete(suffix="w9"),
    "suffix, streamed": complete(suffix="w9", stream=True),
    "cache salt": complete(cache_salt="salt"),
    "chat": chat(),
    "chat, streamed": chat(stream=True),
    "chat, log-probabilities": chat(logprobs=True, top_logprobs=2),
    "chat, two choices": chat(n=2, seed=7, temperature=1.0),
    "chat, regular expression": chat(structured_outputs={"regex": "(w1|w2)w3"}, ignore_eos=False),
    "chat, a grammar that is none": chat(structured_outputs={"grammar": "root ::= ("}),
    "chat, tools": chat(tools=[{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]),
    "chat, no messages": chat(messages=[]),
    "chat, another role": chat(messages=[{"role": "nobody", "content": 3}]),
    "response": ("POST", RESPONSES, {"model": MODEL, "input": "w1 w2", "max_output_tokens": 6, "temperature": 0}),
    "another model": complete(model="another"),
    "no prompt": complete(prompt=None),
    "empty prompt": complete(prompt=""),
    "too long": complete(prompt="w5 " * 600),
    "max_tokens below 1": complete(max_tokens=0),
    "temperature below 0": complete(temperature=-1),
    "top_p above 1": complete(top_p=2),
    "a token outside the vocabulary": complete(prompt=[100000]),
    "a field of another type": complete(max_tokens="many"),
    "an unknown field": complete(unknown=1),
    "unknown in vllm_xargs": complete(vllm_xargs={"unknown": 1}),
    "not JSON": ("POST", COMPLETIONS, b"{"),
    "dlm field": complete(dlm_steps=4),
    "dlm field, streamed": complete(dlm_steps=4, stream=True),
    "dlm field, chat": chat(dlm_frames=1, stream=True),
    "dlm field, response": ("POST", RESPONSES, {"model": MODEL, "input": "w1", "max_output_tokens": 2, "dlm_steps": 1}),
    "dlm in vllm_xargs": complete(vllm_xargs={"dlm_steps": 4, "dlm_nonsense": "x"}),
    "dlm_template in vllm_xargs": complete(vllm_xargs={"dlm_template": "w1 [[8]]"}, max_tokens=None),
    "dlm_frames in vllm_xargs": complete(vllm_xargs={"dlm_frames": 1}, stream=True),
    "dlm_trajectory in vllm_xargs": chat(vllm_xargs={"dlm_trajectory": 1, "dlm_watch": 1}),
    "tokenize": ("POST", "/tokenize", {"model": MODEL, "prompt": "w1 w2"}),
    "tokenize with a dlm field": ("POST", "/tokenize", {"model": MODEL, "prompt": "w1 w2", "dlm_steps": 1}),
    "detokenize": ("POST", "/detokenize", {"model": MODEL, "tokens": [1, 2]}),
    "embeddings": ("POST", "/v1/embeddings", {"model": MODEL, "input": "w1"}),
    "models": ("GET", "/v1/models", None),
    "version": ("GET", "/version", None),
    "health": ("GET", "/health", None),
    "schema": ("GET", "/openapi.json", None),
    "metrics": ("GET", "/metrics", None),
    "an unknown route": ("GET", "/v1/nothing", None),
    "the wrong method": ("GET", COMPLETIONS, None),
    "the score's route": ("POST", "/v1/dlm/score", {"model": MODEL, "context": "w1", "continuation": "w2"}),
    "the score's route, GET": ("GET", "/v1/dlm/score", None),
    "the page": ("GET", "/dlm", None),
    "requests of the page": ("GET", "/dlm/requests", None),
    "options of the page": ("GET", "/dlm/options", None),
}

#: what differs between two servers that are alike
VOLATILE = {"id", "created", "created_at", "completed_at", "request_id", "item_id"}
IDS = re.compile(r"\b(cmpl|chatcmpl|modelperm|resp|msg|rs)[-_][0-9a-f-]+")


def ask(url: str, name: str) -> dict:
    """What one request is answered with, as far as two servers must agree on it."""
    method, path, body = REQUESTS[name]
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    kind = {"content-type": "application/json"}
    answer = httpx.request(method, f"{url}{path}", content=content, headers=kind, timeout=120, trust_env=False)
    headers = {name: value for name, value in answer.headers.items() if name not in ("date", "content-length")}
    return {"status": answer.status_code, "headers": headers, "body": compared(answer, path)}


def compared(answer: httpx.Response, path: str) -> Any:
    kind = answer.headers.get("content-type", "")
    if path == "/metrics" and answer.status_code == 200:
        return sorted(line for line in answer.text.splitlines() if line.startswith("#"))
    if kind.startswith("text/event-stream"):
        return streamed(answer.text)
    return steady(answer.json()) if kind.startswith("application/json") else answer.text


def streamed(text: str) -> dict:
    """How tokens are shared out among chunks depends on time, so what they add up to is compared."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    choices = [choice for chunk in chunks for choice in chunk.get("choices", [])]
    return {
        "text": "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices),
        "keys": sorted({key for chunk in chunks for key in chunk} | {key for choice in choices for key in choice}),
        "reasons": [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        "usage": chunks[-1].get("usage"),
        "end": lines[-1],
    }


def steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: "…" if key in VOLATILE else steady(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [steady(inner) for inner in value]
    return IDS.sub("…", value) if isinstance(value, str) else value


def resident(pid: int) -> float:
    """MiB"""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024
