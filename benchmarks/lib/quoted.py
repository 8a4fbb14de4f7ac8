"""The figures that README and docs/results.md quote, read from the tables of results, so that all say the same."""

import json
from pathlib import Path

from benchmarks.lib.report import ROOT, idle_part, is_idle, on_machine

BEGIN, END = "<!-- figures: written by `python -m benchmarks redraw` -->", "<!-- end of figures -->"
#: tables of times; one run makes all of them
TIMED = ("speed-reuse", "speed-selection", "speed-none", "kernels-cpu", "decode")
MISSING = "not measured"
SOFT_HARD = "soft mask, hard for the last 50%"


class Tables:
    def __init__(self, folder: Path):
        self.found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
        # If some tables have times of an idle machine, only those are quoted.
        idle = {name: part for name in TIMED if name in self.found and (part := idle_part(self.found[name]))}
        if idle:
            self.found = {name: table for name, table in self.found.items() if name not in TIMED} | idle

    def value(self, table: str, key: str, form: str, **where) -> str:
        """The value of the only row that matches"""
        rows = self.found.get(table, {}).get("rows", [])
        fitting = [row for row in rows if all(row.get(name) == value for name, value in where.items())]
        values = [row[key] for row in fitting if row.get(key) is not None]
        return form.format(values[0]) if len(values) == 1 else MISSING

    def range(self, table: str, key: str, form: str, **where) -> str:
        """The smallest and the largest value of all matching rows"""
        rows = self.found.get(table, {}).get("rows", [])
        values = [row[key] for row in rows if all(row.get(name) == value for name, value in where.items())]
        return " to ".join(dict.fromkeys(form.format(end) for end in (min(values), max(values)))) if values else MISSING

    def measured(self) -> str:
        """The machine, and the highest load of the tables of times"""
        settings = [self.found[name]["settings"] for name in TIMED if name in self.found]
        loads = [found["load"] for found in settings]
        machines = list(dict.fromkeys(on_machine(found["machine"]) for found in settings))
        before = max((found["average_before"] for found in loads), default=None)
        others = [found["cores_used_by_others_at_most"] for found in loads if "cores_used_by_others_at_most" in found]
        text = f"{'; '.join(machines)}. Load average before it: {before}"
        text += f"; others used at most {max(others)} cores while anything was measured" if others else ""
        return text + ("." if all(map(is_idle, loads)) else ". The machine was NOT IDLE.")

    def values(self, table: str, key: str, form: str, *rows: dict) -> str:
        return ", ".join(self.value(table, key, form, **where) for where in rows)

    def reuse(self, prompt: int, batch: int, form: str = "{:.1f}x", methods=()) -> str:
        rows = [{"method": name, "prompt": prompt, "requests": batch} for name in methods or REUSE]
        return self.values("speed-reuse", "vs_none", form, *rows)

    def decoded(self, method: str, form: str = "{:.1f}x") -> str:
        return self.values("decode", "speedup", form, *({"method": method, "requests": count} for count in (1, 4)))

    def answered(self, *policies: str) -> str:
        return self.values("quality", "exact_match", "{:.1%}", *({"policy": policy} for policy in policies))

    def trained(self, training: str) -> str:
        return self.value("recovery", "exact_match", "{:.0%}", training=training, reads="2 of 32 pages")


REUSE = ("fast_dllm/dual", "dllm_cache", "dyllm")


def headlines(folder: Path) -> list[str]:
    """What the README says, one sentence each"""
    tables = Tables(folder)
    fast, dyllm = (
        " and ".join(tables.reuse(1024, batch, "{:.1f}", [method]) for batch in (1, 8))
        for method in ("fast_dllm/dual", "dyllm")
    )
    decoded = tables.decoded("unique", "{:.1f}").replace(", ", " and ")
    return [
        f"**Reuse**, 1,024 prompt tokens, 1 and 8 requests: `fast_dllm` delivers {fast} times the tokens per "
        f"second of `none`, `dyllm` {dyllm} times. Right answers of the demo's model: "
        f"{tables.answered('fast_dllm:cache=dual')} and {tables.answered('dyllm')}, with `none` "
        f"{tables.answered('none')}.",
        "**Page-sparse decoding**, 32k tokens of context, 1 and 4 requests: a step of Qwen1.5-0.5B's proportions is "
        f"{decoded} times as fast as vLLM's.",
        "**Training** for 2 of 32 pages: right answers of the demo's model "
        f"{tables.trained(SOFT_HARD)}, before {tables.trained('none')}.",
    ]


