"""What scheduling knows of a request: no tokens, only where its canvas stands in its schedule."""

from dataclasses import dataclass

from vllm_dlm.options import Options
from vllm_dlm.plugins.reuse.base import Progress, StepPlan

#: live rows only carry a hidden state through layers that skip them; so many weigh as one that is recomputed
LIVE_PER_ROW = 8


@dataclass
class Canvas:
    """What scheduling needs to know of a request: where its canvas stands, and so what its next step will be."""

    options: Options
    prompt_len: int
    length: int  # prompt and response
    shift: int
    blocks: list[tuple[int, int]]
    block: int = 0
    block_step: int = 0  # forwards of the current block
    step: int = 0  # forwards of the request
    cold: bool = True

    @property
    def streams(self) -> int:
        return 2 if self.options.decoding.cfg_scale > 0 else 1

    @property
    def block_width(self) -> int:
        start, end = self.blocks[self.block]
        return end - start

    def plan(self) -> StepPlan:
        start, end = (self.prompt_len + edge for edge in self.blocks[self.block])
        at = Progress(self.prompt_len, self.length, (start, end), self.block_step, self.step, self.cold, self.shift)
        return self.options.reuse.plan(at)

    def rows(self, plan: StepPlan) -> int:
        """Rows the step recomputes; rows it merely carries weigh less."""
        return self.streams * max(plan.rows, -(-(plan.live[1] - plan.live[0]) // LIVE_PER_ROW), 1)

    def stepped(self) -> None:
        self.block_step, self.step, self.cold = self.block_step + 1, self.step + 1, False

    def emitted(self, num_output_tokens: int) -> None:
        """Blocks leave whole, so the number of tokens tells the current one."""
        while self.block + 1 < len(self.blocks) and num_output_tokens >= self.blocks[self.block][1]:
            self.block, self.block_step = self.block + 1, 0
