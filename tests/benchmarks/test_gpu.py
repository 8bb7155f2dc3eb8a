"""What `make gpu` runs, over toy shapes on the CPU: its code is executed, its figures mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(out: Path, *parts: str, families: str = "") -> dict:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--out", str(out)]
    command += ["--families", families] if families else []
    for part in parts:
        command += ["--only", part]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    (file,) = out.glob("*.json")
    found = json.loads(file.read_text())
    assert done.returncode == 0, found["parts"]
    assert {name.split()[0] for name in found["parts"]} == set(parts)
    assert {"date", "device", "torch", "transformers", "python"} <= set(found["machine"])
    measured = {bar["bar"].split(",")[0].split(":")[0] for bar in found["bars"] if bar["found"] is not None}
    assert measured & set(parts) == set(parts) & {"llama-8b", "mixtral", "qwen2-moe", "mamba-2.8b", "start"}
    return found["parts"]


def test_a_model(tmp_path: Path) -> None:
    (part,) = run(tmp_path, "qwen2-moe").values()
    figures = {figure["name"]: figure for figure in part["figures"]}
    assert set(figures) == {"load", "decode 1", "decode 16", "prefill 48"}
    assert figures["decode 16"]["bytes"] > figures["decode 1"]["bytes"] > 0
    assert all(figure["share"] > 0 for name, figure in figures.items() if name != "load")


def test_a_part_that_fails_is_told_and_spoils_no_other(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--out", str(tmp_path), "--minutes", "0.0"]
    done = subprocess.run(
        [*command, "--only", "limits", "--only", "kit", "--families", "A,B"], capture_output=True, text=True
    )
    (file,) = tmp_path.glob("*.json")
    assert done.returncode == 1
    assert json.loads(file.read_text())["parts"] == {
        name: {"error": "no time was left"} for name in ("limits", "kit A", "kit B")
    }


def test_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu

    ours = [{"name": "decode 1", "share": 0.9}, {"name": "decode 64", "share": 0.7, "total_tok_s": 900.0}]
    start = [{"name": "start", "total_s": 40.0}, {"name": "start", "total_s": 9.0}]
    parts = {
        "llama-8b": {"figures": ours}, "start": {"figures": start},
        "transformers": {"figures": [{"name": "generate 64", "total_tok_s": 300.0}]},
        "transformers-batching": {"error": "it took too long", "figures": []},
    }  # fmt: skip
    told = {bar["bar"]: (bar["found"], bar["met"]) for bar in gpu.bars(parts)}
    assert told["llama-8b, decode 1: share"] == (0.9, True)
    assert told["llama-8b, decode 64: share"] == (0.7, False)
    assert told["llama-8b, prefill: share"] == told["llama-8b beside transformers-batching"] == (None, None)
    assert told["start: total_s"] == (9.0, True)
    assert told["llama-8b beside transformers"] == (3.0, True)


@pytest.mark.slow
def test_the_other_parts(tmp_path: Path) -> None:
    found = run(tmp_path, "limits", "kernels", "llama-8b", "mixtral", "mamba-2.8b", "start", "transformers")
    names = {figure["name"].split()[0] for figure in found["kernels"]["figures"]}
    assert {"rms_norm", "attention", "linear", "experts", "selective_scan", "draw"} <= names
    assert "attention prefill 4k by torch" in {figure["name"] for figure in found["kernels"]["figures"]}
    assert found["limits"]["figures"][0]["read_bytes_s"] > 0
    assert found["transformers"]["figures"][0]["total_tok_s"] > 0


@pytest.mark.slow
def test_the_kit(tmp_path: Path) -> None:
    (part,) = run(tmp_path, "kit", families="LlamaForCausalLM").values()
    assert part["checks"] > 5
    assert part["failed"] == []


def test_weights_of_the_shapes_are_those_of_the_published_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters counted on the meta device: the bars are shares of these bytes."""
    import torch

    from modelport.plugin import load_plugins

    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_models

    billions = {"llama-8b": 8.03, "mixtral": 29.3, "qwen2-moe": 14.3, "mamba-2.8b": 2.77}
    for name, about in gpu_models.CONFIGS.items():
        architecture = load_plugins().find(about["architectures"])
        with torch.device("meta"):
            model = architecture.model_class()(architecture.config.model_validate(about))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions[name], rel=0.01)
