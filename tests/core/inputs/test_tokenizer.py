"""Tokenizers: the same ids and texts as transformers gives, streams that join to the whole, errors that help."""

import json
from pathlib import Path
from types import SimpleNamespace

import pluggy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from modelport import hookimpl, hookspecs
from modelport.inputs.tokenizer import Tokenizer, load_tokenizer
from modelport.plugin import Checkpoint

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? It's 1234 o'clock.",
    "def main():\n    return [i ** 2 for i in range(10)]  # squares\n",
    "Žluťoučký kůň, 你好 世界, привет мир, 🤗 🎉",
] * 4
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SPECIAL = [*ROLES.values(), "<|im_end|>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def llama_like() -> Backend:
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*SPECIAL, *BYTES], limit_alphabet=60, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    stored = json.loads(backend.to_str())  # bytes are tokens of the model, not special ones
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["content"] not in BYTES]
    backend = Backend.from_str(json.dumps(stored))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def unigram() -> Backend:
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=250, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


KINDS = {
    "byte_level": (byte_level, {}),
    "byte_level_that_asks_for_clean_up": (byte_level, {"clean_up_tokenization_spaces": True}),
    "llama_like": (llama_like, {}),
    "unigram": (unigram, {}),
    "unigram_cleaned_up": (unigram, {"clean_up_tokenization_spaces": True}),
    "word_piece_cleaned_up": (word_piece, {"clean_up_tokenization_spaces": True}),
}


def read(folder: Path, trust_remote_code: bool = False, *plugins: object) -> Tokenizer:
    manager = pluggy.PluginManager("modelport")
    manager.add_hookspecs(hookspecs)
    for plugin in plugins:
        manager.register(plugin)
    checkpoint = Checkpoint(folder, str(folder), trust_remote_code=trust_remote_code)
    return load_tokenizer(checkpoint, {}, SimpleNamespace(hook=manager.hook))


def auto(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """One tokenizer as files, read by us and by transformers."""
    from transformers import PreTrainedTokenizerFast

    make, flags = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    PreTrainedTokenizerFast(tokenizer_object=make(), **ROLES, **flags).save_pretrained(folder)
    return read(folder), auto(folder)


words = st.sampled_from(
    ["the quick", " fox", "doesn't", " , ", " ' ", "  1234", "\n", "</s>", "<|im_end|>", "你好", "🤗", "\r\n\t"]
)
texts = st.one_of(st.text(), st.lists(st.one_of(words, st.text(max_size=3)), max_size=12).map("".join))
quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(text=texts, special=st.booleans())
def test_ids_and_texts_equal_those_of_transformers(pair, text, special):
    ours, theirs = pair
    ids = ours.encode(text, add_special_tokens=special)
    assert ids == theirs.encode(text, add_special_tokens=special)
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@quick
@given(data=st.data())
def test_any_ids_decode_as_in_transformers(pair, data):
    ours, theirs = pair
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 3), max_size=30))
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@quick
@given(text=texts, skip=st.booleans())
def test_stream_of_a_text_joins_to_the_whole(pair, text, skip):
    ours, _ = pair
    ids = ours.encode(text)
    stream = ours.decode_stream(skip_special_tokens=skip)
    pieces = [stream.step(token_id) for token_id in ids]
    assert "".join(pieces) + stream.flush() == ours.decode(ids, skip_special_tokens=skip)


@quick
@given(data=st.data(), skip=st.booleans())
def test_stream_of_any_ids_joins_to_the_whole(pair, data, skip):
    ours, _ = pair
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 3), max_size=30))
    if any(ours._piece(i) in BYTES for i in ids):  # see DecodeStream: what invalid bytes take back has been said
        ids = [i for i in ids if ours._piece(i) not in BYTES]
    stream = ours.decode_stream(skip_special_tokens=skip)
    pieces = [stream.step(token_id) for token_id in ids]
    assert "".join(pieces) + stream.flush() == ours.decode(ids, skip_special_tokens=skip)


