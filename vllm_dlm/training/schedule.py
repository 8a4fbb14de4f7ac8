"""Schedule of the mask's temperature over a run: decreasing, with the hard mask of serving at the end if requested."""

from dataclasses import dataclass
from typing import Literal

from transformers import TrainerCallback

from vllm_dlm.training.settings import configure, settings_of


@dataclass(frozen=True)
class Schedule:
    start: float = 1.0
    end: float = 0.1
    kind: Literal["constant", "linear", "geometric"] = "geometric"  # constant: always `start`
    hard_share: float = 0.0  # share of the steps, at the end, that use the hard mask

    def __post_init__(self):
        if self.kind not in ("constant", "linear", "geometric"):
            raise ValueError(f"kind: {self.kind!r} is not valid, it must be 'constant', 'linear' or 'geometric'")
        for name in ("start", "end"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not valid, it must be above 0")
        if not 0 <= self.hard_share <= 1:
            raise ValueError(f"hard_share: {self.hard_share!r} is not valid, it must be between 0 and 1")

    def at(self, step: int, steps: int) -> tuple[float, bool]:
        """-> temperature and whether the mask is hard, in step `step` (from 0) of `steps`"""
        soft = max(1, round(steps * (1 - self.hard_share)))
        way = min(1.0, step / max(1, soft - 1))
        if self.kind == "linear":
            temperature = self.start + way * (self.end - self.start)
        else:
            temperature = self.start * (self.end / self.start) ** (way if self.kind == "geometric" else 0)
        return temperature, self.hard_share > 0 and step >= steps - round(steps * self.hard_share)


class Anneal(TrainerCallback):
    """Callback that applies a schedule. It depends on the step alone, so a resumed run continues correctly."""

    def __init__(self, schedule: Schedule | None = None, **fields):
        self.schedule = schedule or Schedule(**fields)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        temperature, hard = self.schedule.at(state.global_step, state.max_steps)
        configure(model, temperature=temperature, hard=hard)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if logs is not None and model is not None and "loss" in logs:
            settings = settings_of(model.config)
            for place in (logs, state.log_history[-1]):
                place["mask_temperature"] = 0.0 if settings.hard else settings.temperature
