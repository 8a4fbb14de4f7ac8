"""Clients that leave, counters that add up, and vLLM's own benchmark."""

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.integration.serving import BLOCK, CHECKPOINT, COPIED, COPY, chat_text, needle, vllm_environment
from vllm_dlm.client import connect
from vllm_dlm.demo.server import vllm_command


def test_streams_closed_halfway_leave_nothing_behind(server, client, model, complete, ask):
    """Some of the requests are running, some still wait for memory, when their clients go."""
    before = server.metrics()["vllm:generation_tokens_total"]
    fields = {
        "model": model,
        "prompt": "The",
        "max_tokens": 300,
        "stream": True,
        "extra_body": {"ignore_eos": True},
    }
    leaving = connect(server.url)
    streams = []
    try:
        streams += [leaving.completions.create(**fields) for _ in range(2)]
        streams += [client.completions.create(**fields) for _ in range(10)]
        for stream in streams[1:4]:
            for chunk in stream:
                assert chunk.choices[0].finish_reason is None
                break
        metrics = server.metrics()
        assert metrics["vllm:num_requests_running"] >= 4
        assert metrics["vllm:num_requests_waiting"] >= 1
    finally:
        leaving.close()
        for stream in streams[2:]:
            stream.close()
    question, answer = needle()
    assert ask(question).choices[0].message.content == answer
    assert complete(chat_text(COPY)).choices[0].text == COPIED
    deadline = time.monotonic() + 60
    while (metrics := server.metrics())["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]:
        assert time.monotonic() < deadline, "aborted requests are still there"
        time.sleep(0.2)
    assert metrics["vllm:generation_tokens_total"] - before < len(streams) * 300 / 2
    assert metrics["vllm:kv_cache_usage_perc"] == 0


def test_counters_agree_with_what_was_delivered(server, ask, counted):
    delivered = server.metrics()["vllm:generation_tokens_total"]
    questions = [needle("carol", f"{31 * i + 20000}", 1 + i % 3)[0] for i in range(6)]

    def ask_all():
        with ThreadPoolExecutor(3) as pool:
            return sum(answer.usage.completion_tokens for answer in pool.map(ask, questions))

    tokens, counts = counted(ask_all)
    assert counts["committed_tokens"] == tokens
    assert server.metrics()["vllm:generation_tokens_total"] - delivered == tokens
    assert counts["denoising_steps"] >= tokens  # one token per step, and the commits
    assert counts["canvas_positions"] == counts["denoising_steps"] * BLOCK
    assert counts["canvas_positions"] < counts["rows_recomputed"] <= counts["rows_dense"]


@pytest.mark.slow
def test_vllms_benchmark_reports_diffusion(server, tmp_path):
    prompts, tokens = 12, 32
    command = vllm_command(
        *("bench", "serve", "--base-url", server.url, "--model", str(CHECKPOINT), "--disable-tqdm"),
        *("--dataset-name", "random", "--random-input-len", "32", "--random-output-len", str(tokens)),
        *("--num-prompts", str(prompts), "--max-concurrency", "4", "--ignore-eos"),
        *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"),
    )
    run = subprocess.run(command, env=vllm_environment(), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "iffusion" in run.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == prompts and result["failed"] == 0
    assert result["total_output_tokens"] == prompts * tokens
    assert result["diffusion_committed_tokens"] == prompts * tokens
    # Every block of 8 takes 8 steps of one token each; the steps that commit are taken off.
    assert result["diffusion_steps_per_canvas"] == pytest.approx(BLOCK)
    assert result["diffusion_committed_per_step"] == pytest.approx(1)
    assert result["diffusion_denoising_steps"] == prompts * tokens
    assert result["diffusion_canvas_positions"] == prompts * tokens * (BLOCK + 1)
