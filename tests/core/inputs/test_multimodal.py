"""Conversations with media: every way of writing a part, the order of items, who may name files, what is refused."""

import asyncio
import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modelport import LLM, AsyncLLM, SamplingParams
from modelport.inputs.multimodal import place_media
from modelport.plugin import load_plugins
from modelport.testing.reference import ModuleReference

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=0)
WORDS = {"user": 1, "assistant": 2, "w5": 5, "w6": 6, ":": 7}
PARTS = (
    "{% for m in messages %}{{ m['role'] + ' : ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}"
    "{{ '<' + part['type'] + '>' }}{% endif %}{% endfor %}{% endif %}{{ ' ' }}{% endfor %}"
)
FLAT = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}{% endfor %}"


@pytest.fixture(scope="module")
def reference() -> ModuleReference:
    return ModuleReference(load_plugins().find(["LlavaNextVideoForConditionalGeneration"]))


@pytest.fixture(scope="module", params=[PARTS, FLAT], ids=["parts", "flat"])
def folder(request, reference, tmp_path_factory) -> Path:
    import tokenizers

    folder = reference.save(tmp_path_factory.mktemp("chat") / "files")
    for name, content in reference.architecture.files.items():
        (folder / name).write_text(json.dumps(content))
    places = {f"<{m}>": reference.entries[f"{m}_token_index"] for m in ("image", "video")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({**WORDS, **places}, unk_token=":"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(places))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": request.param}))
    return folder


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    return LLM(str(folder), max_model_len=256, dtype="float32", allowed_local_media_path=str(folder))


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 52, 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def url(seed: int) -> str:
    return "data:image/png;base64," + base64.b64encode(png(seed)).decode()


def said(llm: LLM, *parts: object) -> tuple[list[int], list[int]]:
    (output,) = llm.chat([{"role": "user", "content": list(parts)}], GREEDY, use_tqdm=False)
    return list(output.prompt_token_ids), list(output.outputs[0].token_ids)


def test_every_way_to_write_a_part_is_the_same(llm, folder):
    text = {"type": "text", "text": "w5"}
    (folder / "a.png").write_bytes(png(1))
    wanted = said(llm, {"type": "image", "image": picture(1)}, text)
    for part in (
        {"type": "image_url", "image_url": {"url": url(1)}},
        {"type": "image_url", "image_url": {"url": url(1), "detail": "high"}},
        {"type": "image_url", "image_url": url(1)},
        {"type": "image_url", "image_url": (folder / "a.png").as_uri()},
        {"type": "image_pil", "image_pil": picture(1)},
        {"type": "image", "image": png(1)},
        {"type": "image", "url": url(1)},
        {"type": "image", "path": str(folder / "a.png")},
    ):
        assert said(llm, part, text) == wanted, part
    assert said(llm, {"type": "image", "image": picture(2)}, text)[1] != wanted[1]


def test_items_of_several_messages_stand_in_order(llm):
    film = np.stack([np.asarray(picture(i)) for i in (7, 8, 9)])
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": "w5"}]},
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": [{"type": "video", "video": film}, {"type": "image", "image": picture(2)}]},
    ]
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False)
    prompt = "user : <image> w5 assistant : w6 user : <video> <image>"
    data = {"image": [picture(1), picture(2)], "video": film}
    (wanted,) = llm.generate({"prompt": prompt, "multi_modal_data": data}, GREEDY, use_tqdm=False)
    assert output.prompt_token_ids == wanted.prompt_token_ids
    assert output.outputs[0].cumulative_logprob == pytest.approx(wanted.outputs[0].cumulative_logprob, abs=1e-5)
    other = {**data, "image": data["image"][::-1]}
    (swapped,) = llm.generate({"prompt": prompt, "multi_modal_data": other}, GREEDY, use_tqdm=False)
    assert abs(swapped.outputs[0].cumulative_logprob - wanted.outputs[0].cumulative_logprob) > 1e-3


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url"}, "a content part of type 'image_url' has no 'image_url'"),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, "needs its data in base64"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA"}}, "has 'audio'; this model takes 'image', 'video'"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}, "image 0 .*no picture"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}, "image 0 .*outside"),
        ({"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}, "image 0 .*not public"),
    ],
)
def test_wrong_parts_say_what_is_wrong(llm, part, message):
    with pytest.raises(ValueError, match=message):
        said(llm, part, {"type": "text", "text": "w5"})


def test_strangers_name_no_files(folder):
    (folder / "a.png").write_bytes(png(1))

    async def run(part: dict) -> list[int]:
        llm = AsyncLLM(str(folder), max_model_len=256, dtype="float32")
        try:
            async for output in llm.chat([{"role": "user", "content": [part, {"type": "text", "text": "w5"}]}], GREEDY):
                last = output
            return list(last.outputs[0].token_ids)
        finally:
            llm.shutdown()

    for part in (
        {"type": "image", "image": str(folder / "a.png")},
        {"type": "image_url", "image_url": {"url": str(folder / "a.png")}},
        {"type": "image_url", "image_url": {"url": (folder / "a.png").as_uri()}},
    ):
        with pytest.raises(ValueError, match=r"not open here|file:// URLs are off"):
            asyncio.run(run(part))
    assert len(asyncio.run(run({"type": "image_url", "image_url": {"url": url(1)}}))) == 6


def test_sounds_are_taken_out_of_messages():
    parts = [
        {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "mp3"}},
        "words",
        {"type": "tool", "x": 1},
    ]
    messages, media = place_media([{"role": "user", "content": parts}, {"role": "user", "content": "plain"}])
    assert media == {"audio": ["data:audio/mp3;base64,QUJD"]}
    assert messages == [
        {"role": "user", "content": [{"type": "audio"}, "words", {"type": "tool", "x": 1}]},
        {"role": "user", "content": "plain"},
    ]


def test_limits_name_what_the_model_takes(folder):
    with pytest.raises(
        ValueError, match=r"limit_mm_per_prompt names \['audio'\]; this model takes \['image', 'video'\]"
    ):
        LLM(str(folder), max_model_len=256, dtype="float32", limit_mm_per_prompt={"audio": 1})
    llm = LLM(str(folder), max_model_len=256, dtype="float32", limit_mm_per_prompt={"image": 1})
    with pytest.raises(ValueError, match="has 2 items of 'image'; at most 1 are taken; raise limit_mm_per_prompt"):
        said(llm, {"type": "image", "image": picture(1)}, {"type": "image", "image": picture(2)})
