"""Cost of a step, counted while it runs.

Units are multiply-adds of matrix products and bytes of K and V read. Element-wise
work is negligible and not counted.
"""

from dataclasses import dataclass, field

from vllm_dlm.client_cache import CacheUsage


@dataclass
class Counts:
    """Rows per projection and query-key pairs, summed over layers."""

    rows: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("value", "query", "key", "output", "feed_forward"), 0)
    )
    pairs: int = 0  # query rows x keys
    keys_read: int = 0  # keys (with their values) read back from pages
    keys_dense: int = 0  # keys that would have been read without a selection
    keys_scored: int = 0  # summaries that a selection compared with queries
    summaries: int = 0  # summaries computed
    head_rows: int = 0

    def projected(self, phase: str, rows: int) -> None:
        self.rows[phase] += rows

    def attended(self, q_lens: list[int], kv_lens: list[int], read: bool, dense: list[int] | None = None) -> None:
        """`kv_lens`: number of keys that each canvas reads; `dense`: number of all its keys; None: the same"""
        self.pairs += sum(q * kv for q, kv in zip(q_lens, kv_lens, strict=True))
        if read:
            self.keys_read += sum(kv for q, kv in zip(q_lens, kv_lens, strict=True) if q)
            self.keys_dense += sum(kv for q, kv in zip(q_lens, dense or kv_lens, strict=True) if q)


@dataclass(frozen=True)
class ModelShape:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int

    @classmethod
    def from_config(cls, config) -> "ModelShape":
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.intermediate_size,
            config.vocab_size,
        )

    def macs(self, counts: Counts) -> int:
        """Multiply-adds of counted work."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        rows = counts.rows
        linear = self.hidden * (rows["query"] * q + (rows["key"] + rows["value"]) * kv + rows["output"] * q)
        return (
            linear
            + 3 * self.hidden * self.ffn * rows["feed_forward"]
            + 2 * q * counts.pairs
            + self.hidden * self.vocabulary * counts.head_rows
        )

    def kv_bytes(self, keys: int, element: int = 2) -> int:
        return keys * 2 * self.kv_heads * self.head_dim * element


@dataclass
class StepCounts:
    """Counters of denoising that an engine reports: sums over all requests and steps since the last report"""

    denoising_steps: int = 0
    canvas_positions: int = 0
    committed_tokens: int = 0
    rows_recomputed: int = 0
    rows_live: int = 0
    rows_dense: int = 0
    refresh_steps: int = 0
    kv_bytes_read: int = 0
    kv_bytes_dense: int = 0
    lowered_steps: int = 0
    caches: dict[str, CacheUsage] = field(default_factory=dict)  # caches of the engine after the last step; {}: no step
