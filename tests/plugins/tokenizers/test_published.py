"""Each family's published files give its tokenizer and its chats, from text to text, and no code of theirs runs."""

import pytest

from modelport import LLM, SamplingParams
from modelport.inputs.tokenizer import Tokenizer

TALK = [
    {"role": "user", "content": "the hat"},
    {"role": "assistant", "content": "a note"},
    {"role": "user", "content": "one oat"},
]


def own_code(name: str) -> dict:
    """As the authors' `tokenizer_config.json` names their code, which is never run."""
    return {"tokenizer_class": name, "auto_map": {"AutoTokenizer": [f"tokenization.{name}", None]}}


def added(tokens: dict[int, str]) -> dict:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    return {"added_tokens_decoder": {str(i): {"content": token, **flags} for i, token in tokens.items()}}


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def chat(tokenizer: Tokenizer, messages=TALK) -> list[int]:
    return ids(tokenizer, tokenizer.apply_chat_template(messages))


def one(tokenizer: Tokenizer, token: str) -> int:
    found = ids(tokenizer, token)
    assert len(found) == 1, f"{token!r} is cut into {found}"
    return found[0]


# --- sentencepiece models


def test_baichuan(folder, read, model):
    roles = {"user_token_id": 3, "assistant_token_id": 4}  # the reserved pieces, which the model's file names
    path = folder(spm=model, tokenizer_config={**own_code("BaichuanTokenizer"), "add_bos_token": False})
    base = read(path)
    assert base.chat_template is None
    tokenizer = read(folder(generation_config=roles))
    text = [ids(tokenizer, message["content"]) for message in TALK]
    assert chat(tokenizer) == [3, *text[0], 4, *text[1], 3, *text[2], 4]
    system = [{"role": "system", "content": "a tone"}, TALK[0]]
    assert chat(tokenizer, system) == [*ids(tokenizer, "a tone"), 3, *text[0], 4]
    assert tokenizer.encode("the hat") == text[0]
    assert tokenizer.decode(chat(tokenizer)) == "the hat a note one oat"
    assert tokenizer.decode([3, *text[0]], skip_special_tokens=False) == "<reserved_106>the hat"


def test_a_text_begins_and_ends_with_what_the_settings_say(folder, read, model):
    path = folder(spm=model, tokenizer_config=own_code("OrionTokenizer"))
    alone = ids(read(path), "the hat")
    assert read(path).encode("the hat") == [1, *alone]  # where nothing is said, as the authors' classes
    for bos in (True, False):
        for eos in (True, False):
            flags = {"add_bos_token": bos, "add_eos_token": eos}
            folder(tokenizer_config={**own_code("OrionTokenizer"), **flags})
            assert read(path).encode("the hat") == [1] * bos + alone + [2] * eos


def test_internlm(folder, read, model):
    tokenizer = read(folder(spm=model), {"architectures": ["InternLMForCausalLM"]})
    eoh, eoa = tokenizer._token_id("<eoh>"), tokenizer._token_id("<eoa>")
    expected = "<s><|User|>:the hat<eoh>\n<|Bot|>:a note<eoa>\n<|User|>:one oat<eoh>\n<|Bot|>:"
    assert tokenizer.apply_chat_template(TALK) == expected
    assert chat(tokenizer)[0] == 1
    assert [i for i in chat(tokenizer) if i in (eoh, eoa)] == [eoh, eoa, eoh]
    assert tokenizer.turn_end_ids == (eoa,)


def test_internlm2(folder, read, spm):
    model = spm(user_defined_symbols=["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"])
    settings = own_code("InternLM2Tokenizer") | added({3: "<|im_end|>", 4: "<|im_start|>", 315: "<|plugin|>"})
    tokenizer = read(folder(spm=model, tokenizer_config=settings))
    assert tokenizer.apply_chat_template(TALK[:1]) == "<s><|im_start|>user\nthe hat<|im_end|>\n<|im_start|>assistant\n"
    begin, role, end = [1, 4], ids(tokenizer, "user\nthe hat"), ids(tokenizer, "\n")
    assert chat(tokenizer, TALK[:1]) == [*begin, *role, 3, *end, 4, *ids(tokenizer, "assistant\n")]
    assert tokenizer.turn_end_ids == (3,)
    assert (tokenizer.vocab_size, one(tokenizer, "<|plugin|>")) == (316, 315)
    early = read(folder(tokenizer_config=own_code("InternLM2Tokenizer")))
    assert early.chat_template is None  # it has no tokens to write one with


