"""Number of blocks of vLLM's KV cache that a request needs.

Keys and values of each canvas, the features of a reuse policy and the summaries
of a selection are stored in blocks of the same pool. Admission, freeing and
accounting therefore work on one kind of block. A block holds keys and values of
`block_size` positions, or as many feature rows as fit into the same bytes.
"""

from dataclasses import dataclass

from vllm_dlm.options import Options
from vllm_dlm.plugins.reuse.base import Reuse, RowShape


@dataclass(frozen=True)
class BlockShape:
    """Shape of a block of one layer on one rank."""

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
        """-> number of blocks for (keys and values, features, summaries of a selection, speculative canvases) of one
        canvas of `length` positions, of which the first `rows` have a row (None: all)."""
        reuse, selection = options.reuse, options.selection
        rows = length if rows is None else rows
        featured = reuse.feature_rows(prompt_len, rows)
        kv_blocks = -(-rows // self.block_size)
        features = -(-featured // self.features_per_block(reuse)) if featured else 0
        # a summary takes the slot of one key and value
        if options.attention == "full":
            summaries = selection.prompt_units(prompt_len).summaries if selection.applies(prompt_len, length) else 0
        else:  # finished positions are summarized, too, and their number grows
            summaries = selection.prompt_units(rows).summaries if selection.sparse else 0
        others = options.canvases - 1
        speculative = others * self.speculative_blocks(options, prompt_len, length) if others else 0
        return kv_blocks, features, -(-summaries // self.block_size), speculative

    def speculative_blocks(self, options: Options, prompt_len: int, length: int) -> int:
        """Number of KV blocks per speculative canvas: the most that a canvas block can overlap"""
        start, end = options.decoding.blocks(length - prompt_len)[0]  # the first canvas block is the widest
        return -(-(end - start - 1) // self.block_size) + 1

    def tokens(self, options: Options, prompt_len: int, length: int, rows: int | None = None) -> int:
        """Number of tokens to request from vLLM's allocator, whose unit is tokens. With guidance, the unconditional
        stream needs its own blocks only if caches are used."""
        streams = 2 if options.decoding.cfg_scale > 0 and options.caches else 1
        return streams * sum(self.blocks(options, prompt_len, length, rows)) * self.block_size
