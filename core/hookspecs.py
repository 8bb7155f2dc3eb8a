"""The plugin contract: every hook that modelport calls, with its arguments and its return; no logic.

Hooks run while an engine is being built, never inside a step. An implementation may take a subset of the arguments.
*First result* hooks stop at the first plugin that does not return None; third parties are asked before built-ins.
*Collected* hooks call every plugin and keep all results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from modelport.inputs.tokenizer import Tokenizer
    from modelport.kernels.linear import PackedWeight
    from modelport.plugin import Architecture, Checkpoint, ModelInfo

hookspec = pluggy.HookspecMarker("modelport")


@hookspec
def register_architectures() -> Iterable[Architecture]:
    """Name the architectures that this plugin can build.

    Called once, when the plugin is loaded; an exception makes the plugin broken.

    :return: the `Architecture` records; an empty iterable is fine.

    Collected. Runs in: front end and every worker.
    """
    return ()


@hookspec(firstresult=True)
def resolve_checkpoint(model: str, revision: str | None) -> Path | None:
    """Find the files of a model that is not a local path: a hub, a store, an installed package.

    :param model: what the user gave as `model`.
    :param revision: branch, tag or commit, or None for the source's default.
    :return: a local folder or file, or None when this source does not know the name.
    :raises FileNotFoundError: the name belongs to this source, but its files cannot be had (say why, and the cure).

    First result. Runs in: front end.
    """
    return None


@hookspec(firstresult=True)
def read_config(checkpoint: Checkpoint) -> dict | None:
    """Return a `config.json`-shaped dictionary for a checkpoint whose configuration is stored in another form.

    :param checkpoint: where the files lie and what the user asked for.
    :return: a dictionary with Hugging Face keys (`architectures`, `hidden_size`, ...), or None for "not mine";
        when no plugin answers, `config.json` is read.

    First result. Runs in: front end and every worker.
    """
    return None


@hookspec(firstresult=True)
def load_tokenizer(checkpoint: Checkpoint, config: dict) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint that keeps it in another form than `tokenizer.json`.

    :param checkpoint: where the files lie.
    :param config: the configuration, as `read_config` gave it.
    :return: a `Tokenizer` (its chat template included), or None for "not mine".

    First result. Runs in: front end.
    """
    return None


@hookspec(firstresult=True)
def open_weights(checkpoint: Checkpoint, config: dict) -> Iterable[tuple[str, Tensor]] | None:
    """Stream a checkpoint format as tensors under their Hugging Face names.

    :param checkpoint: where the files lie; `checkpoint.load_format` is what the user asked for (`"auto"` by default).
    :param config: the configuration, as `read_config` gave it.
    :return: an iterable of `(name, tensor)` that yields one tensor at a time (the loader copies it before it asks
        for the next), or None for "not mine"; when no plugin answers, `*.safetensors` files are read.

    First result. Runs in: every worker.
    """
    return None


@hookspec(firstresult=True)
def quantization(name: str) -> Callable[[Tensor], PackedWeight] | None:
    """Return what quantises a weight, for a method that the user named.

    :param name: the engine's `quantization` setting.
    :return: a function from a weight (out_features, in_features) to the packed form that every linear layer, expert,
        head and shared embedding then keeps instead, or None when this plugin does not know the method.

    First result. Runs in: every worker.
    """
    return None


@hookspec
def transform_model(model: nn.Module, info: ModelInfo) -> None:
    """Rewrite the empty model in place, before weights load: swap in vendor layers, quantised or adapted linears.

    A layer that takes another one's place reuses its parameters, or makes its own on the meta device; the checkpoint
    must fill whatever is there in the end. An exception stops the engine from being built.

    :param model: the model on the meta device; walk `model.named_modules()`.
    :param info: the architecture, its configuration, the engine's settings.

    Collected. Runs in: every worker.
    """


@hookspec
def register_executors() -> Mapping[str, str]:
    """Name what can run the places of a divided model, as values of the engine's setting `executor`.

    :return: each name with the `"module:Class"` of its `modelport.parallel.executor.Executor`, imported when it is
        chosen, and called with the model's description, the plugins, the settings, the limits, and whether to show
        progress. Of several plugins that offer one name the one asked first wins.

    Collected. Runs in: front end.
    """
    return {}
