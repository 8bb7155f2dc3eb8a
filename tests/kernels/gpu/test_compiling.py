"""Every kernel compiles to machine code of an H100, with what such a GPU has, in a process without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOST_SHARED = 227 << 10  # bytes that one block can have


@pytest.mark.slow
def test_kernels_fit_an_h100(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py")], capture_output=True, text=True,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {entry["kernel"] for entry in kernels} == {
        "_norm", "_activate", "_gated", "_rope_write", "_decode", "_join", "_prefill", "_linear", "_route", "_gate_up",
        "_down", "_add", "_shrink", "_expand", "_convolve", "_scan", "_head_scan", "_gated_norm", "_weigh", "_draw",
    }  # fmt: skip
    assert [entry for entry in kernels if entry["shared"] > MOST_SHARED] == []
    assert [entry for entry in kernels if entry["spilled"] > 256] == []
    with_matrices = {"_decode", "_prefill", "_linear", "_gate_up", "_down", "_shrink", "_expand"}
    assert [e for e in kernels if e["kernel"] in with_matrices and not e["wgmma"] + e["mma"]] == []
