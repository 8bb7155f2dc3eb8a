"""Fill a model that was built on the meta device, one checkpoint tensor at a time, and prove that nothing is missing.

Decisions: memory for a parameter is taken when its first tensor arrives, and a module is packed as soon as it is full,
so the peak stays near the weights themselves; every checkpoint tensor is used exactly once or refused by name. Of a
layer that several places divide only this place's part is read (`cut.py`).
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from modelport.modeling.cut import Cut, cut_of
from modelport.modeling.embedding import LMHead
from modelport.plugin import Architecture

_LANGUAGE = "language_model."


class WeightsError(ValueError):
    """The checkpoint's tensors do not fit the model; the message names them."""


@dataclass
class Target:
    """Rows of one parameter that one checkpoint tensor fills."""

    module: nn.Module
    path: str
    parameter: str
    start: int
    rows: int
    shape: tuple[int, ...]
    part: int | None  # None is all of the parameter, also where parts could fill it
    cut: Cut | None  # when only a piece of the tensor is kept

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Of the checkpoint's tensor."""
        return self.shape if self.cut is None else self.cut.full(self.shape, self.part)


def load_weights(
    model: nn.Module,
    weights: Iterable[tuple[str, Tensor]],
    architecture: Architecture,
    config: BaseModel,
    dtype: torch.dtype,
    device: torch.device,
    elsewhere: Set[str] = frozenset(),
    language: tuple[Architecture, BaseModel] | None = None,
    unused: Iterable[str] = (),
) -> None:
    """Copy every tensor of `weights` into `model` (which lies on the meta device) as `dtype` on `device`, and pack.

    :param elsewhere: names of tensors that other places take.
    :param unused: patterns of tensors that modules on other places know and do not need.
    :param language: of the language model that is the model's part `language_model`: its tensors are renamed and
        rewritten by its own architecture.
    :raises WeightsError: a tensor is missing, superfluous, given twice, of another shape, or holds NaN or infinity.
    """
    stream = rewritten(weights, architecture, config, language)
    ignored = architecture.ignore
    if language is not None:
        ignored = (*ignored, *(_LANGUAGE + pattern for pattern in language[0].ignore))
    known, optional = targets(model), _tied_names(model)
    ignored = (*ignored, *unused_names(model), *unused)
    open_rows = _rows_to_fill(model)
    surplus: list[str] = []
    seen: set[str] = set()
    for name, tensor in stream:
        target = known.get(name)
        if name in seen:
            raise WeightsError(f"the checkpoint holds tensor {name!r} twice")
        seen.add(name)
        if target is None:
            expected = name in optional or name in elsewhere
            if not expected and not any(fnmatchcase(name, pattern) for pattern in ignored):
                surplus.append(name)
            continue
        key = (target.path, target.parameter)
        if open_rows[key] < target.rows:
            raise WeightsError(f"tensor {name!r} fills rows of {target.path!r} that are already filled")
        _copy(target, name, tensor, _type(target.module, target.parameter, dtype), device)
        open_rows[key] -= target.rows
        if open_rows[key] == 0 and not any(open_rows[target.path, p] > 0 for p, _ in _own(target.module)):
            _pack(target.module)
        del tensor  # the stream reads the next one before this name would be bound anew
    _refuse(architecture, known, open_rows, surplus, seen)


def fill_random(model: nn.Module, dtype: torch.dtype, device: torch.device, seed: int) -> None:
    """Give every parameter small random values: `load_format="dummy"`, for timing a shape without its weights.

    They follow from the parameter's name, so that places which divide the model agree on it.
    """
    generator = torch.Generator(device)
    for path, module in list(model.named_modules()):
        for name, parameter in list(_own(module)):
            generator.manual_seed(seed ^ zlib.crc32(f"{path}.{name}".encode()))
            cut, kind = cut_of(module, name), _type(module, name, dtype)
            shape = tuple(parameter.shape) if cut is None else cut.full(tuple(parameter.shape), None)
            values = torch.empty(shape, dtype=kind, device=device).normal_(0.0, 0.02, generator=generator)
            if cut is not None:
                whole, values = values, torch.empty(parameter.shape, dtype=kind, device=device)
                for here, there in cut.views(values, whole):
                    here.copy_(there)
            module._parameters[name] = nn.Parameter(values, requires_grad=False)
        _pack(module)


def tensor_names(model: nn.Module) -> set[str]:
    """Every name under which a tensor of the checkpoint fills something in `model`."""
    return set(targets(model)) | _tied_names(model)


