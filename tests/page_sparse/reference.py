"""Reference implementation of page-sparse decoding in float64, independent of the engine and of the kernels.

A Llama-like decoder reads its prompt densely. Each generated position scores
the full pages of its cache per key head, and attends to the best, the first and
the last pages.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import silu


class Reference:
    def __init__(self, folder: Path, **selection):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {name: w.double() for name, w in load_file(folder / "model.safetensors").items()}
        self.selection = {"lam": 0.5, "sink_pages": 1, "recent_pages": 2, "dense_layers": ()} | selection
        #: smallest gaps so far: between the last chosen page and the next (in standard deviations of the scores), and
        #: between the log-probabilities of the two best tokens
        self.page_margin = self.token_margin = float("inf")
        self.head_dim = self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]

    def generate(self, prompt: list[int], count: int) -> tuple[list[int], list[float], int]:
        """-> tokens, the log-probability of each, and how many triples (layer, position, head) left a page out"""
        self.cache = [None] * self.config["num_hidden_layers"]
        self.left_out = 0
        tokens, logprobs, fed = [], [], prompt
        for _ in range(count):
            logits = self._forward(torch.tensor(fed), generated=bool(tokens))
            best, second = logits.log_softmax(-1).topk(2).values.tolist()
            self.token_margin = min(self.token_margin, best - second)
            tokens.append(int(logits.argmax()))
            logprobs.append(best)
            fed = tokens[-1:]
        return tokens, logprobs, self.left_out

    def _forward(self, ids: torch.Tensor, generated: bool) -> torch.Tensor:
        x = self.weights["model.embed_tokens.weight"][ids]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            x = x + self._attention(self._norm(x, name + "input_layernorm"), layer, name + "self_attn.", generated)
            y = self._norm(x, name + "post_attention_layernorm")
            gate, up = self._linear(y, name + "mlp.gate_proj"), self._linear(y, name + "mlp.up_proj")
            x = x + self._linear(silu(gate) * up, name + "mlp.down_proj")
        return self._linear(self._norm(x[-1], "model.norm"), "lm_head")

    def _linear(self, x, name):
        out = x @ self.weights[name + ".weight"].T
        return out + self.weights[name + ".bias"] if name + ".bias" in self.weights else out

    def _norm(self, x, name):
        scale = (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return x * scale * self.weights[name + ".weight"]

    def _attention(self, x, layer, name, generated):
        count, heads = len(x), self.config["num_attention_heads"]
        past = self.cache[layer][0].shape[1] if generated else 0
        position = torch.arange(past, past + count)
        q, k, v = (
            self._linear(x, name + part).unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
            for part in ("q_proj", "k_proj", "v_proj")
        )  # [H, L, D], [Hkv, L, D] each
        if name + "q_norm.weight" in self.weights:
            q, k = self._norm(q, name + "q_norm"), self._norm(k, name + "k_norm")
        q, k = self._rotate(q, position), self._rotate(k, position)
        if generated:
            k, v = (torch.cat(pair, 1) for pair in zip(self.cache[layer], (k, v), strict=True))
        self.cache[layer] = (k, v)
        group = heads // len(k)
        seen = torch.arange(k.shape[1]) <= position[:, None]  # [L, N]
        seen = seen.expand(len(k), -1, -1).clone()  # [Hkv, L, N]
        if generated and layer not in self.selection["dense_layers"]:
            for head in range(len(k)):
                seen[head, 0] &= self._chosen(q[head * group : (head + 1) * group, 0], k[head])
        logits = q @ k.repeat_interleave(group, 0).transpose(1, 2) * self.head_dim**-0.5
        weights = logits.masked_fill(~seen.repeat_interleave(group, 0), -torch.inf).softmax(-1)
        context = weights @ v.repeat_interleave(group, 0)
        return self._linear(context.transpose(0, 1).flatten(1), name + "o_proj")

    def _chosen(self, queries, keys):
        """queries [G, D] that share the keys [N, D] -> which keys they see, [N]"""
        size, options = self.selection["page_size"], self.selection
        pages = keys.split(size)
        budget, scores = options["budget_tokens"] // size, []
        for index, page in enumerate(pages):
            forced = index < options["sink_pages"] or index >= len(pages) - options["recent_pages"]
            scores.append(torch.inf if forced else float(self.score(queries, page).max()))
        ranking = sorted(range(len(pages)), key=lambda i: -scores[i])
        best = ranking[:budget]
        if len(best) < len(pages):
            self.left_out += 1
            spread = torch.tensor([score for score in scores if score < torch.inf]).std()
            gap = float((scores[best[-1]] - scores[ranking[budget]]) / spread)
            self.page_margin = min(self.page_margin, gap)
        return torch.isin(torch.arange(len(keys)) // size, torch.tensor(best))

    def score(self, queries, page):
        """UNIQUE's score of a page with keys [P, D] for each of the queries [G, D]"""
        mean = page.mean(0)
        spread = (page - mean).square().sum(1).mean().sqrt()
        return queries @ mean + self.selection["lam"] * queries.norm(dim=-1) * spread

    def _rotate(self, x, position):
        half = self.head_dim // 2
        parameters = self.config.get("rope_parameters") or self.config
        base = parameters["rope_theta"]
        angle = position[:, None] * base ** (-torch.arange(half, dtype=torch.float64) / half)  # [L, D / 2]
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
