"""The figures that README and docs/results.md quote, read from the tables of results, so that all say the same."""

import json
from pathlib import Path

from benchmarks.report import idle_part, is_idle, on_machine

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures: written by `python -m benchmarks figures` -->", "<!-- end of figures -->"
#: tables of times; one run makes all of them
TIMED = ("speed-reuse", "speed-selection", "speed-none", "kernels-cpu", "decode")
MISSING = "not measured"


class Tables:
    def __init__(self, folder: Path):
        self.found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
        # Beside times of an idle machine no others are quoted.
        idle = {name: part for name in TIMED if name in self.found and (part := idle_part(self.found[name]))}
        if idle:
            self.found = {name: table for name, table in self.found.items() if name not in TIMED} | idle

    def value(self, table: str, key: str, form: str, **where) -> str:
        """Of the one row that fits."""
        rows = self.found.get(table, {}).get("rows", [])
        fitting = [row for row in rows if all(row.get(name) == value for name, value in where.items())]
        values = [row[key] for row in fitting if row.get(key) is not None]
        return form.format(values[0]) if len(values) == 1 else MISSING

    def range(self, table: str, key: str, form: str, **where) -> str:
        """Of all rows that fit, from the least to the most."""
        rows = self.found.get(table, {}).get("rows", [])
        values = [row[key] for row in rows if all(row.get(name) == value for name, value in where.items())]
        return " to ".join(dict.fromkeys(form.format(end) for end in (min(values), max(values)))) if values else MISSING

    def measured(self) -> str:
        """Where, and beside whom, the times were taken: the worst of the tables."""
        settings = [self.found[name]["settings"] for name in TIMED if name in self.found]
        loads = [found["load"] for found in settings]
        machines = list(dict.fromkeys(on_machine(found["machine"]) for found in settings))
        before = max((found["average_before"] for found in loads), default=None)
        others = [found["cores_used_by_others_at_most"] for found in loads if "cores_used_by_others_at_most" in found]
        text = f"{'; '.join(machines)}. Load average before it: {before}"
        text += f"; others used at most {max(others)} cores while anything was measured" if others else ""
        return text + ("." if all(map(is_idle, loads)) else ". The machine was NOT IDLE.")


REUSE = ("fast_dllm/dual", "dllm_cache", "dyllm")


def headlines(folder: Path) -> list[str]:
    """What the README says, a sentence each."""
    tables = Tables(folder)

    def answered(policy: str) -> str:
        return tables.value("quality", "exact_match", "{:.1%}", policy=policy)

    def trained(training: str) -> str:
        return tables.value("recovery", "exact_match", "{:.0%}", training=training, reads="2 of 32 pages")

    fast_dllm, dyllm = (
        " and ".join(
            tables.value("speed-reuse", "vs_none", "{:.1f}", method=method, prompt=1024, batch=batch)
            for batch in (1, 8)
        )
        for method in ("fast_dllm/dual", "dyllm")
    )
    decode = " and ".join(tables.value("decode", "speedup", "{:.1f}", method="unique", batch=batch) for batch in (1, 4))
    return [
        f"**Reuse**, 1,024 prompt tokens, 1 and 8 requests: `fast_dllm` delivers {fast_dllm} times the tokens per "
        f"second of `none`, `dyllm` {dyllm} times. Right answers of the demo's model: "
        f"{answered('fast_dllm:cache=dual')} and {answered('dyllm')}, with `none` {answered('none')}.",
        "**Page-sparse decoding**, 32k tokens of context, 1 and 4 requests: a step of Qwen1.5-0.5B's proportions is "
        f"{decode} times as fast as vLLM's.",
        "**Training** for 2 of 32 pages: right answers of the demo's model "
        f"{trained('soft mask, hard for the last 50%')}, before {trained('none')}.",
    ]


