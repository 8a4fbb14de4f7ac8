"""lm_eval model `vllm_dlm`, a client of a server with this plugin.

Read in lm_eval 0.4.13: api/model.py, api/instance.py.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lm_eval.api.model import LM
from tqdm import tqdm

from vllm_dlm.evaluation.served import Served


class ServedDLM(LM):
    """Model whose parameters are lm_eval's `--model_args`: `base_url`; for generation `max_gen_toks` and any `dlm_*`
    option; for scoring `method`, `mc_num`, `mc_batch_size`, `steps`, `cfg_scale` and `seed`."""

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        num_concurrent: int = 16,
        timeout: float = 3600,
        max_gen_toks: int = 256,
        bos: str = "",
        add_special_tokens: bool = True,
        method: str | None = None,
        mc_num: int | None = None,
        mc_batch_size: int | None = None,
        steps: int | None = None,
        cfg_scale: float | None = None,
        seed: int | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **options: Any,
    ):
        """lm_eval always passes batch_size, max_batch_size and device, which are ignored: the server decides them."""
        super().__init__()
        if unread := [name for name in options if not name.startswith("dlm_")]:
            raise ValueError(f"model_args: {', '.join(unread)} not supported; names of request options begin with dlm_")
        self.served, self.num_concurrent = Served(base_url, model, timeout, num_concurrent), num_concurrent
        self.max_gen_toks, self.bos, self.options = max_gen_toks, bos, options
        self.add_special_tokens = add_special_tokens
        how = {
            "method": method,
            "mc_num": mc_num,
            "batch_size": mc_batch_size,
            "steps": steps,
            "cfg_scale": cfg_scale,
            "seed": seed,
        }
        self.how = {name: value for name, value in how.items() if value is not None}

    def _each(self, kind: str, requests: list, one: Callable, quiet: bool) -> list:
        """Calls `one` with the arguments of each request, `num_concurrent` at a time -> results in order."""
        results = []
        with ThreadPoolExecutor(self.num_concurrent) as pool:
            found = pool.map(lambda request: one(*request.args), requests)
            for request, result in zip(requests, tqdm(found, kind, len(requests), disable=quiet), strict=True):
                self.cache_hook.add_partial(kind, request.args, result)
                results.append(result)
        return results

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        fixed = {"add_special_tokens": self.add_special_tokens, "vllm_xargs": self.options}

        def one(context: str, kwargs: dict) -> str:
            return self.served.text(self.bos + context, kwargs, self.max_gen_toks, **fixed)

        return self._each("generate_until", requests, one, disable_tqdm)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        how = {"add_special_tokens": self.add_special_tokens, **self.how}

        def one(context: str, continuation: str) -> tuple[float, bool]:
            return self.served.likelihood(self.bos + context, continuation, **how)

        return self._each("loglikelihood", requests, one, disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError(
            "loglikelihood_rolling: perplexities of whole texts are not computed for masked-diffusion language models; "
            "tasks of the kinds generate_until, loglikelihood and multiple_choice are"
        )

    # -- chat templates --------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        self.add_special_tokens, self.bos = False, ""  # the rendered chat template already has them
        return self.served.rendered(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """Key of lm_eval's request caches"""
        return self.served.model.replace("/", "__")
