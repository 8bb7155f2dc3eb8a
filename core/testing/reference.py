"""What an architecture is compared with: a torch module filled with random values, or the recorded outputs of one.

Decisions: the checkpoint is written as files, under the reference's own tensor names, so that the real loader is
tested; norms, biases and zero buffers are random too, since ones and zeros would hide that they are never applied; a
reference that hardly looks at its input proves nothing, so seeds and spreads are tried until it does.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelport.loading.checkpoint import read_config, resolve
from modelport.plugin import Architecture, Plugins
from modelport.testing.prompts import Prompt
from modelport.testing.registry import Failure, Skip
from modelport.testing.report import NOT_APPLICABLE, NOT_BUILT

LOGITS_LIMIT = 1e-4
"""Largest difference of float32 logits, relative to the largest reference logit: rounding stays ten times below it."""
LOWEST = torch.finfo(torch.float32).min
"""Logit of entries that are never chosen."""
SENSITIVITY = 20 * LOGITS_LIMIT  # how far a changed input must move the logits, in the same measure
DISTINCT = 8  # different likeliest tokens that a sensible reference gives after 64 prefixes
ATTEMPTS = ((0, 1.0), (1, 1.0), (2, 0.5), (3, 2.0), (4, 0.25))  # seed, factor on the spread of the weights


class ModuleReference:
    """A small random instance of what `architecture.reference` names.

    :param overrides: `config.json` entries besides `architecture.tiny`.
    :param factor: scales the spread of the random weights.
    :raises ValueError: the architecture names no reference that can be made.
    """

    def __init__(
        self,
        architecture: Architecture,
        seed: int = 0,
        overrides: Mapping[str, Any] | None = None,
        factor: float = 1.0,
    ):
        self.architecture = architecture
        # An end of text that a random model hits would cut the comparison short.
        self.entries = {**architecture.tiny, **(overrides or {}), "bos_token_id": 1, "eos_token_id": None}
        self.model = _module(architecture, dict(self.entries)).eval().float()
        fill(self.model, seed, factor)

    @property
    def name(self) -> str:
        reference = self.architecture.reference
        return reference if isinstance(reference, str) else f"{reference.__module__}:{reference.__qualname__}"

    def save(self, folder: Path, **save_options: Any) -> Path:
        """Write `config.json` and `model.safetensors`, with the architecture's own name.

        :param save_options: for a transformers model, options of its `save_pretrained` (`max_shard_size`).
        """
        folder.mkdir(parents=True, exist_ok=True)
        entries = dict(self.entries)
        if hasattr(self.model, "save_pretrained"):  # published names, where transformers keeps another form in memory
            with _no_progress_bar():
                self.model.save_pretrained(folder, **save_options)
            entries = json.loads((folder / "config.json").read_text())
            (folder / "generation_config.json").unlink(missing_ok=True)
        else:
            from safetensors.torch import save_file

            save_file(_distinct(self.model), folder / "model.safetensors", metadata={"format": "pt"})
        entries |= {"architectures": [self.architecture.name], "dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(entries, indent=1))
        return folder

    def duplicates(self) -> dict[str, Tensor]:
        """Tensors that `save` leaves out because they share their memory with one that it writes: tied weights."""
        kept = _distinct(self.model)
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in kept}

    @property
    def has_encoder(self) -> bool:
        """Whether it is an encoder-decoder model: `model.config.is_encoder_decoder`."""
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], encoder_token_ids: Sequence[int] | None = None) -> Tensor:
        """(tokens, vocab_size) float32 for one sequence, computed whole, so that no cache can be wrong.

        :param encoder_token_ids: what the encoder of an encoder-decoder model reads.
        """
        return _logits(self.model, token_ids, encoder_token_ids)

    def greedy(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """Greedy continuation; every step computes the whole sequence again."""
        ids = list(token_ids)
        for _ in range(num_tokens):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(token_ids) :]

    @torch.inference_mode()
    def rounded_logits(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """`logits` of each prompt, computed in bfloat16; tables such as rotary frequencies stay in float32."""
        model = copy.deepcopy(self.model)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        return [_logits(model, prompt.token_ids, prompt.encoder_token_ids) for prompt in prompts]

    def complaint(self, vocab_size: int) -> str:
        """Why this instance would prove little; `""` when it is fine."""
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(1, vocab_size, (64,), generator=generator).tolist()
        short, read = ids[:12], ids[30:42] if self.has_encoder else None
        told = self.logits(ids, read)
        if not torch.isfinite(told).all():
            return "its logits are not finite"
        distinct = len(set(told.argmax(-1).tolist()))
        if distinct < min(DISTINCT, vocab_size // 2):
            return f"64 prefixes have only {distinct} different likeliest tokens"
        base = self.logits(short, read)[-1]
        changes: dict[str, tuple[list[int], list[int] | None]] = {
            "the first of 12 tokens": ([_other(short[0], ids), *short[1:]], read),
            "the order of two tokens": ([*short[:4], short[5], short[4], *short[6:]], read),
        }
        if read is not None:
            changes["the encoder's first of 12 tokens"] = (short, [_other(read[0], ids), *read[1:]])
        for what, changed in changes.items():
            moved = float((self.logits(*changed)[-1] - base).abs().max() / base[base != LOWEST].abs().max())
            if moved < SENSITIVITY:
                return f"{what} moves its logits by {moved:.1e} of the largest, less than {SENSITIVITY:.0e}"
        return ""


def sensible_reference(
    architecture: Architecture, vocab_size: int, overrides: Mapping[str, Any] | None = None
) -> ModuleReference:
    """The first of a few random instances whose logits depend on the input as a language model's do.

    :raises Failure: none does; other sizes in `tiny` are needed.
    """
    complaints = []
    for seed, factor in ATTEMPTS:
        reference = ModuleReference(architecture, seed, overrides, factor)
        complaint = reference.complaint(vocab_size)
        if not complaint:
            return reference
        complaints.append(f"seed {seed}, spread x {factor}: {complaint}")
    raise Failure(
        f"no random instance of {reference.name} is worth comparing with: {'; '.join(complaints)}; choose other sizes "
        "in `tiny`, or let a reference function make the module, with weights that do more"
    )


def fill(model: nn.Module, seed: int, factor: float = 1.0) -> None:
    """Random values in every parameter, and in every stored buffer of zeros.

    Matrices spread by the square root of what they sum over, so that sizes do not matter; norms and other vectors lie
    around one half, biases around zero: larger ones would drown what they are added to.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            spread = min(max(1.2 * factor * parameter.shape[-1] ** -0.5, 0.02), 0.6)
            parameter.data.normal_(0.0, spread, generator=generator)
        elif name.endswith("bias"):
            parameter.data.normal_(0.0, 0.1, generator=generator)
        else:
            parameter.data.normal_(0.5, 0.3, generator=generator)
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point() and not buffer.any():
            buffer.normal_(0.0, 0.1, generator=generator)


