"""Llama 3.2 Vision against transformers, mended: images, who sees which, cut, cached, preempted, divided, mixed."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from modelport import LLM, SamplingParams
from modelport.inputs.processor import ProcessorFiles
from modelport.plugin import load_plugins
from modelport.plugins.multimodal.mllama import MllamaConfig, MllamaInputs
from modelport.testing.reference import ModuleReference

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
IMAGE = 320


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def reference() -> ModuleReference:
    return ModuleReference(load_plugins().find(["MllamaForConditionalGeneration"]), 0)


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    folder = reference.save(tmp_path_factory.mktemp("mllama") / "files")
    for name, content in reference.architecture.files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def make(folder, **settings) -> LLM:
    return LLM(str(folder), **{"skip_tokenizer_init": True, "max_model_len": 128, "dtype": "float32", **settings})


TEXT = [(7 * i) % 311 + 2 for i in range(60)]
PROMPTS = [
    (TEXT[:9], []),
    ([IMAGE, *TEXT[:5]], [(40, 50)]),
    ([*TEXT[:40], IMAGE, *TEXT[40:]], [(90, 31)]),  # text before the image sees none
    ([5, IMAGE, *TEXT[:20], IMAGE, *TEXT[20:45]], [(12, 12), (91, 33)]),  # the second takes the place of the first
    ([5, IMAGE, IMAGE, *TEXT[:30]], [(40, 50), (20, 90)]),  # neighbours are seen together
    ([5, IMAGE, 6, IMAGE, IMAGE, IMAGE, *TEXT[:40]], [(9, 9), (40, 50), (20, 90), (12, 12)]),
]


def prompts() -> list[dict]:
    return [
        {
            "prompt_token_ids": ids,
            "multi_modal_data": {"image": [picture(width, width, height) for width, height in sizes]},
        }
        for ids, sizes in PROMPTS
    ]


def tokens(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def logprobs(outputs) -> torch.Tensor:
    return torch.tensor([
        [entry[token].logprob for entry, token in zip(o.outputs[0].logprobs, o.outputs[0].token_ids, strict=True)]
        for o in outputs
    ])  # fmt: skip


@pytest.fixture(scope="module")
def base(folder):
    return make(folder, enable_prefix_caching=False).generate(prompts(), GREEDY, use_tqdm=False)


@torch.inference_mode()
def test_tokens_are_the_references(reference, folder, base):
    reader = make(folder)._front.media
    for output, prompt in zip(base, prompts(), strict=True):
        items = reader.read(prompt["multi_modal_data"])["image"]
        names = items[0].tensors if items else ()
        media = {name: torch.stack([item.tensors[name] for item in items]) for name in names}
        ids = list(output.prompt_token_ids)
        for token in output.outputs[0].token_ids:
            logits = reference.model(torch.tensor([ids]), **media).logits[0, -1]
            assert logits.max() - logits[token] <= 2e-4 * logits.abs().max(), (ids, token)
            ids.append(token)
    assert base[2].outputs[0].token_ids != make(folder).generate(TEXT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 7, "max_num_seqs": 3},
        {"max_num_batched_tokens": 33, "max_num_seqs": 1},
        {"num_kv_blocks": 14, "block_size": 8, "max_model_len": 96},
        {"block_size": 4},
        {"executor": "inproc", "pipeline_parallel_size": 2},
        {"executor": "inproc", "pipeline_parallel_size": 4},
        {"executor": "inproc", "tensor_parallel_size": 2},
    ],
    ids=str,
)
def test_cut_preempted_and_divided_are_the_same(folder, base, settings):
    outputs = make(folder, **settings).generate(prompts(), GREEDY, use_tqdm=False)
    assert tokens(outputs) == tokens(base)
    assert (logprobs(outputs) - logprobs(base)).abs().max() <= 1e-4


def test_preemption_happens_and_writes_keys_again(folder, base):
    llm = make(folder, num_kv_blocks=24, block_size=4, max_model_len=96, max_num_seqs=3)
    outputs = llm.generate(prompts(), GREEDY, use_tqdm=False)
    assert sum(output.metrics.num_preemptions for output in outputs)
    assert tokens(outputs) == tokens(base)


def test_steps_are_done_again_from_recordings(folder, base):
    llm = make(folder, enable_prefix_caching=False)
    recorder = llm._front.engine.runner.recorder
    for _ in range(2):  # the first time steps are taken down and tried, the second they are replayed
        outputs = llm.generate(prompts(), GREEDY, use_tqdm=False)
        assert tokens(outputs) == tokens(base)
        assert torch.equal(logprobs(outputs), logprobs(base))
    assert recorder.given_up is None
    assert recorder.num_replays >= 5


def test_alone_is_the_same(folder, base):
    llm = make(folder)
    assert tokens([llm.generate(p, GREEDY, use_tqdm=False)[0] for p in prompts()]) == tokens(base)


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 9, "max_num_seqs": 2}], ids=str)
def test_a_known_beginning_behind_an_image_reads_its_keys_again(folder, base, settings):
    llm = make(folder, block_size=4, enable_prefix_caching=True, **settings)
    assert tokens(llm.generate(prompts(), GREEDY, use_tqdm=False)) == tokens(base)
    again = llm.generate(prompts(), GREEDY, use_tqdm=False)
    assert [output.num_cached_tokens for output in again] == [(len(ids) - 1) // 4 * 4 for ids, _ in PROMPTS]
    assert tokens(again) == tokens(base)
    assert (logprobs(again) - logprobs(base)).abs().max() <= 1e-4
    blocks = [group.pool.num_free == group.pool.num_blocks for group in llm._front.engine.cache.groups]
    assert all(blocks)  # nothing is left taken


def test_another_image_is_no_hit(folder):
    llm = make(folder, block_size=4, enable_prefix_caching=True)
    ids = [5, IMAGE, *TEXT[:30]]

    def run(image):
        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}
        return llm.generate(prompt, GREEDY, use_tqdm=False)[0]

    run(picture(1, 40, 50))
    other = run(picture(2, 40, 50))
    assert other.num_cached_tokens == 0
    assert run(picture(1, 40, 50)).num_cached_tokens == 28


def test_samples_of_one_prompt_share_its_beginning(folder, base):
    llm = make(folder, block_size=4)
    likeliest = SamplingParams(temperature=1.0, top_k=1, max_tokens=8, ignore_eos=True, n=3)
    (output,) = llm.generate(prompts()[3], likeliest, use_tqdm=False)
    assert [list(one.token_ids) for one in output.outputs] == [tokens(base)[3]] * 3


@pytest.mark.parametrize(
    "size", [(40, 50), (90, 31), (12, 12), (5, 7), (13, 12), (200, 9), (3, 60), (24, 24), (25, 49)]
)
def test_pixels_are_the_processors(folder, size):
    from transformers import MllamaImageProcessorPil

    settings = json.loads((folder / "preprocessor_config.json").read_text())
    wanted = MllamaImageProcessorPil(**settings)([[picture(0, *size)]], return_tensors="pt")
    (item,) = make(folder)._front.media.read({"image": picture(0, *size)})["image"]
    assert (item.tensors["pixel_values"] - wanted["pixel_values"][0, 0]).abs().max() <= 1e-5
    assert int(item.tensors["aspect_ratio_ids"]) == int(wanted["aspect_ratio_ids"])
    assert int(item.tensors["num_tiles"]) == wanted["num_tiles"][0][0]
    assert item.num_keys == 5 * wanted["num_tiles"][0][0]


@torch.inference_mode()
def test_published_names_load(folder, base, tmp_path):
    """The kit's checkpoint has the names of transformers 5."""
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folder, tmp_path / "published")
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = name.removeprefix("model.")
        renamed["language_model.lm_head.weight" if name == "lm_head.weight" else name] = tensor
    assert {name.split(".")[0] for name in renamed} == {"language_model", "vision_model", "multi_modal_projector"}
    save_file(renamed, copy / "model.safetensors")
    assert tokens(make(copy).generate(prompts(), GREEDY, use_tqdm=False)) == tokens(base)


