"""Weights: each tensor of the checkpoint is needed and used, nothing else is accepted, and files may be cut up.

Decision: that a tensor is used is shown by taking it away: the loader must then refuse. One that a `weights` function
drops silently would load without complaint.
"""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

from modelport.loading.loader import WeightsError, unused_names
from modelport.loading.safetensors import INDEX
from modelport.modeling.embedding import LMHead
from modelport.testing.reference import LOGITS_LIMIT, ModuleReference
from modelport.testing.registry import Failure, Measured, conformance_check
from modelport.testing.subject import Subject, difference, needs

SHARDS = 3
PROBES = 3  # prompts by which a differently stored checkpoint is recognised as the same


@conformance_check()
def weights(subject: Subject) -> Measured:
    """Every tensor of the checkpoint is taken once, and every parameter of the model is filled."""
    subject.tensors  # noqa: B018  # skips the check without a checkpoint
    subject.build()  # refuses a tensor that is superfluous or comes twice, and a parameter that is not filled
    return Measured(detail=f"{len(subject.tensors)} tensors")


@conformance_check()
def missing_weights(subject: Subject) -> Measured:
    """A checkpoint that lacks a tensor is refused, or the tensor changes the logits: none is dropped silently."""
    names = _one_of_each_kind(subject)
    for name in names:
        rest = {key: tensor for key, tensor in subject.tensors.items() if key != name}
        try:
            subject.build(subject.write("missing", rest))
        except WeightsError:
            continue
        if not (is_spare(subject, name) or _matters(subject, name)):
            raise Failure(
                f"the checkpoint loads without {name!r}, so that tensor is never used; take it in `weights`, or name "
                "it in `ignore` when the model does not need it"
            )
    return Measured(detail=f"{len(names)} tensors taken away in turn")


@conformance_check()
def extra_weight(subject: Subject) -> None:
    """A checkpoint with a tensor that the model does not know is refused."""
    name = _one_of_each_kind(subject)[-1]
    unknown = f"{name.rpartition('.')[0]}.unheard_of"
    try:
        subject.build(subject.write("extra", {**subject.tensors, unknown: subject.tensors[name].clone()}))
    except WeightsError:
        return
    raise Failure(
        f"the checkpoint loads with an unknown tensor {unknown!r}: `ignore` or `weights` lets everything through"
    )


@conformance_check()
def tied_weights(subject: Subject) -> Measured:
    """A tied weight that the checkpoint stores twice changes nothing."""
    needs(isinstance(subject.reference, ModuleReference), "no module to take the second copies of tied weights from")
    copies = {k: v.clone() for k, v in subject.reference.duplicates().items() if k not in subject.tensors}
    needs(copies, "no weights are tied")
    return _same(subject, subject.write("tied", {**subject.tensors, **copies}), ", ".join(copies))


@conformance_check()
def sharded_weights(subject: Subject) -> Measured:
    """Weights in several files with an index are the weights in one."""
    return _same(subject, _write_shards(subject), f"{SHARDS} files")


@conformance_check()
def dtype(subject: Subject) -> Measured:
    """Weights stored in bfloat16 are run in bfloat16, and in float32 when that is asked for."""
    stored = {k: v.bfloat16() if v.is_floating_point() else v for k, v in subject.tensors.items()}
    config = {k: v for k, v in subject.raw_config.items() if k not in ("dtype", "torch_dtype")}
    prompts = subject.prompts[:PROBES]
    kept = {}
    for key in ("dtype", "torch_dtype"):  # today's key and the one of older checkpoints
        folder = subject.write("dtype", stored, {**config, key: "bfloat16"})
        for asked in ("auto", "bfloat16", "float32"):
            kept[asked] = [c.logits for c in subject.alone(prompts, tokens=1, folder=folder, dtype=asked)]
        if not all((a == b).all() for a, b in zip(kept["auto"], kept["bfloat16"], strict=True)):
            raise Failure(f"config.json says {key}: bfloat16, and without a wish the model runs in something else")
        if all((a == b).all() for a, b in zip(kept["auto"], kept["float32"], strict=True)):
            raise Failure("the model computes the same in bfloat16 as in float32: a layer converts what it is given")
    return Measured()


def _matters(subject: Subject, name: str) -> bool:
    """Whether other values in a tensor give other logits."""
    tensor = subject.tensors[name]
    (base,) = subject.alone(subject.prompts[1:2], tokens=1)
    changed = subject.write("changed", {**subject.tensors, name: (tensor + 1).flip(-1)})
    (other,) = subject.alone(subject.prompts[1:2], tokens=1, folder=changed)
    return bool((base.logits != other.logits).any())


def _same(subject: Subject, folder: Path, detail: str) -> Measured:
    found = subject.alone(subject.prompts[:PROBES], folder=folder)
    worst = max(difference(base, other) for base, other in zip(subject.baseline[:PROBES], found, strict=True))
    return Measured(worst, LOGITS_LIMIT, detail)


def _one_of_each_kind(subject: Subject) -> list[str]:
    """The first and the last tensor of those whose names differ in numbers only."""
    kinds: dict[str, list[str]] = {}
    for name in subject.tensors:
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    order = [(names[0], names[-1]) for names in (sorted(names, key=_numbers) for names in kinds.values())]
    return list(dict.fromkeys(name for pair in order for name in pair))


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def is_spare(subject: Subject, name: str) -> bool:
    """Whether the model says that it needs no such tensor: it is ignored, or a second copy of a tied head."""
    architecture = subject.architecture
    prefix = max((p for p in architecture.rename if name.startswith(p)), key=len, default=None)
    renamed = name if prefix is None else architecture.rename[prefix] + name[len(prefix) :]
    heads = {f"{path}.weight" for path, m in subject.model.named_modules() if isinstance(m, LMHead) and m.is_tied}
    return renamed in heads or any(
        fnmatchcase(renamed, pattern) for pattern in (*architecture.ignore, *unused_names(subject.model))
    )


def _write_shards(subject: Subject) -> Path:
    from safetensors.torch import save_file

    folder = subject.write("shards")
    (folder / "model.safetensors").unlink()
    names = list(subject.tensors)
    weight_map = {}
    for i in range(SHARDS):
        file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        weight_map |= dict.fromkeys(names[i::SHARDS], file)
        save_file({name: subject.tensors[name].contiguous() for name in names[i::SHARDS]}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
