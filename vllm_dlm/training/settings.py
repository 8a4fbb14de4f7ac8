"""Settings that training and serving share, stored in the model's config."""

from dataclasses import asdict, dataclass, fields

from vllm_dlm.kernels.soft_page_attention import Gate
from vllm_dlm.plugins.selection.unique import Unique

#: name of the config's entry
KEY = "unique"


@dataclass(frozen=True)
class PageSparsity:
    """Fields of the `unique` selection in serving, then fields of the training mask."""

    budget_tokens: int = 2048
    page_size: int = 64
    lam: float = 0.5
    std_kind: str = "l2"
    reduce: str = "max"
    sink_pages: int = 1
    recent_pages: int = 2
    min_context: int = 0  # lower than in serving, because a mask that never applies trains nothing
    dense_layers: tuple[int, ...] = (0, 1)
    query_set: str = "active"  # in training all queries of a response vote, masked or not

    temperature: float = 1.0  # in units of a logit
    stop_threshold: bool = True  # no gradient through the threshold; if False, only differences of scores get gradients
    hard: bool = False  # train with the hard mask of serving, which is always used outside of training
    query_block: int = 0  # number of bidirectional queries that choose together; 0: all of the response

    def __post_init__(self):
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        Unique(**self.serving())  # rejects what serving would reject
        if self.query_set != "active":
            raise ValueError(f"query_set: {self.query_set!r} is not valid, training lets all queries choose ('active')")
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature!r} is not valid, it must be above 0; see `hard`")
        if self.query_block < 0:
            raise ValueError(f"query_block: {self.query_block!r} is not valid, it must be at least 0")

    def serving(self) -> dict:
        known = {field.name for field in fields(Unique)}
        return {name: value for name, value in asdict(self).items() if name in known}

    def gate(self, causal: bool, training: bool, dense: bool = False) -> Gate:
        return Gate(
            page_size=self.page_size,
            budget_pages=1 << 40 if dense else self.budget_tokens // self.page_size,
            lam=self.lam,
            std_kind=self.std_kind,
            reduce=self.reduce,
            sink_pages=self.sink_pages,
            recent_pages=self.recent_pages,
            min_context=self.min_context,
            temperature=0.0 if self.hard or not training else self.temperature,
            stop_threshold=self.stop_threshold,
            causal=causal,
            query_block=self.query_block,
        )


def configs_of(model) -> list:
    """The config that is saved, and the one that the text layers read."""
    config = model.config
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def configure(model, settings: PageSparsity | None = None, **changes) -> PageSparsity:
    """Sets `settings` on `model`, or changes single fields. Takes effect with the next forward."""
    settings = settings or settings_of(model.config)
    values = asdict(settings) | changes
    PageSparsity(**values)
    values["dense_layers"] = list(values["dense_layers"])  # as it is after a round trip through JSON
    for config in configs_of(model):
        setattr(config, KEY, dict(values))
    return settings_of(model.config)


def settings_of(config) -> PageSparsity:
    """Settings in a config, or the defaults. Unknown entries are ignored."""
    given = getattr(config, KEY, None) or {}
    known = {field.name for field in fields(PageSparsity)}
    return PageSparsity(**{name: value for name, value in given.items() if name in known})