def test_the_published_configuration_is_read():
    ratios = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    scaling = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
               "original_max_position_embeddings": 8192, "rope_type": "llama3"}  # fmt: skip
    text = {"vocab_size": 128256, "hidden_size": 8192, "num_hidden_layers": 100, "num_attention_heads": 64,
            "intermediate_size": 28672, "rope_theta": 500000.0, "rope_scaling": scaling, "torch_dtype": "bfloat16",
            "cross_attention_layers": [3, 8], "eos_token_id": [128001, 128008, 128009]}  # fmt: skip
    vision = {"image_size": 560, "supported_aspect_ratios": ratios, "intermediate_layers_indices": [3, 7, 15, 23, 30]}
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=128256, model_type="mllama")
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (100, 8, 128)
    assert (config.rope_parameters.rope_type, config.rope_parameters.rope_theta) == ("llama3", 500000.0)
    assert config.eos_token_id == [128001, 128008, 128009]
    assert (config.vision_config.states, config.dtype) == (1601, "bfloat16")


def test_published_sizes(tmp_path):
    inputs = MllamaInputs(
        MllamaConfig(vision_config={"image_size": 560}), MllamaConfig(), ProcessorFiles(tmp_path), None
    )
    assert inputs.image(picture(0, 1200, 1100)).num_keys == 4 * 1601
    assert inputs.image(picture(0, 500, 400)).num_keys == 1601


