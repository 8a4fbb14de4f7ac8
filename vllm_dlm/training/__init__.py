"""Fine-tuning for page-sparse inference. Requires torch and transformers, but not vLLM.

Importing this package registers `attn_implementation="unique"` with transformers:

    import vllm_dlm.training as sparse
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="unique")
    sparse.configure(model, sparse.PageSparsity(budget_tokens=2048, page_size=64))
    Trainer(model, …, callbacks=[sparse.Anneal(start=1.0, end=0.1, kind="geometric")]).train()

Any model that uses transformers' attention interface, `Trainer` and PEFT work
unchanged. The settings are stored in the model's config and saved with it. A
server uses them as defaults for its selection.
"""

from vllm_dlm.training.attention import binding, register
from vllm_dlm.training.schedule import Anneal, Schedule
from vllm_dlm.training.settings import PageSparsity, configure, settings_of

register()

__all__ = ["Anneal", "PageSparsity", "Schedule", "binding", "configure", "register", "settings_of"]