def lines(folder: Path) -> list[tuple[str, str, str, str]]:
    """(what, against what, figure, table)"""
    tables = Tables(folder)

    def reuse(prompt: int, batch: int) -> tuple[str, str, str, str]:
        found = [
            tables.value("speed-reuse", "vs_none", "{:.1f}x", method=method, prompt=prompt, batch=batch)
            for method in REUSE
        ]
        requests = "1 request" if batch == 1 else f"{batch} requests"
        what = f"reuse, {prompt:,} prompt + 128 new tokens, {requests}: `fast_dllm`, `dllm_cache`, `dyllm`"
        return what, "tokens/s of `none`", ", ".join(found), "speed-reuse"

    def selection(prompt: int) -> str:
        return tables.value(
            "speed-selection",
            "vs_host",
            "{:.2f}x",
            method="fast_dllm/dual+wavefilter/serve",
            prompt=prompt,
            batch=1,
        )

    def kernel(keys: int) -> str:
        return tables.value("kernels-cpu", "served_ratio", "{:.0f}x", keys=keys, batch=1)

    def decode(method: str) -> str:
        found = [tables.value("decode", "speedup", "{:.1f}x", method=method, batch=batch) for batch in (1, 4)]
        return ", ".join(found)

    def loop(batch: int) -> str:
        found = [
            tables.value("speed-none", "vs_loop", "{:.1f}x", shape=shape, method="none", batch=batch)
            for shape in ("llada-proportions", "llada-vocabulary")
        ]
        return ", ".join(found)

    def trained(training: str) -> str:
        return tables.value("recovery", "exact_match", "{:.0%}", training=training, reads="2 of 32 pages")

    def answered(policy: str) -> str:
        return tables.value("quality", "exact_match", "{:.1%}", policy=policy)

    answers = ", ".join(map(answered, ("fast_dllm:cache=dual", "dllm_cache", "dyllm")))
    kept = tables.range("selection-tokens", "of_oracle", "{:.0%}", rule="wavefilter/serve", budget=0.16)
    soft_then_hard = trained("soft mask, hard for the last 50%")
    return [
        *(reuse(prompt, batch) for prompt in (1024, 4096) for batch in (1, 8)),
        (
            "answers of the demo model to 500 prompts: `fast_dllm`, `dllm_cache`, `dyllm`",
            f"`none`: {answered('none')}", answers, "quality",
        ),
        (
            "`fast_dllm` with `wavefilter/serve`, 4k and 16k prompt tokens", "time of `fast_dllm` alone",
            f"{selection(4096)}, {selection(16384)}", "speed-selection",
        ),
        (
            "attention that `wavefilter/serve` keeps with 16 % of the prompt", "the best 16 %", kept,
            "selection-tokens",
        ),
        (
            "choosing and reading 2,048 of 32k and of 128k keys", "vLLM's dense kernel",
            f"{kernel(32768)}, {kernel(131072)} faster", "kernels-cpu",
        ),
        (
            "a step of Qwen1.5-0.5B's proportions at 32k, 1 and 4 requests", "vLLM", f"{decode('unique')} faster",
            "decode",
        ),
        ("the same without dense layers", "vLLM", f"{decode('unique, dense_layers []')} faster", "decode"),
        (
            "`none`, 480 + 32 tokens, 1 request: 106M parameters, and 120M that are mostly head",
            "LLaDA's loop on transformers", f"{loop(1)} faster", "speed-none",
        ),
        (
            "answers of the demo model at 2 of 32 pages after training on the soft, then the hard mask",
            f"untrained {trained('none')}, trained dense {trained('dense')}", soft_then_hard, "recovery",
        ),
    ]  # fmt: skip


def sentences(folder: Path) -> str:
    """The README's block."""
    said = [f"- {sentence}" for sentence in headlines(folder) if MISSING not in sentence]
    return "\n".join([*said, "", f"Times are of one run on {Tables(folder).measured()}"])


def table(folder: Path) -> str:
    """The block of docs/results.md."""
    rows = [
        f"| {what} | {base} | {figure} | [{name}](../benchmarks/results/{name}.md) |"
        for what, base, figure, name in lines(folder)
        if set(figure.removesuffix(" faster").split(", ")) != {MISSING}
    ]
    head = ["| what | against | figure | table |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, "", f"All times are of one run on {Tables(folder).measured()}"])


#: page -> what stands between its marks
PAGES = {"README.md": sentences, "docs/results.md": table}


def put_into(text: str, made: str) -> str:
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{BEGIN!r} and {END!r} must stand once each in {', '.join(PAGES)}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}"


def rewritten(folder: Path) -> dict[Path, str]:
    """Every page as its tables want it."""
    return {ROOT / page: put_into((ROOT / page).read_text(), make(folder)) for page, make in PAGES.items()}