def test_orion(folder, read, model):
    tokenizer = read(folder(spm=model, tokenizer_config=own_code("OrionTokenizer")))
    expected = "<s>Human: the hat\n\nAssistant: </s>a note</s>Human: one oat\n\nAssistant: </s>"
    assert tokenizer.apply_chat_template(TALK) == expected
    assert [i for i in chat(tokenizer) if i in (1, 2)] == [1, 2, 2, 2]


def test_minicpm(folder, read, spm):
    model = spm(user_defined_symbols=["<用户>", "<AI>"])
    tokenizer = read(folder(spm=model), {"architectures": ["MiniCPMForCausalLM"]})
    assert tokenizer.apply_chat_template(TALK) == "<s><用户>the hat<AI>a note<用户>one oat<AI>"
    assert [i for i in chat(tokenizer) if i in (3, 4)] == [3, 4, 3, 4]


def test_arctic(folder, read, spm):
    settings = (
        own_code("ArcticTokenizer") | {"eos_token": "<|im_end|>"} | added({315: "<|im_start|>", 316: "<|im_end|>"})
    )
    tokenizer = read(folder(spm=spm(), tokenizer_config=settings))
    assert tokenizer.apply_chat_template(TALK[:1]) == "<|im_start|>user\nthe hat<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token_id == 316


@pytest.mark.parametrize("named_in", ["config", "settings"])
def test_chatglm2(folder, read, spm, named_in):
    named = {"config": {"_name_or_path": "THUDM/chatglm2-6b"}, "settings": {}}[named_in]
    settings = own_code("ChatGLMTokenizer") | ({} if named else {"name_or_path": "THUDM/chatglm2-6b"})
    path = folder(spm=spm(), tokenizer_config=settings)
    tokenizer = read(path, {"architectures": ["ChatGLMModel"], **named})
    begin = [316, 318]
    assert tokenizer.encode("the hat") == begin + ids(tokenizer, "the hat")
    rounds = "[Round 1]\n\n问\uff1athe hat\n\n答\uff1aa note\n\n[Round 2]\n\n问\uff1aone oat\n\n答\uff1a"
    assert tokenizer.apply_chat_template(TALK) == "[gMASK]sop" + rounds
    assert chat(tokenizer) == begin + ids(tokenizer, rounds)
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (320, 2)
    assert tokenizer.decode(tokenizer.encode("the hat")) == "the hat"


def test_chatglm3(folder, read, spm):
    tokenizer = read(folder(spm=spm(), tokenizer_config=own_code("ChatGLMTokenizer")))
    begin, user, assistant = [316, 318], 321, 322
    said = [ids(tokenizer, "\n") + ids(tokenizer, message["content"]) for message in TALK]
    expected = [*begin, user, *said[0], assistant, *said[1], user, *said[2], assistant]
    assert chat(tokenizer) == expected
    assert tokenizer.turn_end_ids == (user, one(tokenizer, "<|observation|>"))
    assert not {317, 318, 319} & set(ids(tokenizer, "philosophy of sop and eop"))
    told = [{"role": "tool", "content": "a"}]
    assert tokenizer.apply_chat_template(told, add_generation_prompt=False) == "[gMASK]sop<|observation|>\n a"


# --- ranks


def test_glm4(folder, read, rank_file):
    path = folder(spm=rank_file, tokenizer_config=own_code("ChatGLM4Tokenizer"))
    tokenizer = read(path, {"architectures": ["ChatGLMModel"]})
    begin, user, assistant = [292, 294], 297, 298
    assert tokenizer.encode("the hat") == begin + ids(tokenizer, "the hat")
    expected = "[gMASK]<sop><|user|>\nthe hat<|assistant|>\na note<|user|>\none oat<|assistant|>"
    assert tokenizer.apply_chat_template(TALK) == expected
    said = [ids(tokenizer, "\n" + message["content"]) for message in TALK]
    assert chat(tokenizer) == [*begin, user, *said[0], assistant, *said[1], user, *said[2], assistant]
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (304, 290)
    assert tokenizer.turn_end_ids == (user, one(tokenizer, "<|observation|>"))