def rewritten(
    weights: Iterable[tuple[str, Tensor]],
    architecture: Architecture,
    config: BaseModel,
    language: tuple[Architecture, BaseModel] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's stream as what fills the model; parameters as in `load_weights`."""
    stream = _renamed(weights, architecture)
    if architecture.weights is not None:
        stream = iter(architecture.weights(stream, config))
    return stream if language is None else _with_language(stream, *language)


def _renamed(weights: Iterable[tuple[str, Tensor]], architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    prefixes = sorted(architecture.rename, key=len, reverse=True)
    for name, tensor in weights:
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        yield (name if prefix is None else architecture.rename[prefix] + name[len(prefix) :]), tensor


def _with_language(
    weights: Iterable[tuple[str, Tensor]], architecture: Architecture, config: BaseModel
) -> Iterator[tuple[str, Tensor]]:
    """The stream, the language model's part of it as its own architecture reads it."""
    others: list[tuple[str, Tensor]] = []

    def own() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if name.startswith(_LANGUAGE):
                yield name.removeprefix(_LANGUAGE), tensor
            else:
                others.append((name, tensor))

    stream = _renamed(own(), architecture)
    if architecture.weights is not None:
        stream = architecture.weights(stream, config)
    for name, tensor in stream:
        while others:
            yield others.pop(0)
        yield _LANGUAGE + name, tensor
    yield from others


def _type(module: nn.Module, parameter: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if parameter in getattr(module, "keep_float32", ()) else dtype


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module._parameters.items() if p is not None)


def targets(model: nn.Module) -> dict[str, Target]:
    """Checkpoint name -> where it goes; a fused layer answers to the names of its parts and to its own.

    Stacked layers, whose rows run over more than one dimension, are also stored without the word `weight`.
    """
    found: dict[str, Target] = {}
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        for name, parameter in _own(module):
            shape, dims = tuple(parameter.shape), _row_dims(module)
            cut = cut_of(module, name)
            whole = Target(module, path, name, 0, math.prod(shape[:dims]), shape, None, cut)
            found[_join(path, name)] = whole
            if dims > 1:
                found[path if name == "weight" else f"{path}_{name}"] = whole
            start = 0
            part_cut = None if cut is not None and cut.whole_parts else cut
            for part, (part_name, rows) in enumerate(getattr(module, "parts", ())):
                found[_join(parent, part_name, name)] = Target(
                    module, path, name, start, rows, (rows, *shape[dims:]), part, part_cut
                )
                start += rows
    return found


def _row_dims(module: nn.Module) -> int:
    return getattr(module, "row_dims", 1)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _tied_names(model: nn.Module) -> set[str]:
    """Second copies of tied weights, which some checkpoints store."""
    heads = ((path, m) for path, m in model.named_modules() if isinstance(m, LMHead))
    return {_join(path, "weight") for path, head in heads if head.is_tied}


def unused_names(model: nn.Module) -> Iterator[str]:
    """Patterns of tensors that modules know but do not need, such as those of layers whose states nobody reads.

    A module lists them as `unused`, by the names below it.
    """
    for path, module in model.named_modules():
        yield from (_join(path, pattern) for pattern in getattr(module, "unused", ()))


def _rows_to_fill(model: nn.Module) -> dict[tuple[str, str], int]:
    return {
        (path, name): math.prod(p.shape[: _row_dims(module)])
        for path, module in model.named_modules()
        for name, p in _own(module)
    }


def _copy(target: Target, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if tuple(tensor.shape) != target.full_shape:
        raise WeightsError(
            f"tensor {name!r} has shape {tuple(tensor.shape)}, the model wants {target.full_shape}; "
            "does config.json belong to these weights?"
        )
    parameter = target.module._parameters[target.parameter]
    if parameter.is_meta:
        parameter = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device), requires_grad=False)
        target.module._parameters[target.parameter] = parameter
    rows = parameter.data.view(-1, *parameter.shape[_row_dims(target.module) :])
    rows = rows[target.start : target.start + target.rows].view(target.shape)
    if target.cut is None:
        rows.copy_(tensor)
    else:
        for here, there in target.cut.views(rows, tensor, target.part):
            here.copy_(there)
    if not torch.isfinite(rows.sum(dtype=torch.float32)):  # one pass; a finite sum means that every element is
        bad = int((~torch.isfinite(rows)).sum())
        if bad:
            raise WeightsError(f"tensor {name!r} holds {bad} values that are NaN or infinite as {dtype}")


def _pack(module: nn.Module) -> None:
    pack = getattr(module, "pack", None)
    if pack is not None:
        pack()


def _refuse(
    architecture: Architecture,
    targets: dict[str, Target],
    open_rows: dict[tuple[str, str], int],
    surplus: list[str],
    seen: set[str],
) -> None:
    problems = []
    if any(rows > 0 for rows in open_rows.values()):
        unfilled = {key for key, rows in open_rows.items() if rows > 0}
        missing = [
            name
            for name, t in targets.items()
            # of a fused layer, name the parts that lack (or all of them when nothing came)
            if (t.path, t.parameter) in unfilled
            and name not in seen
            and not (t.part is None and getattr(t.module, "parts", ()))
        ]
        problems.append(f"missing: {_some(missing)}")
    if surplus:
        problems.append(f"not known to the model: {_some(surplus)}")
    if problems:
        raise WeightsError(
            f"the checkpoint does not fit {architecture.name}; " + "; ".join(problems) + ". "
            "Is the download complete, and does config.json belong to these weights?"
        )


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
