"""dLLM's schedule for A2D models: low-confidence remasking with steps of a linear diffusion time.

https://github.com/ZHZisZZ/dllm, core/schedulers/alpha.py and core/samplers. If the
number of steps divides the number of masks, the schedule is LLaDA's. Otherwise
halves are rounded to even, in float32 as in the reference: 8 masks in 3 steps
become 3, 2 and 3.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from vllm_dlm.plugins.decoding.low_confidence import LowConfidence


@dataclass(frozen=True)
class LowConfidenceLinear(LowConfidence):
    name: ClassVar[str] = "low_confidence_linear"

    def block_steps(self, block: int, num_blocks: int, masks: int) -> int:
        return max(masks, 1) if self.steps is None else -(-self.steps // num_blocks)

    def quotas(self, masks: int, steps: int) -> list[int]:
        one, quotas, left = np.float32(1), list[int](), masks
        for step in range(steps):
            after = one - np.float32(steps - 1 - step) / np.float32(steps)  # alpha of the time after the step
            before = one - np.float32(steps - step) / np.float32(steps)
            kept = (one - after) / (one - before)  # share of the masks
            quotas.append(min(round(left * (1 - float(kept))), left))
            left -= quotas[-1]
        return [quota for quota in quotas if quota]
