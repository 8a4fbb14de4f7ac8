"""One batch of concurrent requests, and everything that must hold when it is over.

When a request arrives, when its client leaves and when the cache is reset is counted in steps of the engine, so a
batch does the same every time and its parts can be left out one by one.
"""

from dataclasses import asdict, dataclass, field

from tests.engine.running import answer_of, core_of, free_blocks, poison, runner_of
from tests.soak.engines import Pair
from tests.soak.fork import Found
from tests.soak.requests import Given, most_forwards
from vllm_dlm.options import request_options


@dataclass(frozen=True)
class Entry:
    given: Given
    arrives: int = 0  # before this step
    leaves: int | None = None  # aborted before this step


@dataclass(frozen=True)
class Batch:
    entries: tuple[Entry, ...]
    resets: tuple[int, ...] = ()  # before these steps every running request is thrown back and its memory taken


@dataclass
class Ran:
    """What happened."""

    answers: dict[int, tuple] = field(default_factory=dict)  # by entry
    sent: dict[int, int] = field(default_factory=dict)  # tokens that left the engine, by entry
    aborted: set[int] = field(default_factory=set)
    restarted: set[int] = field(default_factory=set)
    steps: int = 0
    compared: int = 0


def check(pair: Pair, batch: Batch, known: dict[str, tuple]) -> Ran:
    """`known` keeps what requests answered alone."""
    before = counters(pair.tight)
    ran = run(pair.tight, batch, pair.model)
    check_idle(pair.tight)
    check_counters(before, counters(pair.tight), ran)
    compare(pair, batch, ran, known)
    return ran


# -- running -------------------------------------------------------------------------------


def run(llm, batch: Batch, model) -> Ran:
    engine, scheduler, ran = llm.llm_engine, core_of(llm).scheduler, Ran()
    poison(llm)
    last = max(entry.arrives for entry in batch.entries)
    limit = last + most_steps(batch, model, llm.model_config.dlm_options)
    step, names = 0, {}
    while step <= last or engine.has_unfinished_requests():
        for index, entry in enumerate(batch.entries):
            if entry.arrives == step:
                names[index] = engine.add_request(str(index), entry.given.prompt_ids, entry.given.params())
            if entry.leaves == step and index not in ran.answers:
                ran.aborted.add(index)
                engine.abort_request([names[index]], internal=True)  # by its inner name, as vLLM's servers do
        if step in batch.resets:
            ran.restarted |= {entry_of(request.request_id) for request in scheduler.running}
            scheduler.reset_prefix_cache(reset_running_requests=True)
        if engine.has_unfinished_requests():
            _step(engine, ran)
        step += 1
        if step > limit:
            waiting = sorted(set(range(len(batch.entries))) - ran.answers.keys() - ran.aborted)
            raise Found("endless", f"after {step} steps the requests {waiting} have not ended")
    engine.step()  # the runner hears of the last finished requests with the next step
    ran.steps = step
    return ran


def _step(engine, ran: Ran) -> None:
    get_output = engine.engine_core.get_output

    def counted():
        outputs = get_output()
        for output in outputs.outputs:
            index = entry_of(output.request_id)
            ran.sent[index] = ran.sent.get(index, 0) + len(output.new_token_ids)
        return outputs

    engine.engine_core.get_output = counted
    try:
        for output in engine.step():
            if output.finished:
                ran.answers[int(output.request_id)] = answer_of(output)
    finally:
        engine.engine_core.get_output = get_output


def entry_of(request_id: str) -> int:
    """vLLM appends random characters and puts the number of the sample before the name."""
    return int(request_id.rsplit("-", 1)[0].rpartition("_")[2])


def most_steps(batch: Batch, model, server) -> int:
    """One after the other, each may take all its steps, again after every reset."""
    each = sum(entry.given.fields.get("n", 1) * most_forwards(entry.given, model, server) for entry in batch.entries)
    return 50 + each * (1 + len(batch.resets))


# -- what must hold ------------------------------------------------------------------------


def check_idle(llm) -> None:
    scheduler, runner, processor = core_of(llm).scheduler, runner_of(llm), llm.llm_engine.output_processor
    pool = scheduler.kv_cache_manager.block_pool
    left = {
        "blocks in use": pool.num_gpu_blocks - 1 - free_blocks(core_of(llm)),  # one is vLLM's own
        "requests of the scheduler": len(scheduler.requests) + len(scheduler.running) + len(scheduler.waiting),
        "canvases": len(scheduler.canvases),
        "overtaken": len(scheduler.overtaken),
        "requests of the runner": len(runner.requests),
        "tables of the runner": len(runner.tables),
        "requests of the front-end": len(processor.request_states),
        "names of the front-end": len(processor.external_req_ids),
        "samples": len(processor.parent_requests),
    }
    if left := {name: count for name, count in left.items() if count}:
        raise Found("leak", f"left over after a batch: {left}")


def counters(llm) -> dict[str, int]:
    return asdict(core_of(llm).scheduler.counts)


def check_counters(before: dict, after: dict, ran: Ran) -> None:
    counted = {name: after[name] - before[name] for name in after if name != "caches"}
    wrong = {
        "committed_tokens is not what left the engine": counted["committed_tokens"] != sum(ran.sent.values()),
        "tokens got lost on the way": any(
            lost(answer, ran.sent.get(index, 0)) for index, answer in ran.answers.items()
        ),
        "more rows live than there are": counted["rows_live"] > counted["rows_dense"],
        "more rows recomputed than live": counted["rows_recomputed"] > counted["rows_live"],
        "more refreshes than steps": counted["refresh_steps"] > counted["denoising_steps"],
        "more read than there is": counted["kv_bytes_read"] > counted["kv_bytes_dense"],
        "a counter runs backwards": min(counted.values()) < 0,
    }
    if wrong := [text for text, is_wrong in wrong.items() if is_wrong]:
        raise Found("counters", f"{'; '.join(wrong)}: {counted}, sent {ran.sent}")


def lost(answer: tuple, sent: int) -> bool:
    delivered = sum(len(tokens) for tokens, *_ in answer)
    # Where a stop string is found vLLM's front-end leaves out what its block had behind it.
    cut = any(isinstance(stop_reason, str) for _, _, stop_reason, _ in answer)
    return delivered > sent if cut else delivered != sent


def compare(pair: Pair, batch: Batch, ran: Ran, known: dict[str, tuple]) -> None:
    missing = set(range(len(batch.entries))) - ran.answers.keys() - ran.aborted
    if missing:
        raise Found("lost", f"the requests {sorted(missing)} were never answered")
    for index, answer in ran.answers.items():
        if errors := [why for _, reason, why, _ in answer if reason == "error"]:
            raise Found(f"error {errors[0].split(':')[0]}", f"request {index} ended with {errors[0]}")
        given = batch.entries[index].given
        # Restarted, a block begins with a full forward: the same without caches, a refresh sooner with them.
        options = request_options(pair.tight.model_config.dlm_options, given.fields["extra_args"])
        if index in ran.restarted and options.caches:
            continue
        if options.decoding.threshold_floor is not None:  # its threshold follows those that wait
            continue
        alone = answer_alone(pair, given, known)
        if answer != alone:
            raise Found("difference", f"request {index} answered {answer}\nand alone {alone}")
        ran.compared += 1


def answer_alone(pair: Pair, given: Given, known: dict[str, tuple]) -> tuple:
    if (name := repr(given)) not in known:
        ran = run(pair.alone, Batch((Entry(given),)), pair.model)
        known[name] = ran.answers[0]
    return known[name]