def test_qwen(folder, read, rank_file):
    tokenizer = read(folder(qwen=rank_file, tokenizer_config=own_code("QWenTokenizer")))
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    expected = "<|im_start|>user\nthe hat<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(TALK[:1]) == system + expected
    mine = [{"role": "system", "content": "Be brief."}, TALK[0]]
    assert tokenizer.apply_chat_template(mine) == "<|im_start|>system\nBe brief.<|im_end|>\n" + expected
    assert (one(tokenizer, "<|endoftext|>"), tokenizer.turn_end_ids) == (290, (292,))
    assert (one(tokenizer, "<|extra_204|>"), tokenizer.vocab_size) == (497, 498)
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    assert len(ids(tokenizer, "<img>")) > 1
    folder(generation_config={"chat_format": "raw"})
    assert read(folder()).chat_template is None


def test_qwen_vl(folder, read, rank_file):
    tokenizer = read(folder(qwen=rank_file), {"architectures": ["QWenLMHeadModel"], "visual": {"width": 8}})
    tokens = ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"]
    assert ids(tokenizer, "".join(tokens)) == list(range(498, 507))


def test_phi3_small(folder, read, rank_file):
    path = folder(**{"cl100k_base.tiktoken": rank_file}, tokenizer_config=own_code("Phi3SmallTokenizer"))
    tokenizer = read(path)
    # 290 stands for 100256, the id that cl100k_base leaves out, and from which the published ones count
    published = {"<|endoftext|>": 100257, "<|system|>": 100261, "<|user|>": 100262, "<|assistant|>": 100263}
    published |= {"<|end|>": 100266, "<|dummy_id_11|>": 100275, "<|endofprompt|>": 100276, "<|dummy_id_86|>": 100351}
    assert {token: one(tokenizer, token) for token in published} == {t: i - 100256 + 290 for t, i in published.items()}
    assert tokenizer.vocab_size == 100352 - 100256 + 290
    expected = "<|endoftext|><|user|>\nthe hat<|end|>\n<|assistant|>\n"
    assert tokenizer.apply_chat_template(TALK[:1]) == expected
    assert tokenizer.encode("the hat") == ids(tokenizer, "the hat")


# --- what all of them share


@pytest.mark.parametrize("published", ["settings", "file"])
def test_a_published_template_wins(folder, read, model, published):
    mine = {"chat_template": "mine"} if published == "settings" else {}
    path = folder(spm=model, tokenizer_config=own_code("OrionTokenizer") | mine)
    if published == "file":
        (path / "chat_template.jinja").write_text("mine")
    assert read(path).apply_chat_template(TALK) == "mine"


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("XverseForCausalLM", "Human: the hat\n\nAssistant: a note</s>Human: one oat\n\nAssistant: "),
        ("DeepseekForCausalLM", "<s>User: the hat\n\nAssistant: a note</s>User: one oat\n\nAssistant:"),
        ("LlamaForCausalLM", None),
    ],
)
def test_a_tokenizer_json_gets_the_familys_template(folder, read, architecture, expected):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    path = folder(tokenizer_config=settings)
    Backend(models.BPE({"a": 0}, [])).save(str(path / "tokenizer.json"))
    config = {"architectures": [architecture]}
    if expected is None:
        assert read(path, config).chat_template is None
        return
    assert read(path, config).apply_chat_template(TALK) == expected
    folder(tokenizer_config={**settings, "chat_template": "mine"})
    assert read(path, config).chat_template == "mine"


def test_a_tokenizer_json_wins_over_other_files(folder, read, model):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    path = folder(spm=model, tokenizer_config={"tokenizer_class": "InternLM2Tokenizer"})
    Backend(models.BPE({"a": 0, "b": 1}, [])).save(str(path / "tokenizer.json"))
    assert read(path).vocab_size == 2