class GoldenReference:
    """Recorded outputs of the authors' own code: a folder that is a checkpoint with a `golden.json`.

    `golden.json` lists `cases` with `input_ids` and `greedy_ids`; `golden.safetensors` holds `logits_<i>`, the logits
    (rows, vocab_size) of the last rows of case i's prompt. Cases with media are left to the checks of media; they name
    their raw `files` (`image_0.png`, `audio_1.wav`), and `mm_embeds_<i>` are the rows that these become.

    :raises ValueError: the folder is no golden folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            cases = json.loads((folder / "golden.json").read_text("utf-8"))["cases"]
        except FileNotFoundError:
            raise ValueError(
                f"{folder} holds no golden.json; give a golden folder, docs/conformance.md says how"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / 'golden.json'} cannot be read ({error!r}); copy it again") from None
        self.media_cases = {i: case for i, case in enumerate(cases) if case.get("mm_inputs")}
        self.indices = [i for i, case in enumerate(cases) if not case.get("mm_inputs")]
        self.prompts = [Prompt(tuple(cases[i]["input_ids"])) for i in self.indices]
        self.greedy = [cases[i].get("greedy_ids") for i in self.indices]

    @property
    def name(self) -> str:
        return f"golden:{self.folder.name}"

    def under(self, name: str, target: Path, plugins: Plugins) -> Path:
        """The folder when its configuration names this architecture, else `target`, made a copy that does.

        A model that is published under several names was recorded under one.
        """
        if name in self.architectures(plugins):
            return self.folder
        config = json.loads((self.folder / "config.json").read_text("utf-8"))
        target.mkdir(parents=True)
        for file in self.folder.iterdir():
            if file.is_file():
                shutil.copyfile(file, target / file.name)
        (target / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
        return target

    def logits(self) -> list[Tensor]:
        """The recorded prompt logits of each case: (rows, vocab_size) float32 of the prompt's last rows."""
        tensors = self.tensors()
        return [tensors[f"logits_{i}"].float() for i in self.indices]

    def tensors(self) -> dict[str, Tensor]:
        """All that is recorded, by name."""
        from safetensors.torch import load_file

        return load_file(self.folder / "golden.safetensors")

    def architectures(self, plugins: Plugins) -> list[str]:
        """The names that its configuration gives, in whatever form it is stored."""
        return list(read_config(resolve(str(self.folder), None, plugins), plugins)["architectures"])

    def require_text(self) -> None:
        """:raises Skip: nothing recorded here is a text that is continued."""
        if not self.prompts:
            raise Skip(f"{NOT_APPLICABLE}{self.name} holds no case of text alone")
        if None in self.greedy:
            raise Skip(f"{NOT_BUILT}pooling; {self.name} records scores, not tokens")


