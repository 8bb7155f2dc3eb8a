"""A vendor's package, built as a wheel and installed beside modelport, computes right through its entry point."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402  # after the check for torch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tests" / "vendor" / "acme-modelport"
CONFIG = {
    "architectures": ["AcmeForCausalLM"],
    "model_type": "acme",
    "vocab_size": 96,
    "dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "norm_clamp": 1.5,
    "dtype": "float32",
}
PROMPTS = [[7], [1, 2, 3, 4, 5], [(5 * i * i + 3) % 96 for i in range(70)]]
MAX_TOKENS = 12

RUN = """
import json, sys
from modelport import LLM, SamplingParams
checkpoint, prompts, max_tokens = json.loads(sys.argv[1])
llm = LLM(checkpoint, skip_tokenizer_init=True, max_num_batched_tokens=32)
params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
try:
    LLM(checkpoint, skip_tokenizer_init=True, blocked_plugins=["acme"])
except ValueError as error:
    blocked = str(error)
print(json.dumps({"tokens": [output.outputs[0].token_ids for output in outputs], "blocked": blocked}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Environment variables of a process that sees the installed package; nothing is fetched."""
    scratch = tmp_path_factory.mktemp("vendor")
    source = shutil.copytree(PACKAGE, scratch / "source")  # a build writes beside the source
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--target", str(scratch / "site")]
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *options, str(source)]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    assert not list((scratch / "site").rglob("pyproject.toml")), "installed from a wheel, not linked"
    return {**os.environ, "PYTHONPATH": str(scratch / "site")}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """A random checkpoint in Acme's own names: `w13` has the rows of gate and up in turn."""
    generator = torch.Generator().manual_seed(5)
    hidden, wide, vocab = CONFIG["dim"], CONFIG["ffn_dim"], CONFIG["vocab_size"]

    def random(*shape: int, scale: float = 0.3, mean: float = 0.0) -> torch.Tensor:
        return mean + scale * torch.randn(*shape, generator=generator)

    found = {
        "decoder.embed_tokens.weight": random(vocab, hidden, scale=1.0),
        "decoder.norm.weight": random(hidden, mean=1.0),
        "output.weight": random(vocab, hidden),
    }
    for i in range(CONFIG["num_hidden_layers"]):
        found |= {
            f"decoder.layers.{i}.attention_norm.weight": random(hidden, mean=1.0),
            f"decoder.layers.{i}.attention.wqkv.weight": random(hidden * 2, hidden),
            f"decoder.layers.{i}.attention.wo.weight": random(hidden, hidden),
            f"decoder.layers.{i}.attention_residual.gate": random(hidden, scale=1.0),
            f"decoder.layers.{i}.ffn_norm.weight": random(hidden, mean=1.0),
            f"decoder.layers.{i}.ffn.w13.weight": random(2 * wide, hidden),
            f"decoder.layers.{i}.ffn.down_proj.weight": random(hidden, wide),
            f"decoder.layers.{i}.ffn_residual.gate": random(hidden, scale=1.0),
        }
    return found


def reference_logits(tensors: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """Acme in plain torch, from its description: (tokens,) ids -> (vocab,) logits after the last of them."""
    heads, kv_heads, size = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], 8
    tokens = len(ids)
    angles = torch.outer(torch.arange(tokens).float(), 10000.0 ** (-torch.arange(0, size, 2).float() / size))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # (tokens, 1, size / 2)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        x = x * (x.square().mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]).rsqrt() * tensors[f"decoder.{name}.weight"]
        return x.clamp(-CONFIG["norm_clamp"], CONFIG["norm_clamp"])

    def rotate(x: torch.Tensor) -> torch.Tensor:  # pairs are (i, i + size / 2)
        pairs = torch.complex(*x.chunk(2, dim=-1)) * turn
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    x = tensors["decoder.embed_tokens.weight"][ids]
    for i in range(CONFIG["num_hidden_layers"]):
        layer = {k.removeprefix(f"decoder.layers.{i}."): v for k, v in tensors.items()}
        qkv = norm(x, f"layers.{i}.attention_norm") @ layer["attention.wqkv.weight"].T
        q, k, v = qkv.view(tokens, -1, size).split((heads, kv_heads, kv_heads), dim=1)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (rotate(k), v))
        scores = torch.einsum("qhd,khd->hqk", rotate(q), k) / size**0.5
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ layer["attention.wo.weight"].T
        x = x + layer["attention_residual.gate"].tanh() * attended
        gate, up = (norm(x, f"layers.{i}.ffn_norm") @ layer["ffn.w13.weight"].T).view(tokens, -1, 2).unbind(-1)
        fed = (torch.nn.functional.silu(gate) * up) @ layer["ffn.down_proj.weight"].T
        x = x + layer["ffn_residual.gate"].tanh() * fed
    return norm(x, "norm")[-1] @ tensors["output.weight"].T


def greedy(tensors: dict[str, torch.Tensor], prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(MAX_TOKENS):
        best = reference_logits(tensors, ids).topk(2)
        assert best.values[0] - best.values[1] > 1e-3, "too close to call in float32; take another seed"
        ids.append(int(best.indices[0]))
    return ids[len(prompt) :]


def test_installed_package_generates_what_plain_torch_computes(environment, tensors, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, tmp_path / "model.safetensors")
    arguments = json.dumps([str(tmp_path), PROMPTS, MAX_TOKENS])
    command = [sys.executable, "-c", RUN, arguments]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout.splitlines()[-1])
    assert answer["tokens"] == [greedy(tensors, prompt) for prompt in PROMPTS]
    assert "no plugin provides the architecture 'AcmeForCausalLM'" in answer["blocked"]
    assert "blocked plugins: acme" in answer["blocked"]


def test_installed_package_is_listed_without_being_imported(environment, tmp_path):
    code = (
        "import sys; from modelport.plugin import installed_plugins\n"
        "print([(r.name, r.status, r.distribution, r.version, r.api) for r in installed_plugins() if not r.builtin])\n"
        "assert 'acme_modelport' not in sys.modules"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "('acme', 'installed', 'acme-modelport', '0.3', 1)" in run.stdout


def test_the_package_is_the_one_of_the_first_release():
    """See tests/vendor/README.md: what it is written for has to keep working, so it is never adapted."""
    files = (PACKAGE / "acme_modelport.py", PACKAGE / "pyproject.toml")
    found = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    assert found == "2daa4fcc39b4e9adf4bf9c46799807b1b1242591b2c59b3e592731b3123a4057"


@pytest.mark.parametrize(("language", "file"), [("toml", "pyproject.toml"), ("python", "acme_modelport.py")])
def test_the_guide_shows_exactly_this_package(language, file):
    guide = (ROOT / "docs" / "plugins.md").read_text()
    tutorial = guide[guide.index("## A package from start to end") : guide.index("## Records")]
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", tutorial, re.MULTILINE | re.DOTALL)

    def lines(text: str) -> list[str]:  # the guide's blocks leave out the blank lines between them
        return [line for line in text.splitlines() if line]

    assert lines("".join(blocks)) == lines((PACKAGE / file).read_text())