@quick
@given(data=st.data())
def test_stream_survives_invalid_bytes(pair, data):
    ours, _ = pair
    stream = ours.decode_stream()
    for token_id in data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=30)):
        assert isinstance(stream.step(token_id), str)
    assert isinstance(stream.flush(), str)


def test_attributes_equal_those_of_transformers(pair):
    ours, theirs = pair
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.special_ids == set(theirs.all_special_ids) | {theirs.convert_tokens_to_ids("<|im_end|>")}


def test_stream_gives_each_character_as_soon_as_it_is_complete():
    tokenizer = Tokenizer(
        Backend(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    )
    tokenizer._backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer._backend.decoder = decoders.ByteLevel()
    stream = tokenizer.decode_stream()
    assert [stream.step(i) for i in tokenizer.encode("a你b")] == ["a", "", "", "你", "b"]
    stream.step(tokenizer.encode("你")[0])
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


def test_line_break_written_as_a_byte_is_not_delayed(tmp_path):
    llama_like().save(str(tmp_path / "tokenizer.json"))
    tokenizer = read(tmp_path)
    stream = tokenizer.decode_stream()
    assert [stream.step(i) for i in tokenizer.encode("a\nb\n", add_special_tokens=False)][-1] == "\n"


def test_token_text_keeps_its_space(tmp_path):
    backend = llama_like()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read(tmp_path)
    ids = tokenizer.encode("the quick fox", add_special_tokens=False)
    assert "".join(map(tokenizer.token, ids)) == " the quick fox"
    assert tokenizer.token(backend.token_to_id("</s>")) == "</s>"


def test_a_step_costs_the_same_however_long_the_text(pair):
    ours, _ = pair
    stream = ours.decode_stream()
    longest = 0
    for token_id in ours.encode("the quick brown fox " * 200):
        stream.step(token_id)
        longest = max(longest, len(stream._ids))
    assert longest <= 8


# --- side files


def side_files(folder: Path, config: dict, special_tokens_map: dict | None = None) -> None:
    backend = byte_level()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config))
    if special_tokens_map is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens_map))


def flags(content: str, **given: bool) -> dict:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False} | given