def _module(architecture: Architecture, entries: dict[str, Any]) -> nn.Module:
    reference = architecture.reference
    if callable(reference):
        return reference(entries)
    module, _, name = (reference or "").partition(":")
    if not (module and name):
        raise ValueError(
            f"{architecture.name} has reference={reference!r}; write 'transformers:Class', 'module:function' or a "
            "function, which makes a torch module from config.json entries"
        )
    try:
        found = getattr(import_module(module), name)
    except AttributeError:
        raise ValueError(
            f"{architecture.name} has reference={reference!r}, and {module} {_version(module)}has no {name!r}"
        ) from None
    if module != "transformers":
        return found(entries)
    config = found.config_class(**entries)
    config._attn_implementation = "eager"  # the only one that knows every variant
    return found(config)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws one for every file that it writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _version(module: str) -> str:
    version = getattr(import_module(module), "__version__", "")
    return f"{version} " if version else ""


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """`state_dict`, the first name only of tensors that share their memory."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    kept = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in seen:
            kept[name] = tensor.contiguous()
        seen.add(key)
    return kept


def _other(token: int, tokens: Sequence[int]) -> int:
    return next(found for found in tokens if found != token)


def _logits(model: nn.Module, token_ids: Sequence[int], encoder_token_ids: Sequence[int] | None = None) -> Tensor:
    # transformers would make a cache, which some classes cannot
    options = {"use_cache": False} if hasattr(model, "save_pretrained") else {}
    ids = torch.tensor([list(token_ids)])
    if encoder_token_ids is None:
        out = model(ids, **options)
    else:
        out = model(torch.tensor([list(encoder_token_ids)]), decoder_input_ids=ids, **options)
    logits = out if isinstance(out, Tensor) else out.logits
    return in_float32(logits[0])


def in_float32(logits: Tensor) -> Tensor:
    """The same logits; the lowest number of their type, which marks what is never chosen, stays the lowest."""
    return logits.float().masked_fill(logits == torch.finfo(logits.dtype).min, LOWEST)
