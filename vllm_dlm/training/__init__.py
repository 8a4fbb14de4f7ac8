"""Fine-tuning for page-sparse inference. Needs torch and transformers, never vLLM.

Importing it makes `attn_implementation="unique"` known to transformers:

    import vllm_dlm.training as sparse
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="unique")
    sparse.configure(model, sparse.PageSparsity(budget_tokens=2048, page_size=64))
    Trainer(model, …, callbacks=[sparse.Anneal(start=1.0, end=0.1, kind="geometric")]).train()

Any model that asks transformers for its attention, `Trainer` and PEFT work
unchanged. The settings live in the model's config and are saved with it, and
a server that is told nothing else selects pages by them.
"""

from vllm_dlm.training.attention import binding, register
from vllm_dlm.training.schedule import Anneal, Schedule
from vllm_dlm.training.settings import PageSparsity, configure, settings_of

register()

__all__ = ["Anneal", "PageSparsity", "Schedule", "binding", "configure", "register", "settings_of"]
