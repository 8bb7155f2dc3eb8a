"""Tensor parallelism: the layers of an empty model are divided between the places of a stage, from outside.

Decisions: layers are divided in units that begin and end with the whole hidden state, a pair of linears (columns, then
rows), an attention with its projections, all experts of a mixture; so a unit costs one sum over the places, and what is
not known to be divisible is computed whole by every place, which is right and only costs time. `describe` tells which
is which. Heads and widths that do not divide evenly are divided unevenly. The first place alone adds biases and the
residual, before the sum.

A module is narrowed in place while it lies on the meta device: smaller parameters, and a note of which part they are
(`module.cuts`), which the loader reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from modelport.modeling.attention import Attention, CrossAttention, EncoderAttention
from modelport.modeling.block_sparse import BlockSparseAttention
from modelport.modeling.cut import Cut, Piece
from modelport.modeling.latent import LatentAttention
from modelport.modeling.linear import ColumnLinear, Linear, MergedLinear, QKVLinear, RowLinear
from modelport.modeling.moe import Experts
from modelport.modeling.norm import LayerNorm, RMSNorm
from modelport.modeling.ssm import Mamba2Mixer, MambaMixer
from modelport.parallel.groups import Place

ATTENTION = Attention | BlockSparseAttention | CrossAttention | EncoderAttention


@dataclass(frozen=True)
class Note:
    """What became of one unit.

    :ivar path: the module that holds it.
    :ivar divided: False where every place computes it whole.
    :ivar how: in words: the sizes of this place's part, or why there is none.
    :ivar is_layer: False for what is as large as the vocabulary.
    """

    path: str
    divided: bool
    how: str
    is_layer: bool = True

    def __str__(self) -> str:
        return f"{self.path}: {'divided' if self.divided else 'whole'}, {self.how}"


class _Whole(Exception):
    """The unit is not divided; the message says why."""


def divide_layers(model: nn.Module, place: Place, by_expert: bool = False) -> list[Note]:
    """Keep of every unit the part of `place`; one note for each unit.

    :param by_expert: places take different experts of a mixture, instead of a part of each.

    :raises ValueError: attention heads that so many places cannot divide.
    """
    notes = []
    if place.tp_size == 1:
        return notes
    inside: list[str] = []  # units that were divided as a whole
    for path, module in list(model.named_modules()):
        if any(path.startswith(prefix) for prefix in inside):
            continue
        unit = _divide_by_expert if by_expert and isinstance(module, Experts) else _unit(module)
        if unit is None:
            continue
        if isinstance(module, LatentAttention | Experts | MambaMixer | Mamba2Mixer):
            inside.append(f"{path}.")
        try:
            notes.append(Note(path, True, unit(module, place)))
        except _Whole as why:
            notes.append(Note(path, False, str(why)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return notes


def _unit(module: nn.Module):
    """What divides the linears that `module` itself holds, None when there are none."""
    if isinstance(module, LatentAttention):
        return _divide_latent
    if isinstance(module, Experts):
        return _divide_experts
    if isinstance(module, MambaMixer):
        return _divide_mamba
    if isinstance(module, Mamba2Mixer):
        return _divide_mamba2
    if any(_own(module, ATTENTION)):
        return _divide_cross if any(_own(module, CrossAttention)) else _divide_attention
    if any(_own(module, ColumnLinear | MergedLinear | QKVLinear | RowLinear)):
        return _divide_pair
    return None


def _own(module: nn.Module, kind) -> Iterator[nn.Module]:
    return (child for child in module.children() if isinstance(child, kind))


def _only(module: nn.Module, kind, what: str) -> nn.Module:
    found = list(_own(module, kind))
    if len(found) != 1:
        raise _Whole(f"it has {len(found)} {what}")
    return found[0]


def share(whole: int, place: Place) -> Piece:
    """This place's part of `whole` things; parts differ by one at most."""
    start, end = (whole * rank // place.tp_size for rank in (place.tp_rank, place.tp_rank + 1))
    return Piece(start, end - start, whole)


def share_heads(num_heads: int, num_kv_heads: int, place: Place) -> tuple[Piece, Piece]:
    """Query and key heads of this place; a query head lies with its key head.

    With fewer key heads than places, several places keep the same key head, each with queries of its own.

    :raises ValueError: neither works out.
    """
    queries = num_heads // num_kv_heads  # of one key head
    if num_kv_heads >= place.tp_size:
        keys = share(num_kv_heads, place)
        return Piece(keys.start * queries, keys.size * queries, num_heads), keys
    copies, rest = divmod(place.tp_size, num_kv_heads)
    if rest or queries < copies:
        fitting = [n for n in range(1, num_heads + 1) if n <= num_kv_heads or n % num_kv_heads == 0]
        raise ValueError(
            f"num_attention_heads={num_heads} and num_key_value_heads={num_kv_heads} cannot be divided between "
            f"tensor_parallel_size={place.tp_size} places; use {' or '.join(map(str, fitting[-4:]))}"
        )
    key, copy = divmod(place.tp_rank, copies)
    start, end = (key * queries + queries * i // copies for i in (copy, copy + 1))
    return Piece(start, end - start, num_heads), Piece(key, 1, num_kv_heads)


def _times(piece: Piece, size: int) -> Piece:
    return Piece(*(number * size for number in piece))


def _cut(module: nn.Module, name: str, dim: int, *pieces: Piece, whole_parts: bool = False) -> None:
    """Keep `pieces` of a parameter."""
    parameter = module._parameters.get(name)
    if parameter is None:
        return
    shape = list(parameter.shape)
    assert shape[dim] == sum(piece.whole for piece in pieces), (name, shape, pieces)
    shape[dim] = sum(piece.size for piece in pieces)
    module._parameters[name] = nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"), False)
    if not hasattr(module, "cuts"):
        module.cuts = {}
    module.cuts[name] = Cut(dim, pieces, whole_parts)


def _cut_outputs(linear: Linear, *pieces: Piece) -> None:
    """Keep `pieces` of the outputs, one for each part."""
    _cut(linear, "weight", -2, *pieces)
    _cut(linear, "bias", -1, *pieces)
    linear.out_features = sum(piece.size for piece in pieces)
    linear.parts = tuple((name, piece.size) for (name, _), piece in zip(linear.parts, pieces, strict=False))


def _cut_inputs(linear: Linear, piece: Piece, place: Place) -> None:
    """Keep a piece of the inputs, and sum the products."""
    _cut(linear, "weight", -1, piece)
    linear.in_features = piece.size
    if place.tp_rank:
        linear.bias = None
    product = linear.forward

    def forward(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return place.all_reduce(product(x, None if place.tp_rank else residual))

    linear.forward = forward


def _divide_attention(module: nn.Module, place: Place) -> str:
    """A fused projection, attention, and the output's projection."""
    qkv = _only(module, QKVLinear, "fused projections of queries, keys and values")
    attention = _only(module, ATTENTION, "attentions")
    out = _only(module, RowLinear, "projections of the output")
    num_heads, num_kv_heads, _ = qkv.heads
    if isinstance(attention, EncoderAttention) and num_kv_heads < place.tp_size:
        raise _Whole(f"it has only {num_kv_heads} key heads, and an encoder needs no cache")
    if any(_own(module, ColumnLinear | MergedLinear)) or out.in_features != num_heads * qkv.head_dim:
        raise _Whole("its projections are none that are known")
    _no_parameters(module)
    norms = [norm for norm in module.modules() if isinstance(norm, LayerNorm | RMSNorm)]
    counts = {(num_heads, qkv.head_dim), (num_kv_heads, qkv.head_dim)}
    if not all(norm.size == qkv.head_dim or norm.size in counts for norm in norms):
        raise _Whole("a norm runs over all heads together")
    known = QKVLinear | ATTENTION | RowLinear | LayerNorm | RMSNorm
    if any(list(child.parameters()) for child in module.children() if not isinstance(child, known)):
        raise _Whole("it has parameters that are not known")
    q, k = share_heads(num_heads, num_kv_heads, place)
    for norm in norms:
        if isinstance(norm.size, tuple):
            piece = {num_kv_heads: k, num_heads: q}[norm.size[0]]  # where these are equal, so are the pieces
            for name in ("weight", "bias"):
                _cut(norm, name, -2, piece)
            norm.size = (piece.size, norm.size[1])
    _cut_outputs(qkv, *(_times(piece, qkv.head_dim) for piece in (q, k, k)))
    qkv.heads = (q.size, k.size, k.size)
    _cut_inputs(out, _times(q, qkv.head_dim), place)
    _narrow(attention, q, k)
    return f"{q.size} of {num_heads} heads, {k.size} of {num_kv_heads} key heads"


def _narrow(attention: nn.Module, q: Piece, k: Piece) -> None:
    if isinstance(attention, EncoderAttention):
        return
    attention.cache_spec = replace(attention.cache_spec, num_kv_heads=k.size)
    if isinstance(attention, BlockSparseAttention):  # its layers share the pattern, and all have the same heads
        pattern = attention.pattern
        pattern.heads, pattern.kv_heads, pattern.first_head = q.size, k.size, q.start
    if isinstance(attention, Attention):
        _cut(attention, "sinks", -1, q)
        if attention.alibi is not None:
            attention.alibi.heads = slice(q.start, q.start + q.size)


def _divide_cross(module: nn.Module, place: Place) -> str:
    """Attention to an encoder: queries by themselves, keys and values of the encoder's states."""
    attention = _only(module, ATTENTION, "attentions")
    query, pair = _only(module, ColumnLinear, "projections of queries"), _only(module, MergedLinear, "of keys")
    out = _only(module, RowLinear, "projections of the output")
    _no_parameters(module)
    spec = attention.cache_spec
    head_dim, heads = spec.head_dim, query.out_features // spec.head_dim
    keys = spec.num_kv_heads * head_dim
    if [rows for _, rows in pair.parts] != [keys, keys] or out.in_features != query.out_features:
        raise _Whole("its projections are none that are known")
    norms = [child for child in module.children() if isinstance(child, LayerNorm | RMSNorm)]
    if any(norm.size != head_dim for norm in norms) or any(isinstance(c, QKVLinear) for c in module.children()):
        raise _Whole("it has parameters that are not known")
    q, k = share_heads(heads, spec.num_kv_heads, place)
    _cut_outputs(query, _times(q, head_dim))
    _cut_outputs(pair, _times(k, head_dim), _times(k, head_dim))
    _cut_inputs(out, _times(q, head_dim), place)
    _narrow(attention, q, k)
    return f"{q.size} of {heads} heads, {k.size} of {spec.num_kv_heads} key heads"


def _divide_latent(module: LatentAttention, place: Place) -> str:
    """By heads; the latents, which all heads share, are computed and kept by every place."""
    whole = module.num_heads
    heads, _ = share_heads(whole, whole, place)
    query = module.q_b_proj if module.compresses_q else module.q_proj
    _cut_outputs(query, _times(heads, query.out_features // whole))
    up = module.kv_b_proj
    _, nope, values = up.sizes
    _cut_outputs(up, _times(heads, nope + values))
    up.sizes = (heads.size, nope, values)
    _cut_inputs(module.o_proj, _times(heads, values), place)
    module.num_heads = heads.size
    return f"{heads.size} of {whole} heads, latents whole"


def _divide_experts(module: Experts, place: Place) -> str:
    """Every expert's width."""
    wide, down = module.gate_up_proj, module.down_proj
    width = share(wide.size, place)
    if wide.size < place.tp_size:
        raise _Whole(f"its experts are only {wide.size} wide")
    for name, dim in (("weight", -2), ("bias", -1)):
        _cut(wide, name, dim, width, width)
    wide.size, wide.parts = width.size, tuple((name, width.size) for name, _ in wide.parts)
    _cut(down, "weight", -1, width)
    if place.tp_rank:
        down.bias = None
    mixture = module.forward

    def forward(x: Tensor, shares: Tensor, ids: Tensor, residual: Tensor | None = None) -> Tensor:
        return place.all_reduce(mixture(x, shares, ids, None if place.tp_rank else residual))

    module.forward = forward
    return f"{width.size} of {width.whole} columns of every expert"


def _divide_by_expert(module: Experts, place: Place) -> str:
    """Whole experts: fewer and larger products, and work that is uneven where tokens prefer some experts."""
    count = len(module.down_proj.parts) // len(module.down_proj.names)
    if count < place.tp_size:
        return _divide_experts(module, place)
    mine = share(count, place)
    for linear in (module.gate_up_proj, module.down_proj):
        _cut(linear, "weight", -3, mine, whole_parts=True)
        _cut(linear, "bias", -2, mine, whole_parts=True)
        each = len(linear.names)
        linear.parts = linear.parts[mine.start * each : (mine.start + mine.size) * each]
    mixture = module.forward

    def forward(x: Tensor, shares: Tensor, ids: Tensor, residual: Tensor | None = None) -> Tensor:
        local = ids - mine.start
        here = torch.where((local >= 0) & (local < mine.size), local, -1)  # the others add nothing
        return place.all_reduce(mixture(x, shares, here, None if place.tp_rank else residual))

    module.forward = forward
    return f"{mine.size} of {count} experts"


def _divide_mamba(module: MambaMixer, place: Place) -> str:
    """By channels; dt, B and C, which all channels read, are summed before they are used."""
    inner = module.out_proj.in_features
    piece = share(inner, place)
    if inner < place.tp_size:
        raise _Whole(f"it has only {inner} channels")
    _cut_outputs(module.in_proj, piece, piece)
    _cut_convolution(module, piece)
    _cut_inputs(module.x_proj, piece, place)
    _cut_outputs(module.dt_proj, piece)
    _cut(module, "A_log", -2, piece)
    _cut(module, "D", -1, piece)
    _cut_inputs(module.out_proj, piece, place)
    states, _ = module.cache_spec.shapes[1]
    module.cache_spec = replace(module.cache_spec, shapes=(module.conv1d.state_shape, (states, piece.size)))
    return f"{piece.size} of {inner} channels"


def _divide_mamba2(module: Mamba2Mixer, place: Place) -> str:
    """By groups, whose heads share B, C and the norm."""
    if module.groups < place.tp_size:
        raise _Whole(f"its heads share B and C in {module.groups} groups")
    heads, (inner, shared, _) = module.num_heads, module.sizes
    group = share(module.groups, place)
    own, channels, both = (_times(group, count // group.whole) for count in (heads, inner, shared))
    _cut_outputs(module.in_proj, channels, channels, both, both, own)
    _cut_convolution(module, channels, both, both)
    for name in ("dt_bias", "A_log", "D"):
        _cut(module, name, -1, own)
    _cut(module.norm, "weight", -1, channels)
    _cut_inputs(module.out_proj, channels, place)
    module.num_heads, module.groups, module.sizes = own.size, group.size, (channels.size, both.size, both.size)
    _, *rest = module.cache_spec.shapes[1]
    module.cache_spec = replace(module.cache_spec, shapes=(module.conv1d.state_shape, (own.size, *rest)))
    return f"{own.size} of {heads} heads"


def _cut_convolution(module: MambaMixer | Mamba2Mixer, *pieces: Piece) -> None:
    _cut(module.conv1d, "weight", -3, *pieces)
    _cut(module.conv1d, "bias", -1, *pieces)
    module.conv1d.channels = sum(piece.size for piece in pieces)


def _divide_pair(module: nn.Module, place: Place) -> str:
    """One or two linears of the same width, something elementwise, and a linear of that width."""
    down = _only(module, RowLinear, "linears that end a pair")
    if any(_own(module, QKVLinear)):
        raise _Whole("it has no attention that is known")
    wide = list(_own(module, ColumnLinear | MergedLinear))
    width = down.in_features
    sizes = [size for linear in wide for size in ([rows for _, rows in linear.parts] or [linear.out_features])]
    if not 1 <= len(sizes) <= 2 or any(size != width for size in sizes):
        raise _Whole(f"widths {', '.join(map(str, sizes)) or 'of nothing'} do not pair with {width}")
    others = [m for child in module.children() if not isinstance(child, Linear) for m in child.modules()]
    own = [p for p in module._parameters.values() if p is not None]
    norms = [m for m in others if isinstance(m, LayerNorm | RMSNorm)]
    shapes = [p.shape for m in others if not isinstance(m, Linear) for p in (m._parameters.values()) if p is not None]
    if own or any(width in shape for shape in shapes) or any(norm.size == width for norm in norms):
        raise _Whole("something else runs over its width")
    if width < place.tp_size:
        raise _Whole(f"it is only {width} wide")
    piece = share(width, place)
    for linear in wide:
        _cut_outputs(linear, *([piece] * (len(linear.parts) or 1)))
    _cut_inputs(down, piece, place)
    return f"{piece.size} of {width} columns"


def _no_parameters(module: nn.Module) -> None:
    if any(p is not None for p in module._parameters.values()):
        raise _Whole("it has parameters of its own")
