"""`modelport generate` with media, on a small model that sees: by its chat template, without one, wrong files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modelport import cli
from modelport.plugin import load_plugins
from modelport.testing.reference import ModuleReference

TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else '<video>' if part['type'] == 'video' else part['text'] }}"
    "{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of images and films with a tokenizer of whole words, and pictures beside it."""
    import tokenizers

    architecture = load_plugins().find(["LlavaNextVideoForConditionalGeneration"])
    reference = ModuleReference(architecture)
    folder = reference.save(tmp_path_factory.mktemp("cli") / "files")
    for name, content in architecture.files.items():
        (folder / name).write_text(json.dumps(content))
    words = {f"w{i}": i for i in range(318)}
    places = {"<image>": reference.entries["image_token_index"], "<video>": reference.entries["video_token_index"]}
    words = {word: i for word, i in words.items() if i not in places.values()}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({**words, **places}, unk_token="w1"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(places))
    tokenizer.save(str(folder / "tokenizer.json"))
    source = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(source.integers(0, 256, (40, 52, 3), dtype=np.uint8)).save(folder / name)
    frames = [Image.fromarray(source.integers(0, 256, (40, 52, 3), dtype=np.uint8)) for _ in range(4)]
    frames[0].save(folder / "film.gif", save_all=True, append_images=frames[1:])
    (folder / "text.png").write_text("These are words.\n")
    return folder


def generate(folder: Path, *arguments: str) -> int:
    given = [str(folder / argument) if "." in argument else argument for argument in arguments]
    settings = ["--model", str(folder), "--max-model-len", "256", "--max-tokens", "6", "-q"]
    return cli.main(["generate", *settings, *given])


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["template", "base"])
def test_media_are_seen(folder: Path, template: str | None, capsys) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
    asked = {
        "blind": ["w5 w6"],
        "a": ["--image", "a.png", "w5 w6"],
        "b": ["--image", "b.jpg", "w5 w6"],
        "both": ["--image", "a.png", "--image", "b.jpg", "w5 w6"],
        "film": ["--video", "film.gif", "w5 w6"],
        "written": ["--image", "a.png", "--no-stream", "<image>w5 w6"],
    }
    if template:  # which writes the place itself
        del asked["written"]
    told = {}
    for name, arguments in asked.items():
        assert generate(folder, *arguments) == 0, capsys.readouterr().err
        told[name] = capsys.readouterr().out
    if not template:
        assert told.pop("written") == told["a"]
    assert len(set(told.values())) == len(told), told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image", "text.png"], "error: image 0 ("),
        (["--image", "nowhere.png"], "no such file"),
        (["--image", "a.png", "--image", "text.png"], "image 1 ("),
        (["--video", "text.png"], "error: video 0 ("),
        (["--audio", "a.png"], "multi_modal_data has 'audio'; this model takes 'image', 'video'"),
    ],
)
@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["template", "base"])
def test_wrong_files_are_one_line(folder: Path, arguments: list[str], said: str, template, capsys) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
    assert generate(folder, *arguments, "w5") == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_model_of_text_says_so(tmp_path: Path, capsys) -> None:
    architecture = load_plugins().find(["LlamaForCausalLM"])
    folder = ModuleReference(architecture).save(tmp_path / "text")
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"w1": 1, "w5": 5}, unk_token="w1"))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert generate(folder, "--image", "a.png", "w5") == 2
    assert "the messages hold image, and this model takes text only" in capsys.readouterr().err
