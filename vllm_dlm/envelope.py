"""The envelope: data from an engine to its front-end for which vLLM's messages have no field.

Outputs of a request and statistics of a step get an additional field `dlm` with an `Envelope`. Both are subclasses of
vLLM's types, so no field of vLLM is used for another purpose:

- `EnvelopeOutput` is a separate output in addition to vLLM's outputs of the same request. It carries reports of the
  live view. The front-end removes it before vLLM processes the outputs (integration/view.py).
- `EnvelopeStats` replaces a step's SchedulerStats and carries counters. vLLM passes it to the stat loggers with the
  index of its engine, so counters of replicas stay separate until they are exported (metrics.py).

Encoding needs no change, because msgspec encodes the actual type of an object. vLLM's decoder would drop the field, so
a front-end that serves our models gets a decoder of `EnvelopeOutputs`. vLLM's data-parallel coordinator keeps its
decoder: structs are encoded as arrays, and it skips the new field at the end. With `VLLM_ENABLE_V1_MULTIPROCESSING=0`
the objects are passed unencoded.

Read in vLLM 0.32 and 0.33: v1/engine/__init__.py, v1/serial_utils.py, v1/engine/core_client.py (`MPClient`),
v1/engine/coordinator.py, v1/metrics/stats.py.
"""

from collections import deque
from dataclasses import dataclass, fields

import msgspec
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder

from vllm_dlm.configuration import is_diffusion_lm, selection_of
from vllm_dlm.page_sparse.page_counts import PageCounts
from vllm_dlm.step.counts import StepCounts


class Envelope(msgspec.Struct, omit_defaults=True):
    """One of the fields is set."""

    steps: StepCounts | None = None  # statistics: denoising since the last report
    pages: PageCounts | None = None  # statistics: page-sparse attention of one step
    view: bytes | None = None  # output: a message of the live view, see view/traces.py
    filled: list[int] | None = None  # output: the steps that filled the following tokens
    fault: str | None = None  # output: why `filled` is not available


class EnvelopeOutput(EngineCoreOutput):
    dlm: Envelope | None = None


@dataclass
class EnvelopeStats(SchedulerStats):
    dlm: Envelope | None = None


class EnvelopeOutputs(EngineCoreOutputs):
    """Type that a front-end decodes"""

    outputs: list[EnvelopeOutput] = []
    scheduler_stats: EnvelopeStats | None = None


def envelope_output(request_id: str, envelope: Envelope) -> EnvelopeOutput:
    return EnvelopeOutput(request_id, [], dlm=envelope)


def with_envelope(stats: SchedulerStats, envelope: Envelope) -> EnvelopeStats:
    return EnvelopeStats(**{each.name: getattr(stats, each.name) for each in fields(SchedulerStats)}, dlm=envelope)


def envelope_in(carrier: EngineCoreOutput | SchedulerStats | None) -> Envelope | None:
    return getattr(carrier, "dlm", None)


def client_init(init):
    def init_with_dlm(self, asyncio_mode, vllm_config, *args, **kwargs):
        init(self, asyncio_mode, vllm_config, *args, **kwargs)
        if is_diffusion_lm(vllm_config.model_config) or selection_of(vllm_config) is not None:
            self.decoder = MsgpackDecoder(EnvelopeOutputs)
        if is_diffusion_lm(vllm_config.model_config):
            self.dlm_pieces = deque()  # of outputs, see integration/pieces.py

    return init_with_dlm
