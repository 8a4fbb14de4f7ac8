"""The envelope survives vLLM's serialisation, and vLLM's own messages and decoders are not disturbed by it."""

import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_dlm.envelope import Envelope, EnvelopeOutputs, envelope_in, envelope_output, with_envelope
from vllm_dlm.page_sparse.page_counts import PageCounts
from vllm_dlm.step.counts import StepCounts

TOKENS = EngineCoreOutput("a", [3, 4], finish_reason=FinishReason.LENGTH, trace_headers={"b": "c"})


def sent_and_received(outputs: EngineCoreOutputs, decoded: type) -> EngineCoreOutputs:
    return MsgpackDecoder(decoded).decode(MsgpackEncoder().encode(outputs))


@pytest.mark.parametrize(
    "envelope", [Envelope(view=b"\x00frame"), Envelope(filled=[1, 1, 2]), Envelope(filled=[]), Envelope(fault="why")]
)
def test_messages_about_requests(envelope):
    outputs = EngineCoreOutputs(outputs=[envelope_output("a", envelope), TOKENS], engine_index=1)
    message, tokens = sent_and_received(outputs, EnvelopeOutputs).outputs
    assert (message.request_id, message.new_token_ids, envelope_in(message)) == ("a", [], envelope)
    assert envelope_in(tokens) is None
    assert all(getattr(tokens, field) == getattr(TOKENS, field) for field in TOKENS.__struct_fields__)


@pytest.mark.parametrize("envelope", [Envelope(steps=StepCounts(5, 4, 3)), Envelope(pages=PageCounts(1, 2, 3, 4))])
def test_counters_of_a_step(envelope):
    stats = SchedulerStats(num_running_reqs=3, kv_cache_usage=0.5, waiting_lora_adapters={"x": 1})
    outputs = EngineCoreOutputs(scheduler_stats=with_envelope(stats, envelope), finished_requests={"a"})
    received = sent_and_received(outputs, EnvelopeOutputs)
    assert envelope_in(received.scheduler_stats) == envelope and received.finished_requests == {"a"}
    assert vars(received.scheduler_stats) | {"dlm": None} == vars(stats) | {"dlm": None}


def test_messages_without_an_envelope():
    outputs = EngineCoreOutputs(outputs=[TOKENS], scheduler_stats=SchedulerStats(num_waiting_reqs=2))
    received = sent_and_received(outputs, EnvelopeOutputs)
    assert envelope_in(received.outputs[0]) is None and envelope_in(received.scheduler_stats) is None
    assert received.scheduler_stats.num_waiting_reqs == 2


def test_vllms_own_decoder_skips_it():
    """The coordinator of data parallelism keeps that."""
    stats = with_envelope(SchedulerStats(step_counter=7), Envelope(steps=StepCounts(1)))
    outputs = EngineCoreOutputs(outputs=[envelope_output("a", Envelope(filled=[1])), TOKENS], scheduler_stats=stats)
    received = sent_and_received(outputs, EngineCoreOutputs)
    assert received.scheduler_stats.step_counter == 7 and type(received.scheduler_stats) is SchedulerStats
    assert [output.new_token_ids for output in received.outputs] == [[], [3, 4]]