CASES = {
    "special tokens in a file of their own": ({}, {"bos_token": "<s>", "eos_token": flags("</s>", normalized=True)}),
    "a role without a token in the vocabulary": ({"eos_token": "<end>"}, None),
    "tokens only the configuration knows": (
        {
            "eos_token": "</s>",
            "added_tokens_decoder": {
                "500": flags("<tool>", special=False),
                "501": flags("<think>", special=True, lstrip=True),
            },
        },
        None,
    ),
    "other flags than in tokenizer.json": (
        {"added_tokens_decoder": {"0": flags("<s>", special=True, rstrip=True)}, "bos_token": "<s>"},
        None,
    ),
    "extra special tokens": ({"extra_special_tokens": ["<a>", "<b>"], "eos_token": "</s>"}, None),
    "additional special tokens, the old way": ({}, {"additional_special_tokens": ["<a>", "<b>"]}),
    "model-specific tokens": ({"image_token": "<image>", "eos_token": "</s>"}, None),
    "wishes for bos and eos that tokenizer.json overrules": (
        {"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>", "eos_token": "</s>"},
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_side_files_count_as_in_transformers(case, tmp_path):
    side_files(tmp_path, *CASES[case])
    ours, theirs = read(tmp_path), auto(tmp_path)
    text = "the <s> quick <tool> fox <think> </s><a> <b>x<image> <end>"
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)


def test_stored_padding_and_truncation_are_off(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert read(tmp_path).decode(read(tmp_path).encode("the quick brown fox jumps")) == "the quick brown fox jumps"


@pytest.mark.parametrize("where", ["jinja", "config", "list", "json", "folder"])
def test_chat_template_is_found(where, tmp_path):
    listed = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    side_files(tmp_path, {"chat_template": {"config": "D", "list": listed}.get(where)})
    if where == "jinja":
        (tmp_path / "chat_template.jinja").write_text("D")
    if where == "json":
        (tmp_path / "chat_template.json").write_text('{"chat_template": "D"}')
    if where == "folder":
        (tmp_path / "chat_template.jinja").write_text("D")
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    tokenizer = read(tmp_path)
    hello = [{"role": "user", "content": "hi"}]
    assert tokenizer.chat_template == tokenizer.apply_chat_template(hello) == "D"
    assert tokenizer.apply_chat_template(hello, chat_template="mine") == "mine"
    if where in ("list", "folder"):
        assert tokenizer.apply_chat_template(hello, tools=[{"name": "f"}]) == "T"
        assert tokenizer.apply_chat_template(hello, chat_template="tool_use") == "T"


# --- no tokenizer.json


def test_without_tokenizer_json_transformers_reads_the_files(tmp_path):
    backend = byte_level()
    backend.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"})
    )
    ours = read(tmp_path)
    text = "the quick brown fox </s> 你好"
    assert ours.encode(text) == auto(tmp_path).encode(text)
    assert ours.decode(ours.encode(text), skip_special_tokens=False) == text
    assert ours.eos_token_id == backend.token_to_id("</s>")


REMOTE = """
from transformers import PreTrainedTokenizer

class LetterTokenizer(PreTrainedTokenizer):
    vocab_files_names = {}
    @property
    def vocab_size(self): return 128
    def get_vocab(self): return {chr(i): i for i in range(128)} | dict(self.added_tokens_encoder)
    def _tokenize(self, text, **kwargs): return list(text)
    def _convert_token_to_id(self, token): return ord(token) % 128
    def _convert_id_to_token(self, index): return chr(index)
    def convert_tokens_to_string(self, tokens): return "".join(tokens)
    def save_vocabulary(self, *args, **kwargs): return ()
"""


def test_a_tokenizer_of_remote_code_runs_only_when_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "letters.py").write_text(REMOTE)
    settings_ = {"tokenizer_class": "LetterTokenizer", "auto_map": {"AutoTokenizer": ["letters.LetterTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_ | {"eos_token": "~"}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"trust_remote_code"):
        read(tmp_path)
    tokenizer = read(tmp_path, True)
    assert tokenizer.encode("ab", add_special_tokens=False) == [97, 98]
    stream = tokenizer.decode_stream()
    assert "".join(stream.step(i) for i in (97, 98, tokenizer.eos_token_id)) == "ab"


# --- errors


def test_a_folder_without_any_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"holds no tokenizer.json.*pass tokenizer=.*skip_tokenizer_init"):
        read(tmp_path)


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read .*download it again"):
        read(tmp_path)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json holds a list"):
        read(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not valid JSON"):
        read(tmp_path)


def test_what_is_no_text_is_refused(pair):
    ours, _ = pair
    with pytest.raises(ValueError, match=r"lone surrogate.*position 1"):
        ours.encode("a\ud800")
    with pytest.raises(ValueError, match=r"cannot tokenize 5: it is a int"):
        ours.encode(5)


def test_no_chat_template_names_the_cure(tmp_path):
    side_files(tmp_path, {})
    with pytest.raises(ValueError, match=r"no chat template.*pass chat_template="):
        read(tmp_path).apply_chat_template([{"role": "user", "content": "hi"}])


# --- the hook


def test_hook_load_tokenizer(tmp_path):
    """Asked first, with the checkpoint and the configuration; the first answer that is not None counts."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    mine = Tokenizer(byte_level(), {"eos_token": "</s>"})
    asked = []

    class Silent:
        @hookimpl
        def load_tokenizer(self, checkpoint, config):
            asked.append((checkpoint.path, config))

    class Answers:
        @hookimpl
        def load_tokenizer(self, checkpoint):
            return mine

    assert read(tmp_path, False, Answers(), Silent()) is mine
    assert asked == [(tmp_path, {})]
    assert read(tmp_path, False, Silent()) is not mine  # nobody answers: tokenizer.json
