"""Qwen2-VL and Qwen2.5-VL: preprocessing and positions as the reference's, films, published files, a caller's rows."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from modelport import LLM, SamplingParams
from modelport.inputs.processor import ProcessorFiles
from modelport.inputs.video import Video
from modelport.plugin import load_plugins
from modelport.plugins.multimodal.qwen_vl import smart_size
from modelport.testing.reference import ModuleReference

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
OLD, NEW = "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"
IMAGE, FILM = 318, 319


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def film(frames: int, fps: float | None = None, total: int = 0) -> Video:
    pixels = np.random.default_rng(frames).integers(0, 256, (frames, 24, 32, 3), dtype=np.uint8)
    return Video(pixels, fps, tuple(range(frames)), total or frames)


@pytest.fixture(scope="module", params=[OLD, NEW])
def made(request, tmp_path_factory):
    architecture = load_plugins().find([request.param])
    reference = ModuleReference(architecture)
    folder = reference.save(tmp_path_factory.mktemp("qwen") / request.param)
    for name, content in architecture.files.items():
        (folder / name).write_text(json.dumps(content))
    return reference, folder


@pytest.fixture(scope="module")
def llm(made) -> LLM:
    return LLM(str(made[1]), skip_tokenizer_init=True, max_model_len=256, dtype="float32")


def inputs(made, overrides: dict | None = None):
    """The input processor alone."""
    reference, folder = made
    architecture = reference.architecture
    config = architecture.config.model_validate(json.loads((folder / "config.json").read_text()))
    return architecture.inputs(config, None, ProcessorFiles(folder, overrides), None)


@pytest.mark.parametrize("size", [(40, 52), (91, 33), (8, 8), (300, 200), (7, 90), (1, 1)])
def test_preprocessing_is_the_references(made, size):
    image = picture(1, *size)
    item = inputs(made).image(image)
    wanted = Qwen2VLImageProcessorPil(min_pixels=256, max_pixels=1600, patch_size=4)([image], return_tensors="pt")
    assert (item.tensors["pixel_values"] - wanted["pixel_values"]).abs().max() <= 1e-5
    assert item.tensors["image_grid_thw"].tolist() == wanted["image_grid_thw"][0].tolist()


@pytest.mark.parametrize("sizes", [{}, {"size": {"shortest_edge": 3136, "longest_edge": 50000}}])
def test_both_spellings_of_the_bounds(made, sizes):
    item = inputs(made, {"min_pixels": None, "max_pixels": None, **sizes}).image(picture(2, 300, 260))
    wanted = Qwen2VLImageProcessorPil(patch_size=4, **sizes)([picture(2, 300, 260)], return_tensors="pt")
    assert item.tensors["image_grid_thw"].tolist() == wanted["image_grid_thw"][0].tolist()


def test_a_film_is_cut_as_its_pictures_are(made):
    """Two frames make patches; the last one of an odd number stands twice."""
    processor, several = inputs(made), film(3)
    pixels = processor.video(several).tensors["pixel_values_videos"]
    grid = processor.video(several).tensors["video_grid_thw"].tolist()
    assert grid[0] == 2
    single = [processor.image(Image.fromarray(frame)).tensors["pixel_values"] for frame in several.frames]
    by_frame = [patches.unflatten(1, (3, 2, 16))[:, :, 0] for patches in single]
    found = pixels.unflatten(0, (2, -1)).unflatten(2, (3, 2, 16))  # time, patches, channels, frames, pixels
    for time, pair in enumerate(((0, 1), (2, 2))):
        for place, frame in enumerate(pair):
            assert torch.equal(found[time, :, :, place], by_frame[frame])


@pytest.mark.parametrize(
    ("total", "fps", "count"), [(100, 25.0, 8), (30, 30.0, 4), (3, 30.0, 2), (9000, 1.0, 768), (5, None, 5)]
)
def test_frames_are_picked_by_time(made, total, fps, count):
    picked = list(inputs(made).pick_frames(total, fps))
    assert len(picked) == count
    assert picked == sorted(set(picked))
    assert picked[-1] < total
    if fps:
        assert picked == torch.arange(0, total, total / count).int().tolist()


def test_positions_are_the_references(made):
    reference, _ = made
    processor = inputs(made)
    pictures = [processor.image(picture(3, 40, 52)), processor.image(picture(4, 91, 33))]
    films = [processor.video(film(3)), processor.video(film(4, 4.0))]
    ids = [5, IMAGE, 6, 7, FILM, 8, IMAGE, 9, FILM]
    expanded = processor.expand(ids, {"image": pictures, "video": films})
    token_ids = torch.tensor([expanded.token_ids])
    kinds = (token_ids == IMAGE) + 2 * (token_ids == FILM)
    grids = {
        "image_grid_thw": torch.stack([item.tensors["image_grid_thw"] for item in pictures]),
        "video_grid_thw": torch.stack([item.tensors["video_grid_thw"] for item in films]),
    }
    if reference.architecture.name == NEW:
        grids["second_per_grid_ts"] = [float(item.tensors["second_per_grid_ts"]) for item in films]
        assert grids["second_per_grid_ts"] == pytest.approx([2 / 24, 0.5])
    wanted, _ = reference.model.model.get_rope_index(token_ids, kinds, **grids)
    assert np.array_equal(expanded.axes, wanted[:, 0].numpy())


def test_what_follows_a_long_film_begins_behind_its_last_pair(made):
    processor = inputs(made)
    item = processor.video(film(24, 2.0))
    timed = made[0].architecture.name == NEW
    expanded = processor.expand([5, FILM, 6], {"video": [item]})
    last = 1 + 11 * (2 if timed else 1)  # pairs of frames a second apart, two steps of a second
    assert expanded.axes[0, -2] == last
    assert (expanded.axes[:, -1] == last + 1).all()


def test_embeddings_are_the_image_and_the_film(llm):
    media = {"image": picture(1, 40, 50), "video": film(3).frames}
    items = llm._front.media.read(media)
    given = {}
    for name, (item,) in items.items():
        with torch.inference_mode():
            rows = llm._front.engine.model.embed_media(name, [item.tensors])[0].clone()
        grid = f"{name}_grid_thw"
        given[name] = {f"{name}_embeds": rows, grid: item.tensors[grid]}
        if "second_per_grid_ts" in item.tensors:
            given[name]["second_per_grid_ts"] = float(item.tensors["second_per_grid_ts"])
    prompts = [{"prompt_token_ids": [5, IMAGE, 7, FILM, 8], "multi_modal_data": data} for data in (media, given)]
    first, second = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert list(first.outputs[0].token_ids) == list(second.outputs[0].token_ids)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"image": torch.ones(4, 64)}, r"image_grid_thw is \[\] beside 4 rows"),
        ({"image": {"image_embeds": torch.ones(4, 64), "image_grid_thw": [1, 4, 6]}}, r"\[1, 4, 6\] beside 4 rows"),
        ({"image": picture(0, 1, 201)}, "1 x 201 pixels"),
        ({"image": b"no picture"}, "image 0"),
        ({"image": [picture(0, 8, 8)] * 1000}, "1000 items"),
    ],
)
def test_wrong_media_fail_alone(llm, data, said):
    with pytest.raises(ValueError, match=said):
        llm.generate({"prompt_token_ids": [5, IMAGE], "multi_modal_data": data}, GREEDY, use_tqdm=False)
    assert len(llm.generate([5, 6], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 8


def test_published_files_have_one_level(made, llm, tmp_path):
    """As Qwen/Qwen2-VL-7B-Instruct writes them: the language model's entries among the others."""
    _, folder = made
    for source in folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    inner = config.pop("text_config")
    rope = inner.pop("rope_parameters")
    flat = {**inner, **config, "rope_theta": rope["rope_theta"], "model_type": "qwen2_vl"}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    other = LLM(str(tmp_path), skip_tokenizer_init=True, max_model_len=256, dtype="float32")
    prompt = {"prompt_token_ids": [5, IMAGE, 7], "multi_modal_data": {"image": picture(1, 40, 50)}}
    given = [m.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids for m in (llm, other)]
    assert list(given[0]) == list(given[1])


def test_sizes_are_the_references():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    source = np.random.default_rng(0)
    for height, width in source.integers(1, 3000, (300, 2)).tolist():
        if max(height, width) > 200 * min(height, width):
            continue
        assert smart_size(height, width, 28, 3136, 1003520) == smart_resize(height, width, 28, 3136, 1003520)