@torch.inference_mode()
def test_rows_are_the_references_for_images_of_several_sizes_together(reference, folder):
    llm = make(folder)
    images = [picture(1, 40, 50), picture(2, 12, 12), picture(3, 90, 31)]
    items = llm._front.media.read({"image": images})["image"]
    found = llm._front.engine.model.embed_media("image", [item.tensors for item in items])
    for item, rows in zip(items, found, strict=True):
        alone = llm._front.engine.model.embed_media("image", [item.tensors])[0]
        assert (alone - rows).abs().max() <= 1e-5
        count = int(item.tensors["num_tiles"])
        inner = reference.model.model
        states = inner.vision_model(
            item.tensors["pixel_values"][None, None],
            item.tensors["aspect_ratio_ids"][None, None],
            (torch.arange(4) < count).long()[None, None],
        ).last_hidden_state
        wanted = inner.multi_modal_projector(states)[0, 0, :count].flatten(0, 1)
        assert (rows - wanted).abs().max() <= 1e-4


def test_text_with_its_beginning_written_gets_no_other(tmp_path):
    class Letters:
        def encode(self, text: str, add_special_tokens: bool) -> tuple:
            return text, add_special_tokens

    inputs = MllamaInputs(MllamaConfig(), MllamaConfig(), ProcessorFiles(tmp_path), Letters())
    assert inputs.encode("<|image|>What?", True) == ("<|image|>What?", True)
    assert inputs.encode("<|image|><|begin_of_text|>What?", True)[1] is False


def test_more_keys_than_the_cache_holds_are_refused(folder):
    llm = make(folder, num_kv_blocks=8, block_size=16, max_num_seqs=1, max_model_len=128)
    most = {"prompt_token_ids": [5, *[IMAGE, 6] * 20], "multi_modal_data": {"image": [picture(0, 40, 50)] * 20}}
    with pytest.raises(ValueError, match="have 400 keys, for which the cache has no room"):
        llm.generate(most, GREEDY, use_tqdm=False)
    scored = SamplingParams(max_tokens=2, prompt_logprobs=0)
    with pytest.raises(ValueError, match="prompt_logprobs"):
        llm.generate({"prompt_token_ids": [5, IMAGE], "multi_modal_data": {"image": picture(0, 9, 9)}}, scored)
    assert len(llm.generate([5, 6], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 8


def test_an_image_that_cannot_be_encoded_ends_its_requests_alone(folder, base):
    llm = make(folder)
    model = llm._front.engine.model
    encode = model.embed_media

    def fails(modality, items):
        if any(int(item["num_tiles"]) == 1 for item in items):
            raise RuntimeError("no")
        return encode(modality, items)

    model.embed_media = fails
    outputs = llm.generate(prompts(), GREEDY, use_tqdm=False)
    ended = [output.outputs[0].finish_reason for output in outputs]
    assert ended == ["length", "length", "length", "error", "length", "error"]
    assert tokens(outputs)[:3] == tokens(base)[:3]


@pytest.mark.slow
def test_worker_processes_get_the_images(folder, base):
    for settings in ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        assert tokens(make(folder, **settings).generate(prompts(), GREEDY, use_tqdm=False)) == tokens(base)
