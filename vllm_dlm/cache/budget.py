"""Which blocks of vLLM's pool a request needs.

Keys and values of each canvas, the features a reuse policy keeps and the
summaries of a selection come from the same blocks: one pool to admit by, to free and to count. A block
holds `block_size` positions of K and V, or as many feature rows as fit into
the same bytes.
"""

from dataclasses import dataclass

from vllm_dlm.options import Options
from vllm_dlm.plugins.reuse.base import Reuse, RowShape


@dataclass(frozen=True)
class BlockShape:
    """One layer's block on one rank."""

    block_size: int
    kv_heads: int
    head_dim: int
    row: RowShape

    @classmethod
    def of(cls, vllm_config) -> "BlockShape":
        config = vllm_config.model_config.hf_config
        ranks = vllm_config.parallel_config.tensor_parallel_size
        heads = config.num_attention_heads // ranks
        return cls(
            vllm_config.cache_config.block_size,
            config.num_key_value_heads // ranks,
            config.head_dim,
            RowShape(heads * config.head_dim, config.hidden_size),
        )

    @property
    def elements(self) -> int:
        return self.block_size * self.kv_heads * 2 * self.head_dim

    def features_per_block(self, reuse: Reuse) -> int:
        return self.elements // max(reuse.feature_width(self.row), 1)

    def blocks(self, options: Options, prompt_len: int, length: int, rows: int | None = None) -> tuple[int, ...]:
        """(blocks of keys and values, of features, of a selection's summaries, of drafts) of one canvas of `length`
        positions, of which the first `rows` have a row (None: all)."""
        reuse, selection = options.reuse, options.selection
        rows = length if rows is None else rows
        featured = reuse.feature_rows(prompt_len, rows)
        kv_blocks = -(-rows // self.block_size)
        features = -(-featured // self.features_per_block(reuse)) if featured else 0
        # a summary fills the slots of one key and its value
        if options.attention == "full":
            summaries = selection.summary_rows(prompt_len) if selection.applies(prompt_len, length) else 0
        else:  # what is finished has some, too, and becomes more
            summaries = selection.summary_rows(rows) if selection.sparse else 0
        others = options.canvases - 1
        drafts = others * self.draft_blocks(options, prompt_len, length) if others else 0
        return kv_blocks, features, -(-summaries // self.block_size), drafts

    def draft_blocks(self, options: Options, prompt_len: int, length: int) -> int:
        """Of one draft: those that a canvas block may lie in"""
        start, end = options.decoding.blocks(length - prompt_len)[0]  # none is wider
        return -(-(end - start - 1) // self.block_size) + 1

    def tokens(self, options: Options, prompt_len: int, length: int, rows: int | None = None) -> int:
        """What to ask vLLM's allocator for, in its unit. Without caching no stream needs more than its name."""
        streams = 2 if options.decoding.cfg_scale > 0 and options.caches else 1
        return streams * sum(self.blocks(options, prompt_len, length, rows)) * self.block_size