def test_a_role_that_the_model_does_not_know_is_refused(folder, read, model):
    tokenizer = read(folder(spm=model, tokenizer_config=own_code("OrionTokenizer")))
    with pytest.raises(ValueError, match="knows the roles user and assistant, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}])


@pytest.mark.parametrize(("name", "file"), [("QWenTokenizer", "qwen.tiktoken"), ("OrionTokenizer", "tokenizer.model")])
def test_a_missing_vocabulary_is_named(folder, read, name, file):
    with pytest.raises(ValueError, match=f"not {file}, the vocabulary itself; download it too"):
        read(folder(tokenizer_config=own_code(name)))


def test_phi3_small_without_its_ranks_says_which_file(folder, read):
    with pytest.raises(ValueError, match=r"not cl100k_base\.tiktoken"):
        read(folder(tokenizer_config=own_code("Phi3SmallTokenizer")))


def test_broken_files_are_named(folder, read, model):
    path = folder(spm=b"broken", tokenizer_config=own_code("OrionTokenizer"))
    with pytest.raises(ValueError, match=r"tokenizer\.model is no sentencepiece model"):
        read(path)
    folder(spm=model, tokenizer_config={**own_code("OrionTokenizer"), "additional_special_tokens": ["<|lost|>"]})
    with pytest.raises(ValueError, match=r"lacks the special token '<\|lost\|>'"):
        read(path)
    folder(tokenizer_config=own_code("BaichuanTokenizer"), generation_config=[])
    with pytest.raises(ValueError, match=r"generation_config\.json holds a list"):
        read(path)
    (path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        read(path)


def test_added_tokens_of_a_file_of_their_own(folder, read, model):
    settings = {**own_code("OrionTokenizer"), "additional_special_tokens": ["<|more|>"]}
    path = folder(spm=model, tokenizer_config=settings, added_tokens={"<|more|>": 317})
    tokenizer = read(path)
    assert (ids(tokenizer, "a<|more|>")[-1], tokenizer.vocab_size) == (317, 318)


FULL = {
    "baichuan2-7b": ("BaichuanTokenizer", "spm", 320),
    "internlm2-7b": ("InternLM2Tokenizer", "spm", 320),
    "orion-14b": ("OrionTokenizer", "spm", 320),
    "chatglm2-6b": ("ChatGLMTokenizer", "spm", 320),
    "chatglm3-6b": ("ChatGLMTokenizer", "spm", 352),
    "glm-4-9b": ("ChatGLM4Tokenizer", "ranks", 320),
    "qwen-7b-v1": ("QWenTokenizer", "qwen", 500),
    "phi3-small": ("Phi3SmallTokenizer", "cl100k_base.tiktoken", 390),
}


@pytest.mark.parametrize("name", FULL)
def test_from_text_to_text(checkpoint, folder, model, rank_file, name):
    tokenizer_class, file, vocab_size = FULL[name]
    path = checkpoint(name, vocab_size)
    settings = own_code(tokenizer_class)
    if name == "internlm2-7b":
        settings |= added({3: "<|im_end|>", 4: "<|im_start|>"})
    folder(**{"spm" if file == "ranks" else file: model if file == "spm" else rank_file}, tokenizer_config=settings)
    folder(generation_config={"user_token_id": 3, "assistant_token_id": 4, "do_sample": False})
    llm = LLM(str(path), max_model_len=160)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    output = llm.generate("the hat, 你好", params)[0]
    assert output.prompt_token_ids == llm.tokenizer.encode("the hat, 你好")
    assert len(output.outputs[0].token_ids) == 12
    assert output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids)
    answer = llm.chat(TALK, params)[0]
    assert answer.prompt_token_ids == chat(llm.tokenizer)
    *_, last = llm.stream_chat(TALK, params)
    assert last.outputs[0].text == answer.outputs[0].text


@pytest.mark.parametrize("token", ["<|user|>", "<|observation|>", "<|endoftext|>"])
def test_an_answer_ends_where_the_model_ends_its_turn(checkpoint, folder, rank_file, token):
    path = checkpoint("glm-4-9b", 320)
    folder(spm=rank_file, tokenizer_config=own_code("ChatGLM4Tokenizer"))
    llm = LLM(str(path), max_model_len=160)
    params = SamplingParams(temperature=0, max_tokens=5, logit_bias={one(llm.tokenizer, token): 100.0})
    completion = llm.chat(TALK, params)[0].outputs[0]
    assert (completion.finish_reason, completion.text) == ("stop", "")