def lines(folder: Path) -> list[tuple[str, str, str, str]]:
    """(what, against what, figure, table)"""
    tables, made = Tables(folder), []
    for prompt in (1024, 4096):
        for count in (1, 8):
            requests = f"{count} request{'s' * (count > 1)}"
            what = f"reuse, {prompt:,} prompt + 128 new tokens, {requests}: `fast_dllm`, `dllm_cache`, `dyllm`"
            made.append((what, "tokens/s of `none`", tables.reuse(prompt, count), "speed-reuse"))
    serve = {"method": "fast_dllm/dual+wavefilter/serve", "requests": 1}
    selected = tables.values(
        "speed-selection", "vs_host", "{:.2f}x", serve | {"prompt": 4096}, serve | {"prompt": 16384}
    )
    kept = tables.range("selection-tokens", "of_oracle", "{:.0%}", rule="wavefilter/serve", budget=0.16)
    keys = ({"keys": keys, "batch": 1} for keys in (32768, 131072))
    kernel = tables.values("kernels-cpu", "served_ratio", "{:.0f}x", *keys)
    shapes = ({"shape": name, "method": "none", "requests": 1} for name in ("llada-proportions", "llada-vocabulary"))
    loop = tables.values("speed-none", "vs_loop", "{:.1f}x", *shapes)
    step = "a step of Qwen1.5-0.5B's proportions at 32k, 1 and 4 requests"
    untrained = f"untrained {tables.trained('none')}, trained dense {tables.trained('dense')}"
    return [
        *made,
        (
            "answers of the demo model to 500 prompts: `fast_dllm`, `dllm_cache`, `dyllm`",
            f"`none`: {tables.answered('none')}",
            tables.answered("fast_dllm:cache=dual", "dllm_cache", "dyllm"),
            "quality",
        ),
        (
            "`fast_dllm` with `wavefilter/serve`, 4k and 16k prompt tokens",
            "time of `fast_dllm` alone",
            selected,
            "speed-selection",
        ),
        ("attention that `wavefilter/serve` keeps with 16 % of the prompt", "the best 16 %", kept, "selection-tokens"),
        (
            "choosing and reading 2,048 of 32k and of 128k keys",
            "vLLM's dense kernel",
            f"{kernel} faster",
            "kernels-cpu",
        ),
        (step, "vLLM", f"{tables.decoded('unique')} faster", "decode"),
        ("the same without dense layers", "vLLM", f"{tables.decoded('unique, dense_layers []')} faster", "decode"),
        (
            "`none`, 480 + 32 tokens, 1 request: 106M parameters, and 120M that are mostly head",
            "LLaDA's loop on transformers",
            f"{loop} faster",
            "speed-none",
        ),
        (
            "answers of the demo model at 2 of 32 pages after training on the soft, then the hard mask",
            untrained,
            tables.trained(SOFT_HARD),
            "recovery",
        ),
    ]


def sentences(folder: Path) -> str:
    """The README's block"""
    said = [f"- {sentence}" for sentence in headlines(folder) if MISSING not in sentence]
    return "\n".join([*said, "", f"Times are of one run on {Tables(folder).measured()}"])


def table(folder: Path) -> str:
    """The block of docs/results.md"""
    rows = [
        f"| {what} | {base} | {figure} | [{name}](../benchmarks/results/{name}.md) |"
        for what, base, figure, name in lines(folder)
        if set(figure.removesuffix(" faster").split(", ")) != {MISSING}
    ]
    head = ["| what | against | figure | table |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, "", f"All times are of one run on {Tables(folder).measured()}"])


#: page -> what is between its marks
PAGES = {"README.md": sentences, "docs/results.md": table}


def put_into(text: str, made: str) -> str:
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{BEGIN!r} and {END!r} must appear once each in {', '.join(PAGES)}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}"


def rewritten(folder: Path) -> dict[Path, str]:
    """Every page with the figures of the tables"""
    return {ROOT / page: put_into((ROOT / page).read_text(), make(folder)) for page, make in PAGES.items()}
