"""A tiny Llama as files, adapters of it, and the same adapters merged into it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelport.plugin import load_plugins
from modelport.testing.adapters import Factors, write_adapter
from modelport.testing.reference import ModuleReference

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Base:
    """The base model's files, and what is made from them."""

    def __init__(self, folder: Path):
        self.folder, self._made = folder / "base", folder
        ModuleReference(load_plugins().find(["LlamaForCausalLM"])).save(self.folder)
        self.tensors = load_file(self.folder / "model.safetensors")

    def factors(self, seed: int, rank: int = 4, only: tuple[str, ...] = LAYERS, strength: float = 1.0) -> dict:
        generator = torch.Generator().manual_seed(seed)
        found = {}
        for name, weight in self.tensors.items():
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] in only and weight.dim() == 2:
                a = torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
                b = torch.randn(weight.shape[0], rank, generator=generator) * strength
                found[module] = Factors(a, b, 0.5)
        return found

    def adapter(self, name: str, seed: int, **options) -> str:
        return str(write_adapter(self._made / name, self.factors(seed, **options)))

    def merged(self, name: str, seed: int, **options) -> str:
        folder, tensors = self._made / name, dict(self.tensors)
        for module, made in self.factors(seed, **options).items():
            weight = f"{module}.weight"
            tensors[weight] = (tensors[weight].double() + made.delta()).float()
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text((self.folder / "config.json").read_text())
        return str(folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Base:
    return Base(tmp_path_factory.mktemp("lora"))


@pytest.fixture
def broken(base: Base, tmp_path: Path) -> Callable[..., Path]:
    """A folder whose configuration and tensors a test changes."""
    import json

    def make(change: Callable[[dict, dict], None]) -> Path:
        folder = write_adapter(tmp_path / "adapter", base.factors(3))
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        change(config, tensors)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return make
