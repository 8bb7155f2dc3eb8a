"""Large pictures in small caches, many pictures, and wrong ones beside requests that run."""

import asyncio
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from modelport import LLM, AsyncLLM, SamplingParams
from modelport.plugin import load_plugins
from modelport.testing.reference import ModuleReference

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
LARGE = {"mm_processor_kwargs": {"max_pixels": 120 * 120}}  # 15 x 15 rows
HERE = 318


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    architecture = load_plugins().find(["Qwen2VLForConditionalGeneration"])
    folder = ModuleReference(architecture).save(tmp_path_factory.mktemp("limits") / "files")
    for name, content in architecture.files.items():
        (folder / name).write_text(json.dumps(content))
    return str(folder)


def make(folder: str, **settings) -> LLM:
    return LLM(folder, **{"skip_tokenizer_init": True, "dtype": "float32", **settings})


def prompt(*pictures) -> dict:
    return {"prompt_token_ids": [5, *[HERE] * len(pictures), 7], "multi_modal_data": {"image": list(pictures)}}


def told(llm: LLM, given) -> list[int]:
    return list(llm.generate(given, GREEDY, use_tqdm=False)[0].outputs[0].token_ids)


def test_the_largest_picture_that_fits_a_small_cache_is_computed_in_chunks(folder):
    large = prompt(picture(1, 400, 400))
    base = told(make(folder, max_model_len=400, max_num_batched_tokens=400, **LARGE), large)
    small = make(folder, num_kv_blocks=16, max_num_batched_tokens=16, max_num_seqs=2, **LARGE)
    assert small.max_model_len == 256  # 225 rows and two tokens, and what is generated
    assert told(small, large) == base
    outputs = small.generate(
        [large, [5, 6, 7], large], GREEDY, use_tqdm=False
    )  # which the cache has no room for at once
    assert [list(outputs[i].outputs[0].token_ids) for i in (0, 2)] == [base, base]


def test_a_picture_that_does_not_fit_is_refused_and_says_how_large_it_is(folder):
    llm = make(folder, num_kv_blocks=8, **LARGE)
    with pytest.raises(ValueError, match=r"image 0 of 1 have 225 tokens, more than max_model_len=128"):
        llm.generate(prompt(picture(1, 400, 400)), GREEDY, use_tqdm=False)
    assert len(told(llm, [5, 6, 7])) == 12


def test_more_pictures_than_fit_are_not_all_prepared(folder):
    llm = make(folder, max_model_len=256, limit_mm_per_prompt={"image": 1000})
    pictures = [picture(i, 64, 48) for i in range(1000)]
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"of 1000 have 2\d\d tokens, more than max_model_len=256"):
        llm.generate(prompt(*pictures), GREEDY, use_tqdm=False)
    assert time.monotonic() - started < 1
    assert len(llm._front.media._kept) < 40


def test_a_float_tensor_is_a_picture_unless_it_is_as_wide_as_rows(folder):
    llm = make(folder, max_model_len=256)
    pixels = np.asarray(picture(1, 40, 52))
    base = told(llm, prompt(pixels))
    for tensor in (torch.from_numpy(pixels.copy()), torch.from_numpy(pixels / 255).float().permute(2, 0, 1)):
        assert told(llm, {**prompt(pixels), "multi_modal_data": {"image": tensor}}) == base
    rows = {"prompt_token_ids": [5, HERE], "multi_modal_data": {"image": torch.zeros(1, 3, 64)}}
    with pytest.raises(ValueError, match="image_grid_thw"):  # rows of one picture, which say nothing of their places
        llm.generate(rows, GREEDY, use_tqdm=False)


def test_wrong_pictures_beside_requests_that_run(folder):
    async def run() -> tuple[list, list[int]]:
        llm = AsyncLLM(folder, skip_tokenizer_init=True, max_model_len=256, dtype="float32")

        async def one(given) -> list[int] | Exception:
            try:
                async for output in llm.generate(given, GREEDY):
                    last = output
            except ValueError as error:
                return error
            return list(last.outputs[0].token_ids)

        wrong = [prompt(b"words"), prompt(picture(0, 900, 1)), prompt(*[picture(0, 20, 20)] * 1000)]
        try:
            alone = await one(prompt(picture(1, 40, 52)))
            found = await asyncio.gather(*map(one, [prompt(picture(1, 40, 52)), *wrong, prompt(picture(1, 40, 52))]))
        finally:
            llm.shutdown()
        return found, alone

    found, alone = asyncio.run(run())
    assert found[0] == found[-1] == alone
    for error, said in zip(found[1:-1], ("no picture", "over 200 times", "1000 items"), strict=True):
        assert isinstance(error, ValueError)
        assert said in str(error)
