"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds one small latent per token.

Decisions: keys and values are never expanded. A head's key is `up_k @ latent`, so its query is multiplied by `up_k`
once and then attends to the latents themselves; the result, a mixture of latents, goes through `up_v`. The cache
therefore stores kv_lora_rank + qk_rope_head_dim numbers per token and layer, whatever the number of heads.

Legend: tokens = rows of the step; rank = kv_lora_rank; nope, rotary = a head's dimensions without and with position.
"""

import torch
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.kernels import attention as kernel
from modelport.kernels import kv_cache
from modelport.kernels import rope as rope_kernel
from modelport.modeling.cache import CacheSpec
from modelport.modeling.linear import ColumnLinear, Linear, RowLinear, Update
from modelport.modeling.norm import RMSNorm
from modelport.modeling.rope import Rope


class UpProjection(ColumnLinear):
    """`kv_b_proj`: what turns a latent into a head's key and value; weight: (heads * (nope + v), rank).

    Used from both sides instead of as a product, so it stays in the model's dtype under quantisation. `update` does not
    serve it; it has one for each side.

    :ivar update_k, update_v: take the input of `absorb` or `values` and what comes of it, both (tokens, heads, size),
        and give what to go on with.
    """

    def __init__(self, rank: int, num_heads: int, nope: int, v_head_dim: int):
        super().__init__(rank, num_heads * (nope + v_head_dim))
        self.sizes = (num_heads, nope, v_head_dim)
        self.up_k: Tensor | None = None
        self.up_v: Tensor | None = None
        self.update_k: Update | None = None
        self.update_v: Update | None = None

    def pack(self) -> None:
        heads, nope, v = self.sizes
        weight = self.weight.data.view(heads, nope + v, self.in_features)
        self.up_k = weight[:, :nope].contiguous()  # (heads, nope, rank)
        self.up_v = weight[:, nope:].transpose(1, 2).contiguous()  # (heads, rank, v)
        self.weight = None

    def absorb(self, q: Tensor) -> Tensor:
        """q: (tokens, heads, nope) -> queries of latents (tokens, heads, rank)."""
        out = torch.bmm(q.transpose(0, 1), self.up_k).transpose(0, 1)
        return out if self.update_k is None else self.update_k(q, out)

    def values(self, mixed: Tensor) -> Tensor:
        """Mixtures of latents (tokens, heads, rank) -> (tokens, heads * v_head_dim)."""
        out = torch.bmm(mixed.transpose(0, 1), self.up_v).transpose(0, 1)
        return (out if self.update_v is None else self.update_v(mixed, out)).flatten(1)


class LatentAttention(nn.Module):
    """The whole attention layer, with the checkpoint names of DeepSeek-V2.

    :param q_lora_rank: rank of the query's own compression; None for a plain `q_proj`.
    :param rope: over `qk_rope_head_dim`.
    :param scale: factor on scores; 1 / sqrt(nope + rotary) when not given.
    :param norm_eps: of the two norms of the latents.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rope: Rope,
        scale: float | None = None,
        bias: bool = False,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.num_heads, self.rank, self.rope = num_heads, kv_lora_rank, rope
        self.nope, self.rotary = qk_nope_head_dim, qk_rope_head_dim
        head_dim = qk_nope_head_dim + qk_rope_head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        if q_lora_rank is None:
            self.q_proj = ColumnLinear(hidden_size, num_heads * head_dim)
        else:
            self.q_a_proj = Linear(hidden_size, q_lora_rank, bias)
            self.q_a_layernorm = RMSNorm(q_lora_rank, norm_eps)
            self.q_b_proj = ColumnLinear(q_lora_rank, num_heads * head_dim)
        self.compresses_q = q_lora_rank is not None
        self.kv_a_proj_with_mqa = Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias)
        self.kv_a_layernorm = RMSNorm(kv_lora_rank, norm_eps)
        self.kv_b_proj = UpProjection(kv_lora_rank, num_heads, qk_nope_head_dim, v_head_dim)
        self.o_proj = RowLinear(num_heads * v_head_dim, hidden_size, bias)
        self.cache_spec = CacheSpec(1, kv_lora_rank + qk_rope_head_dim, v_head_dim=0)
        self.cache: Tensor | None = None
        self.group = 0

    def attach(self, k_cache: Tensor, v_cache: None, group: int) -> None:
        """Take the layer's cache of latents: (blocks, 1, block_size, rank + rotary); called by the core."""
        self.cache, self.group = k_cache, group

    def forward(self, x: Tensor, batch: Batch, residual: Tensor | None = None) -> Tensor:
        """x: (tokens, hidden_size) -> (tokens, hidden_size), with `residual` added."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.compresses_q else self.q_proj(x)
        q = q.view(len(x), self.num_heads, -1)
        q = torch.cat((self.kv_b_proj.absorb(q[..., : self.nope]), q[..., self.nope :]), dim=-1)
        latent = self.kv_a_proj_with_mqa(x)
        # k: (tokens, 1, rank + rotary), one head that all query heads share
        k = torch.cat((self.kv_a_layernorm(latent[:, : self.rank]), latent[:, self.rank :]), dim=-1)[:, None]
        table, rows = self.rope.angles(batch)
        for rotated in (q[..., self.rank :], k[..., self.rank :]):
            rope_kernel.rotate_(rotated, rows, table, self.rope.interleaved)
        pages = batch.pages[self.group]
        kv_cache.write(k, k[..., :0], self.cache, self.cache[..., :0], pages.slots)
        mixed = kernel.paged_attention(
            q,
            self.cache,
            self.cache[..., : self.rank],
            pages.block_table,
            batch.query_starts,
            batch.seq_lens,
            self.scale,
            max_query_len=batch.max_query_len,
        )
        return self.o_proj(self.kv_b_proj.values(mixed), residual)
