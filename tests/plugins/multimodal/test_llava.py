"""LLaVA against transformers: rows, logits and greedy tokens, alone, together, cut, cached; wrong media."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modelport import LLM, SamplingParams
from modelport.plugin import load_plugins
from modelport.testing.reference import ModuleReference

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
IMAGE = 319


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=["", "class_token", "several_layers", "siglip", "qwen2"])
def reference(request) -> ModuleReference:
    architecture = load_plugins().find(["LlavaForConditionalGeneration"])
    return ModuleReference(architecture, 0, architecture.variants.get(request.param, {}))


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    folder = reference.save(tmp_path_factory.mktemp("llava") / "files")
    for name, content in reference.architecture.files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def make(folder, **settings) -> LLM:
    return LLM(str(folder), **{"skip_tokenizer_init": True, "max_model_len": 256, "dtype": "float32", **settings})


PROMPTS = [
    ([5, 6, 7, 8], []),
    ([5, IMAGE, 7, 8, 9], [(1, 40, 50)]),
    ([IMAGE, 11, 12, IMAGE, 13], [(1, 40, 50), (2, 90, 31)]),
    ([3, 4, 5, 6, 7, IMAGE, 9], [(3, 30, 30)]),
]


def prompts() -> list[dict]:
    return [
        {"prompt_token_ids": ids, "multi_modal_data": {"image": [picture(*size) for size in sizes]}}
        for ids, sizes in PROMPTS
    ]


@torch.inference_mode()
def expected(reference, output, sizes, tokens: int) -> list[int]:
    from transformers import CLIPImageProcessorPil

    settings = dict(reference.architecture.files["preprocessor_config.json"])
    extra = {}
    if sizes:
        processor = CLIPImageProcessorPil(**{k: v for k, v in settings.items() if k != "image_processor_type"})
        extra["pixel_values"] = processor([picture(*s) for s in sizes], return_tensors="pt")["pixel_values"]
    ids = list(output.prompt_token_ids)
    found = []
    for _ in range(tokens):
        logits = reference.model(input_ids=torch.tensor([ids]), use_cache=False, **extra).logits[0, -1]
        found.append(int(logits.argmax()))
        ids.append(found[-1])
    return found


def tokens(outputs) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in outputs]


def test_greedy_tokens_are_the_references(reference, folder):
    outputs = make(folder).generate(prompts(), GREEDY, use_tqdm=False)
    wanted = [expected(reference, o, sizes, 12) for o, (_, sizes) in zip(outputs, PROMPTS, strict=True)]
    assert tokens(outputs) == wanted
    blind = expected(reference, outputs[0], [], 12)
    assert blind == wanted[0]


def test_cut_cached_preempted_and_alone_are_the_same(folder):
    llm = make(folder, enable_prefix_caching=True)
    base = tokens(llm.generate(prompts(), GREEDY, use_tqdm=False))
    again = llm.generate(prompts(), GREEDY, use_tqdm=False)
    assert tokens(again) == base
    assert all(o.num_cached_tokens >= 16 for o in again[1:])
    for settings in (
        {"max_num_batched_tokens": 7, "max_num_seqs": 3},
        {"max_num_batched_tokens": 16, "max_num_seqs": 1},
        {"num_kv_blocks": 6, "max_model_len": 96},
        {"executor": "inproc", "pipeline_parallel_size": 2},
        {"executor": "inproc", "tensor_parallel_size": 2},
    ):
        assert tokens(make(folder, **settings).generate(prompts(), GREEDY, use_tqdm=False)) == base, settings
    alone = [tokens(make(folder).generate(p, GREEDY, use_tqdm=False))[0] for p in prompts()]
    assert alone == base


@pytest.mark.slow
def test_worker_processes_get_the_media(folder):
    base = tokens(make(folder).generate(prompts(), GREEDY, use_tqdm=False))
    llm = make(folder, tensor_parallel_size=2)
    assert tokens(llm.generate(prompts(), GREEDY, use_tqdm=False)) == base


def test_another_image_is_no_hit_and_embeddings_are_the_image(folder):
    llm = make(folder, enable_prefix_caching=True)
    ids = [5, IMAGE, 7, 8, 9]

    def run(image):
        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}
        return llm.generate(prompt, GREEDY, use_tqdm=False)[0]

    first, other = run(picture(1, 40, 50)), run(picture(2, 40, 50))
    assert other.num_cached_tokens == 0
    fresh = make(folder).generate(
        {"prompt_token_ids": ids, "multi_modal_data": {"image": picture(2, 40, 50)}}, GREEDY, use_tqdm=False
    )
    assert tokens([other]) == tokens(fresh)
    front = llm._front
    item = front.media.read({"image": picture(1, 40, 50)})["image"][0]
    with torch.inference_mode():
        rows = front.engine.model.embed_media("image", [item.tensors])[0]
    assert tokens([run(rows.clone())]) == tokens([first])


@pytest.mark.parametrize(
    ("ids", "data", "said"),
    [
        ([5, IMAGE], {}, "placeholders"),
        ([5], {"image": picture(0, 30, 30)}, "placeholders"),
        ([5, IMAGE], {"video": picture(0, 30, 30)}, "takes 'image'"),
        ([5, IMAGE], {"image": b"this is text, not a picture"}, "image 0"),
        ([5, IMAGE], {"image": [picture(0, 30, 30)] * 1000}, "1000 items"),
        ([5, IMAGE], {"image": torch.ones(25, 7)}, "rows"),
        ([5, IMAGE], {"image": torch.full((25, 64), torch.nan)}, "NaN"),
        ([5, 400], {}, "outside the vocabulary"),
    ],
)
def test_wrong_media_fail_alone_and_say_why(folder, ids, data, said):
    llm = make(folder)
    with pytest.raises(ValueError, match=said):
        llm.generate({"prompt_token_ids": ids, "multi_modal_data": data}, GREEDY, use_tqdm=False)
    assert len(llm.generate([5, 6], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 12
