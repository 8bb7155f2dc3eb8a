"""Recorded prompts with media: where their items stand, and that a wrong record fails."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from modelport.inputs.processor import InputProcessor, MediaItem
from modelport.testing import check
from modelport.testing.recorded import with_placeholders
from modelport.testing.registry import Failure

GOLDEN = Path(__file__).parents[2] / "goldens" / "pixtral-native"


class Inputs(InputProcessor):
    def __init__(self):
        pass

    def placeholder_id(self, modality: str) -> int:
        return 9


def item(*token_ids: int, rows: tuple[int, ...] = (9,)) -> MediaItem:
    return MediaItem("image", token_ids, is_row=[token in rows for token in token_ids])


@pytest.mark.parametrize(
    ("recorded", "items", "wanted"),
    [
        ([1, 9, 9, 8, 2, 9, 8], [item(9, 9, 8), item(9, 8)], [1, 9, 2, 9]),
        ([1, 4, 5, 8, 2], [item(9, 9, 8)], [1, 9, 2]),  # rows under other ids, known by the 8
        ([1, -1, -1, 2], [item(9, 9)], [1, 9, 2]),  # rows outside the vocabulary
    ],
)
def test_items_are_found(recorded, items, wanted):
    assert with_placeholders(recorded, items, Inputs(), 20) == wanted


def test_items_that_are_not_there_are_named():
    with pytest.raises(Failure, match="item 1"):
        with_placeholders([1, 9, 9, 8, 2], [item(9, 9, 8), item(9, 8)], Inputs(), 20)
    with pytest.raises(Failure, match="item 0"):
        with_placeholders([1, 4, 5, 2], [item(9, 9)], Inputs(), 20)


@pytest.mark.parametrize("changed", ["mm_embeds_1", "logits_2", "greedy_ids", "input_ids"])
def test_a_changed_record_fails(tmp_path, changed):
    folder = tmp_path / "golden"
    shutil.copytree(GOLDEN, folder)
    if changed.endswith("_ids"):
        golden = json.loads((folder / "golden.json").read_text())
        golden["cases"][3][changed][-1] += 1
        (folder / "golden.json").write_text(json.dumps(golden))
    else:
        tensors = load_file(folder / "golden.safetensors")
        tensors[changed][-1, 0] += 0.01
        save_file(tensors, folder / "golden.safetensors")
    report = check(golden=folder, only="media")
    assert report["media"].status == "failed", report["media"]
