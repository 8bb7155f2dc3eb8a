"""gpt-oss: attention with sinks, every other layer within a window, and experts with a gate of their own kind.

Checkpoints store the experts in MXFP4 (four bits a number, a power of two for 32 of them) or, transposed, as plain
numbers; gate and up rows lie in turn in both. MXFP4 is read by dequantising, which is exact in bfloat16 and float32.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.modeling import Attention, CausalLM, Experts, QKVLinear, RMSNorm, Rope, Router, RowLinear, SwigluOAI
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class GptOssConfig(TextConfig):
    head_dim: int = 64
    max_position_embeddings: int = 131072
    rope_parameters: RopeParameters = RopeParameters(
        rope_type="yarn", rope_theta=150000.0, factor=32.0, original_max_position_embeddings=4096, truncate=False
    )
    rms_norm_eps: float = 1e-5
    attention_bias: bool = True
    sliding_window: int | None = 128
    layer_types: list[str] | None = None
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702

    def window(self, layer: int) -> int:
        """Layers 0, 2, 4, ... slide, unless `layer_types` says otherwise."""
        slides = self.layer_types[layer] == "sliding_attention" if self.layer_types else layer % 2 == 0
        return self.sliding_window or 0 if slides else 0


class SelfAttention(nn.Module):
    def __init__(self, cfg: GptOssConfig, layer: int):
        super().__init__()
        heads, kv_heads, size, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.attention_bias
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, size, bias)
        rope = Rope(size, cfg.rope_parameters)
        self.attn = Attention(heads, kv_heads, size, rope=rope, window=cfg.window(layer), sinks=True)
        self.o_proj = RowLinear(heads * size, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch), residual)


class SparseMoe(nn.Module):
    def __init__(self, cfg: GptOssConfig):
        super().__init__()
        count, act = cfg.num_local_experts, SwigluOAI(cfg.swiglu_limit, cfg.swiglu_alpha)
        self.router = Router(cfg.hidden_size, count, cfg.num_experts_per_tok, normalize=1, bias=True)
        self.experts = Experts(count, cfg.hidden_size, cfg.intermediate_size, act, bias=True)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.experts(x, *self.router(x), residual)


class Block(nn.Module):
    def __init__(self, cfg: GptOssConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = SparseMoe(cfg)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class GptOss(CausalLM):
    def __init__(self, cfg: GptOssConfig):
        super().__init__(cfg, Block, RMSNorm(cfg.hidden_size, cfg.rms_norm_eps))


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1 without its sign, the highest bit


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks: (rows, n, 16) uint8, two numbers a byte, the lower half first; scales: (rows, n) uint8, exponents with
    an offset of 127 -> (rows, 32 * n) bfloat16 (OCP Microscaling Formats 1.0)."""
    table = torch.tensor([*FP4, *(-x for x in FP4)], dtype=torch.bfloat16, device=blocks.device)
    numbers = table[torch.stack((blocks & 15, blocks >> 4), dim=-1).int()].flatten(2)  # (rows, n, 32)
    return torch.ldexp(numbers, scales.int()[..., None] - 127).to(torch.bfloat16).flatten(1)


def _by_expert(path: str, kind: str, matrices: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
    for expert, matrix in enumerate(matrices):  # (rows, in_features)
        if kind == "down_proj":
            yield f"{path}{expert}.down_proj.weight", matrix
        else:
            yield f"{path}{expert}.gate_proj.weight", matrix[0::2]
            yield f"{path}{expert}.up_proj.weight", matrix[1::2]


def plain_experts(weights: Iterable[tuple[str, Tensor]], cfg: GptOssConfig) -> Iterator[tuple[str, Tensor]]:
    """One expert at a time, so that no layer's experts lie in memory twice."""
    halves: dict[str, Tensor] = {}  # blocks whose scales have not come yet, and the reverse
    for name, tensor in weights:
        path, _, last = name.rpartition("experts.")
        path += "experts."
        if last in ("gate_up_proj", "down_proj"):
            yield from _by_expert(path, last, tensor.transpose(1, 2))
        elif last == "gate_up_proj_bias":
            yield name, torch.cat((tensor[:, 0::2], tensor[:, 1::2]), dim=1)
        elif last.endswith(("_blocks", "_scales")):
            kind = last.rpartition("_")[0]
            other = halves.pop(path + kind, None)
            if other is None:
                halves[path + kind] = tensor
            else:
                blocks, scales = (tensor, other) if last.endswith("_blocks") else (other, tensor)
                yield from _by_expert(path, kind, map(from_mxfp4, blocks, scales))
        else:
            yield name.replace(".self_attn.sinks", ".self_attn.attn.sinks"), tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    yarn = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 8.0, "original_max_position_embeddings": 64}
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rope_parameters": {**yarn, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        "sliding_window": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
    }
    variants = {
        "no_biases": {"attention_bias": False, "swiglu_limit": 1.0},
        "layer_types": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    }
    name = "GptOssForCausalLM"
    return [
        Architecture(
            name,
            GptOss,
            GptOssConfig,
            weights=plain_experts,
            reference=f"transformers:{name}",
            tiny=tiny,
            variants=variants,
        )
    ]
