"""Rotary positions (Su et al., 2021): tables of cosines and sines, computed by us, shared by equal layers.

Decisions: an ordinary table has one row per position, and a step pays nothing for it. Two published kinds turn the same
position by other angles when a sequence is long. They sort sequences into *length classes*: keys of one class fit each
other and no other class, so whoever keeps keys keeps the class with them (`Rope.length_class`).
  longrope: short factors (class 0) up to the original context, long ones (class 1) for every position once the sequence
    is longer. Its authors drop the cache and compute the sequence again at that point; so a class may change.
  dynamic: a prompt longer than the original context is turned by the base that belongs to its length (the class), each
    token generated after it by the base of the length it makes. Nothing is recomputed, and a class never changes.
"""

import math
from collections.abc import Callable
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters


class Rope(nn.Module):
    """Settings of a rotary embedding, and its table once the core has built it.

    :param head_dim: size of a head; the first `partial_rotary_factor` of it is rotated. Where a configuration counts
        the rotated dimensions (GPT-J's `rotary_dim`), give that number.
    :param parameters: the checkpoint's `rope_parameters`.
    :param interleaved: pairs are neighbours (GPT-J) instead of halves (NeoX).
    :ivar by_length: angles depend on the sequence's length; `Batch.length_classes` is then needed.
    :raises ValueError: a `rope_type` that is not known, or parameters that it lacks or that do not fit `head_dim`.
    """

    def __init__(self, head_dim: int, parameters: RopeParameters, interleaved: bool = False):
        super().__init__()
        if parameters.rope_type not in _FREQUENCIES:
            raise ValueError(
                f"rope_type {parameters.rope_type!r} in rope_parameters is not supported; "
                f"known types: {', '.join(sorted(_FREQUENCIES))}"
            )
        # "proportional" turns the first part of a whole head's pairs, the others an angle of nothing.
        share = 1.0 if parameters.rope_type == "proportional" else parameters.partial_rotary_factor
        self.rotary_dim = int(head_dim * share)
        if self.rotary_dim % 2 or self.rotary_dim < 2:
            raise ValueError(f"head_dim={head_dim} and partial_rotary_factor={share} rotate {self.rotary_dim} "
                             "dimensions; rotation takes pairs, so check these in config.json")  # fmt: skip
        self.parameters, self.interleaved = parameters, interleaved
        _check(self.rotary_dim, parameters)
        self.cos_sin: Tensor | None = None
        self._table: _Table | None = None

    def build_tables(self, device: torch.device, max_len: int) -> None:
        """Compute `cos_sin`: (rows, rotary_dim) float32, cosines then sines, row = position. Called once by the core.

        With two length classes the rows of class 1 follow behind the `max_len` rows of class 0.
        """
        key = (self.rotary_dim, self.parameters, max_len, device)
        table = _tables.get(key)
        if table is None:
            table = _tables[key] = _Table(*key)
        self._table, self.cos_sin = table, table.cos_sin

    @property
    def by_length(self) -> bool:
        return self._table is not None and self._table.by_length

    def angles(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The table for this step and the row of it for each token: `cos_sin` and (tokens,) int64."""
        if self._table.by_length or (batch.axes is not None and self.parameters.mrope_section):
            return self._table.of_step(batch)
        return self.cos_sin, batch.positions

    def length_class(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """Which angles a sequence gets that began with `num_prompt_tokens` and has `num_tokens` known now.

        When it changes for a sequence, its keys are void and it is computed again from the start.
        """
        if not self.by_length:
            return 0
        limit = _limit(self.parameters)
        if self.parameters.rope_type == "longrope":
            return int(num_tokens > limit)
        return num_prompt_tokens if num_prompt_tokens > limit else 0

    def extra_repr(self) -> str:
        return f"{self.rotary_dim}, {self.parameters.rope_type}, interleaved={self.interleaved}"


def find_by_length(model: nn.Module) -> Rope | None:
    """The rope whose `length_class` holds for all of `model`, None when no angles depend on length.

    :raises ValueError: two ropes of the model sort sequences differently.
    """
    found = [m for m in model.modules() if isinstance(m, Rope) and m.by_length]
    rules = {(r.parameters.rope_type, _limit(r.parameters)) for r in found}
    if len(rules) > 1:
        raise ValueError(f"layers change their rotary angles at different lengths: {sorted(rules)}; this cannot be run")
    return found[0] if found else None


def _limit(p: RopeParameters) -> int | None:
    """The length of the longest sequence of class 0; None where all are."""
    kinds = {"longrope": p.original_max_position_embeddings, "dynamic": p.max_position_embeddings}
    return kinds.get(p.rope_type)


class _Table:
    """Angles of equal ropes. Lives as long as one of them does."""

    def __init__(self, dim: int, parameters: RopeParameters, max_len: int, device: torch.device):
        self.dim, self.parameters, self.max_len = dim, parameters, max_len
        self._step: tuple[Batch, tuple[Tensor, Tensor]] | None = None
        kind = parameters.rope_type
        sets = [(_FREQUENCIES[kind](dim, parameters), _magnitude(parameters))]
        limit = _limit(parameters)
        self.by_length = limit is not None and max_len > limit
        if self.by_length and kind == "longrope":
            # Checkpoints whose two sets are the same need no classes.
            same = parameters.short_factor == parameters.long_factor
            self.by_length = not same or parameters.short_mscale != parameters.long_mscale
            if self.by_length:
                sets.append((_longrope(dim, parameters, long=True), _magnitude(parameters, long=True)))
        positions = torch.arange(max_len, dtype=torch.float32)
        table = torch.empty(len(sets) * max_len, dim)
        for part, (frequencies, magnitude) in zip(table.split(max_len), sets, strict=True):
            _fill(part, torch.outer(positions, frequencies), magnitude)
        self.cos_sin = table.to(device)
        self.axis = _axis_of_pair(parameters).repeat(2).to(device)  # of each column

    def of_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Table and rows for a step; computed by the first of the layers that ask."""
        if self._step is None or self._step[0] is not batch:
            self._step = batch, self._of(batch) if self.by_length else self._of_axes(batch)
        return self._step[1]

    def _of_axes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Every pair turns by the position on its own axis (M-RoPE, arXiv 2409.12191, section 2.1)."""
        by_axis = torch.stack([self.cos_sin[positions] for positions in batch.axes])  # (axes, tokens, dim)
        table = by_axis[self.axis, :, torch.arange(self.dim, device=by_axis.device)]  # (dim, tokens)
        return table.T.contiguous(), torch.arange(len(batch.positions), device=by_axis.device)

    def _of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.length_classes is not None, "angles depend on length: Batch.length_classes is needed"
        positions = batch.positions
        row = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
        sequence = torch.bucketize(row, batch.query_starts[1:], right=True).clamp_(max=len(batch.length_classes) - 1)
        classes = batch.length_classes[sequence]  # (tokens,)
        if self.parameters.rope_type == "longrope":
            return self.cos_sin, positions + classes.long() * self.max_len
        lengths = torch.maximum(positions + 1, classes).clamp_(min=_limit(self.parameters))
        angles = positions[:, None] * _stretched(self.dim, self.parameters, lengths)  # (tokens, dim / 2)
        table = torch.empty(len(positions), self.dim, device=positions.device)
        _fill(table, angles, 1.0)
        return table, row.long()


def _axis_of_pair(p: RopeParameters) -> Tensor:
    """(pairs,) int64: the axis of positions that a pair turns by."""
    if not p.mrope_interleaved:
        axes = [axis for axis, count in enumerate(p.mrope_section) for _ in range(count)]
        return torch.tensor(axes, dtype=torch.int64)
    axis = torch.zeros(sum(p.mrope_section), dtype=torch.int64)  # the first axis where the others have had their turns
    for other, count in enumerate(p.mrope_section[1:], start=1):
        axis[other : other + len(p.mrope_section) * count : len(p.mrope_section)] = other
    return axis


_tables: WeakValueDictionary[tuple[int, RopeParameters, int, torch.device], _Table] = WeakValueDictionary()


def _fill(table: Tensor, angles: Tensor, magnitude: float) -> None:
    cos, sin = table.chunk(2, dim=-1)
    torch.cos(angles, out=cos).mul_(magnitude)
    torch.sin(angles, out=sin).mul_(magnitude)


# ---- frequencies: (dim / 2,) float32, radians per position


def _plain(dim: int, p: RopeParameters) -> Tensor:
    return 1.0 / (p.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def _linear(dim: int, p: RopeParameters) -> Tensor:
    """Positions are squeezed (kaiokendev, 2023; Chen et al., 2023)."""
    return _plain(dim, p) / p.factor


def _proportional(dim: int, p: RopeParameters) -> Tensor:
    """`dim` is the whole head; pairs past `partial_rotary_factor` stand still (Gemma 3n and 4)."""
    frequencies = _plain(dim, p) / (p.factor or 1.0)
    frequencies[int(dim * p.partial_rotary_factor // 2) :] = 0.0
    return frequencies


def _stretched(dim: int, p: RopeParameters, lengths: Tensor) -> Tensor:
    """Dynamic NTK (bloc97 and emozilla, 2023): the base grows with the length; (n,) int64 -> (n, dim / 2).

    In float64 until the end: vectors and their tails round differently, and far positions would multiply that.
    """
    growth = p.factor * lengths.double() / p.max_position_embeddings - (p.factor - 1)
    base = p.rope_theta * growth ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=lengths.device) / dim
    return (base[:, None] ** -exponents).float()


def _llama3(dim: int, p: RopeParameters) -> Tensor:
    """Slow frequencies are stretched, fast ones kept, those between blended (Llama 3.1 model card's reference code)."""
    plain = _plain(dim, p)
    turns = p.original_max_position_embeddings * plain / (2 * math.pi)  # full turns over the original context
    keep = ((turns - p.low_freq_factor) / (p.high_freq_factor - p.low_freq_factor)).clamp(0, 1)
    return plain * keep + plain / p.factor * (1 - keep)


def _yarn(dim: int, p: RopeParameters) -> Tensor:
    """As llama3, but blended linearly in the index of the pair (YaRN, Peng et al., 2023, section 3.2)."""

    def pair_with(turns: float) -> float:  # the pair that makes so many turns over the original context
        return dim * math.log(p.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(p.rope_theta))

    low, high = pair_with(p.beta_fast), pair_with(p.beta_slow)
    if p.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    squeezed = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)
    plain = _plain(dim, p)
    return plain * (1 - squeezed) + plain / _ratio(p) * squeezed


def _longrope(dim: int, p: RopeParameters, long: bool = False) -> Tensor:
    """A searched divisor for every pair (LongRoPE, Ding et al., 2024)."""
    return _plain(dim, p) / torch.tensor(p.long_factor if long else p.short_factor)


_FREQUENCIES: dict[str, Callable[[int, RopeParameters], Tensor]] = {
    "default": _plain,
    "linear": _linear,
    "proportional": _proportional,
    "dynamic": _plain,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


# ---- magnitudes: factor on cosines and sines


def _magnitude(p: RopeParameters, long: bool = False) -> float:
    if p.rope_type == "yarn":
        if p.attention_factor is not None:
            return p.attention_factor

        def grown(scale: float) -> float:  # DeepSeek's two settings; with neither, the paper's 0.1 ln(s) + 1
            return 1.0 + 0.1 * scale * math.log(_ratio(p)) if _ratio(p) > 1 else 1.0

        return grown(p.mscale) / grown(p.mscale_all_dim)
    if p.rope_type == "longrope":
        given = p.long_mscale if long else p.short_mscale  # PhiMoE
        if given is None:
            given = p.attention_factor
        if given is not None:
            return given
        return math.sqrt(1 + math.log(max(_ratio(p), 1.0)) / math.log(p.original_max_position_embeddings))
    return 1.0


def _ratio(p: RopeParameters) -> float:
    """How many times longer than the original context the model's is."""
    return p.factor or p.max_position_embeddings / p.original_max_position_embeddings


_NEEDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor", "max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("original_max_position_embeddings", "short_factor", "long_factor"),
}


def _check(dim: int, p: RopeParameters) -> None:
    needed = _NEEDS.get(p.rope_type, ())
    if p.rope_type in ("yarn", "longrope") and p.factor is None:
        needed = (*needed, "max_position_embeddings")
    if p.mrope_section and sum(p.mrope_section) != dim // 2:
        raise ValueError(f"mrope_section {p.mrope_section} in rope_parameters has {sum(p.mrope_section)} pairs; "
                         f"{dim} rotated dimensions have {dim // 2}")  # fmt: skip
    for key in needed:
        if not getattr(p, key):
            raise ValueError(f"rope_type {p.rope_type!r} needs {key} in rope_parameters")
    if p.rope_type == "longrope":
        for key, factors in (("short_factor", p.short_factor), ("long_factor", p.long_factor)):
            if len(factors) != dim // 2:
                raise ValueError(f"{key} in rope_parameters has {len(factors)} numbers; {dim} rotated dimensions need "
                                 f"{dim // 2}")  # fmt: skip
