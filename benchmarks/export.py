"""Writes one model in the forms that each engine reads: bf16 safetensors, and GGUF in BF16, Q8_0 and as it came.

Decisions: everything comes from the same GGUF file, so that all engines run the same numbers as far as their format
holds them; a form that is there already is not written again.
"""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from modelport.inputs.tokenizer import load_tokenizer
from modelport.loading.checkpoint import open_weights, read_config, resolve
from modelport.plugin import load_plugins


def export(model: str, folder: Path) -> dict[str, Path]:
    """Forms of `model`, by name: "bf16" is a folder, "original", "bf16.gguf" and "q8_0.gguf" are files.

    :param model: what `modelport` takes; the GGUF forms are there only when it is a GGUF file.
    """
    plugins = load_plugins()
    checkpoint = resolve(model, None, plugins)
    folder.mkdir(parents=True, exist_ok=True)
    forms = {"bf16": folder / "bf16"}
    if not (forms["bf16"] / "model.safetensors").exists():
        _write_safetensors(checkpoint, plugins, forms["bf16"])
    if checkpoint.path.is_file() and checkpoint.path.suffix == ".gguf":
        forms["original"] = checkpoint.path
        for kind in ("BF16", "Q8_0"):
            target = folder / f"{kind.lower()}.gguf"
            if not target.exists():
                _write_gguf(checkpoint.path, target, gguf.GGMLQuantizationType[kind])
            forms[target.name] = target
    return forms


def _write_safetensors(checkpoint, plugins, folder: Path) -> None:
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    config = read_config(checkpoint, plugins)
    tensors = {name: t.to(torch.bfloat16).clone() for name, t in open_weights(checkpoint, config, plugins)}
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    (part / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=1))
    tokenizer = load_tokenizer(checkpoint, config, plugins)
    tokenizer._backend.save(str(part / "tokenizer.json"))
    settings = {**tokenizer.special_tokens, "tokenizer_class": "PreTrainedTokenizerFast"}
    if tokenizer.chat_template:
        settings["chat_template"] = tokenizer.chat_template
    (part / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    part.rename(folder)


def _write_gguf(source: Path, target: Path, kind: gguf.GGMLQuantizationType) -> None:
    """Matrices become `kind`; the rest stays as it is."""
    reader = gguf.GGUFReader(source)
    part = target.with_suffix(".part")
    architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE).contents()
    writer = gguf.GGUFWriter(part, architecture)
    written_anyway = (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE)
    for field in reader.fields.values():
        if field.name not in written_anyway and not field.name.startswith("GGUF."):
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    for tensor in reader.tensors:
        data, form = tensor.data, tensor.tensor_type
        if len(tensor.shape) > 1:
            form = kind
            data = gguf.quants.quantize(gguf.quants.dequantize(data, tensor.tensor_type).astype(np.float32), kind)
        writer.add_tensor(tensor.name, data, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(target)
