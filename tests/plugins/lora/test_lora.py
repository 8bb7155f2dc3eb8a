"""Requests with adapters: what each gets is what the merged model gives, whatever lies beside it and came before."""

import asyncio
import json
import subprocess
import sys
import time

import pytest
import torch

from modelport import LLM, AsyncLLM, LoRARequest, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
IDS = list(range(5, 42))
PROMPT = {"prompt_token_ids": IDS}
SETTINGS = {"skip_tokenizer_init": True, "max_model_len": 128, "dtype": "float32"}


def write_tokenizer(folder) -> None:
    """One of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def engine(base, **settings) -> LLM:
    return LLM(str(base.folder), **{**SETTINGS, "enable_lora": True, **settings})


def tokens(outputs) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in outputs]


def run(llm: LLM, adapters, prompt=PROMPT, params=GREEDY) -> list[list[int]]:
    adapters = adapters if isinstance(adapters, list) else [adapters]
    return tokens(llm.generate([prompt] * len(adapters), params, use_tqdm=False, lora_request=adapters))


@pytest.fixture(scope="module")
def requests(base) -> list[LoRARequest]:
    return [LoRARequest(f"a{i}", i, base.adapter(f"a{i}", seed=i, rank=2 + i)) for i in range(1, 6)]


@pytest.fixture(scope="module")
def wanted(base) -> list[list[int]]:
    """What the model as it is and each merged model say."""
    folders = [str(base.folder), *(base.merged(f"m{i}", seed=i, rank=2 + i) for i in range(1, 6))]
    return [run(LLM(folder, **SETTINGS), None)[0] for folder in folders]


def test_adapters_differ_from_the_model_and_each_other(wanted):
    assert len(set(map(tuple, wanted))) == len(wanted)


def test_many_adapters_in_one_batch(base, requests, wanted):
    llm = engine(base, max_loras=5)
    order = [None, requests[2], requests[0], None, requests[4], requests[1], requests[3], requests[0]]
    want = [wanted[r.lora_int_id if r else 0] for r in order]
    assert run(llm, order) == want
    assert run(llm, order[::-1]) == want[::-1]


def test_more_adapters_than_slots_take_turns(base, requests, wanted):
    llm = engine(base, max_loras=2)
    order = [*requests, None, *requests[::-1], requests[2]]
    for _ in range(2):
        assert run(llm, order) == [wanted[r.lora_int_id if r else 0] for r in order]


def test_beginnings_are_shared_within_an_adapter_only(base, requests, wanted):
    llm = engine(base, block_size=8)
    for _ in range(2):
        for request in (None, requests[0], requests[1]):
            (output,) = llm.generate(PROMPT, GREEDY, use_tqdm=False, lora_request=request)
            assert list(output.outputs[0].token_ids) == wanted[request.lora_int_id if request else 0]
            assert output.lora_request == request
    assert output.num_cached_tokens == 32  # the second time
    again = LoRARequest("copy", 77, requests[1].lora_path)  # the same files under another name
    (output,) = llm.generate(PROMPT, GREEDY, use_tqdm=False, lora_request=again)
    assert output.num_cached_tokens == 32


def test_preempted_and_cut(base, requests, wanted):
    llm = engine(base, num_kv_blocks=7, max_model_len=64, max_num_batched_tokens=16, max_num_seqs=4, max_loras=2)
    order = [requests[0], None, requests[1], requests[0], requests[2]]
    longer = SamplingParams(temperature=0, max_tokens=26, ignore_eos=True)
    outputs = llm.generate([PROMPT] * 5, longer, use_tqdm=False, lora_request=order)
    assert sum(o.metrics.num_preemptions for o in outputs) > 0
    assert [found[:12] for found in tokens(outputs)] == [wanted[r.lora_int_id if r else 0] for r in order]


def test_steps_are_recorded_with_adapters_too(base, requests, wanted):
    llm = engine(base)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    recorder = llm._front.engine.runner.recorder
    if recorder is None:
        pytest.skip("no compiled kernels here")
    plain = run(llm, [None, None], params=params)
    for request in requests[:2]:
        before = recorder.num_replays
        found = run(llm, [request, None], params=params)
        assert recorder.given_up is None
        assert recorder.num_replays > before
        assert found[0][:12] == wanted[request.lora_int_id]
        assert found[1] == plain[0]


def test_an_adapter_that_could_not_be_placed_is_placed_by_the_next_request(base, requests, wanted, monkeypatch):
    llm = engine(base)
    adapters = llm._front.engine.adapters
    place = type(adapters).place

    def fail(self, slot, adapter):
        place(self, slot, adapter)
        next(layer for layer in self._layers if layer.low_rank is not None).low_rank.b[slot] = 7.0
        raise MemoryError("no room")

    monkeypatch.setattr(type(adapters), "place", fail)
    with pytest.raises(MemoryError, match="no room"):
        run(llm, requests[0])
    monkeypatch.undo()
    assert run(llm, [requests[0], None]) == [wanted[1], wanted[0]]


def test_an_adapter_of_a_larger_rank_comes_later(base, requests, wanted):
    llm = engine(base)
    assert run(llm, [requests[0], None]) == [wanted[1], wanted[0]]
    assert run(llm, [requests[4], requests[0]]) == [wanted[5], wanted[1]]


def test_one_that_changes_fewer_layers_in_the_slot_of_another(base, requests, wanted):
    options = {"seed": 9, "rank": 3, "only": ("q_proj",)}
    want = run(LLM(base.merged("few-merged", **options), **SETTINGS), None)[0]
    few = LoRARequest("few", 50, base.adapter("few", **options))
    llm = engine(base, max_loras=1)
    assert run(llm, requests[0]) == [wanted[1]]
    assert run(llm, few) == [want]
    assert run(llm, requests[0]) == [wanted[1]]


def test_fused_and_unfused_names(base):
    """Adapters of phi-3's fused `qkv_proj`, and of the q, k and v that it holds."""
    from safetensors.torch import load_file, save_file

    from modelport.plugin import load_plugins
    from modelport.testing.adapters import Factors, write_adapter
    from modelport.testing.reference import ModuleReference

    folder = base.folder.parent / "phi3"
    ModuleReference(load_plugins().find(["Phi3ForCausalLM"])).save(folder)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    path = "model.layers.1.self_attn"
    weight = tensors[f"{path}.qkv_proj.weight"]
    dim = config["hidden_size"] // config["num_attention_heads"]
    sizes = (weight.shape[0] - 2 * dim * config["num_key_value_heads"], *[dim * config["num_key_value_heads"]] * 2)
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(shape, generator=generator) for shape in ((3, weight.shape[1]), (weight.shape[0], 3)))
    whole = write_adapter(folder / "whole", {f"{path}.qkv_proj": Factors(a, b, 0.2)})
    names = ("q_proj", "k_proj", "v_proj")
    parts = write_adapter(
        folder / "parts",
        {f"{path}.{n}": Factors(a.clone(), piece, 0.2) for n, piece in zip(names, b.split(sizes), strict=True)},
    )
    tensors[f"{path}.qkv_proj.weight"] = (weight.double() + 0.2 * b.double() @ a.double()).float()
    (folder / "merged").mkdir()
    save_file(tensors, folder / "merged" / "model.safetensors", {"format": "pt"})
    (folder / "merged" / "config.json").write_text(json.dumps(config))
    want = run(LLM(str(folder / "merged"), **SETTINGS), None)[0]
    llm = LLM(str(folder), enable_lora=True, **SETTINGS)
    requests = [LoRARequest("whole", 1, str(whole)), LoRARequest("parts", 2, str(parts)), None]
    found = run(llm, requests)
    assert found[:2] == [want, want]
    assert found[2] != want


def test_embeddings_and_heads(base):
    factors = {}
    generator = torch.Generator().manual_seed(2)
    from safetensors.torch import save_file

    from modelport.testing.adapters import Factors, write_adapter

    embed, head = base.tensors["model.embed_tokens.weight"], base.tensors["lm_head.weight"]
    rows, size = embed.shape
    factors["model.embed_tokens"] = Factors(
        torch.randn(3, rows, generator=generator), torch.randn(size, 3, generator=generator), 0.3, is_table=True
    )
    factors["lm_head"] = Factors(
        torch.randn(5, size, generator=generator), torch.randn(rows, 5, generator=generator), 0.1
    )
    path = write_adapter(base.folder.parent / "tables", factors)
    folder = base.folder.parent / "tables-merged"
    folder.mkdir()
    merged = dict(base.tensors)
    merged["model.embed_tokens.weight"] = (embed.double() + factors["model.embed_tokens"].delta()).float()
    merged["lm_head.weight"] = (head.double() + factors["lm_head"].delta()).float()
    save_file(merged, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((base.folder / "config.json").read_text())
    want = run(LLM(str(folder), **SETTINGS), None)[0]
    assert run(engine(base), [LoRARequest("tables", 1, str(path)), None])[0] == want


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_stay_close(base, requests, dtype, quantization):
    llm = LLM(str(base.folder), enable_lora=True, **{**SETTINGS, "dtype": dtype}, quantization=quantization)
    merged = LLM(base.merged("m1", seed=1, rank=3), **SETTINGS)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (want,) = merged.generate(PROMPT, params, use_tqdm=False)
    (plain,) = llm.generate(PROMPT, params, use_tqdm=False)
    (found,) = llm.generate(PROMPT, params, use_tqdm=False, lora_request=requests[0])

    def distance(a, b) -> float:
        pairs = zip(a.prompt_logprobs[1:], b.prompt_logprobs[1:], IDS[1:], strict=True)
        return sum(abs(x[token].logprob - y[token].logprob) for x, y, token in pairs) / (len(IDS) - 1)

    assert distance(found, want) < 0.1 < distance(plain, want)


def test_adapters_come_and_go_while_others_run(base, requests, wanted):
    async def work() -> None:
        llm = AsyncLLM(str(base.folder), enable_lora=True, max_loras=2, max_cpu_loras=3, **SETTINGS)
        try:

            async def one(request) -> list[int]:
                async for output in llm.generate(PROMPT, GREEDY, lora_request=request):
                    last = output
                return list(last.outputs[0].token_ids)

            order = [None, *requests, *requests[::-1], None]
            found = await asyncio.gather(*map(one, order))
            assert found == [wanted[r.lora_int_id if r else 0] for r in order]
            assert len(await llm.list_loras()) == 3
            await llm.add_lora(requests[0])
            assert 1 in await llm.list_loras()
            assert await llm.remove_lora(1)
            assert not await llm.remove_lora(1)
            with pytest.raises(FileNotFoundError, match=r"adapter 'nowhere': .*/no/such/folder"):
                await one(LoRARequest("nowhere", 9, "/no/such/folder"))
            assert await one(requests[0]) == wanted[1]
        finally:
            llm.shutdown()

    asyncio.run(work())


def test_names_given_at_the_start(base, requests, wanted):
    llm = LLM(str(base.folder), lora_modules={"one": requests[0].lora_path, "two": requests[1].lora_path}, **SETTINGS)
    assert run(llm, ["two", None, "one"]) == [wanted[2], wanted[0], wanted[1]]
    assert llm.list_loras() == {1, 2}
    with pytest.raises(ValueError, match=r"no adapter named 'three' among lora_modules \(one, two\)"):
        run(llm, "three")


def test_an_id_belongs_to_one_adapter(base, requests):
    llm = engine(base)
    run(llm, requests[0])
    with pytest.raises(ValueError, match=r"lora_int_id=1 is 'a1' .* not 'other'"):
        run(llm, LoRARequest("other", 1, requests[1].lora_path))
    assert llm.remove_lora(1)
    run(llm, LoRARequest("other", 1, requests[1].lora_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [(("", 1, "x"), "name"), (("x", 0, "x"), "lora_int_id=0"), (("x", 1, ""), "path"), (("x", "1", "x"), "'1'")],
)
def test_bad_requests(fields, message):
    with pytest.raises(ValueError, match=message):
        LoRARequest(*fields)


def test_without_the_setting_or_the_plugin(base, requests):
    with pytest.raises(ValueError, match="enable_lora=True"):
        run(LLM(str(base.folder), **SETTINGS), requests[0])
    with pytest.raises(ValueError, match="no plugin serves adapters"):
        engine(base, blocked_plugins=("lora",))
    with pytest.raises(TypeError, match="must be a LoRARequest, not int"):
        run(engine(base), [3])
    with pytest.raises(ValueError, match="1 prompts but 2 lora_requests"):
        engine(base).generate(PROMPT, GREEDY, use_tqdm=False, lora_request=[None, None])


def test_workers_read_adapters_themselves(base, requests, wanted):
    llm = engine(base, tensor_parallel_size=2, max_loras=2)
    try:
        order = [requests[0], None, requests[1], requests[2]]
        for _ in range(2):  # the second time their slots are others'
            assert run(llm, order) == [wanted[r.lora_int_id if r else 0] for r in order]
    finally:
        llm._front.engine.shutdown()


def test_reading_is_quick(base, requests):
    """A bound with room: an adapter that takes a second would hold somebody up."""
    llm = engine(base)
    started = time.perf_counter()
    llm.add_lora(requests[0])
    assert time.perf_counter() - started < 1.0


def test_the_command(base, tmp_path):
    from modelport.testing.adapters import write_adapter

    path = write_adapter(tmp_path / "adapter", base.factors(1, strength=3.0))
    write_tokenizer(base.folder)

    def generate(*more: str) -> subprocess.CompletedProcess:
        command = ["generate", "-m", str(base.folder), "--max-tokens", "8", "--ignore-eos", "-q", *more, "abc"]
        return subprocess.run(
            [sys.executable, "-m", "modelport", *command], capture_output=True, text=True, timeout=120
        )  # fmt: skip

    plain, adapted = generate(), generate("--lora", f"style={path}")
    assert (plain.returncode, adapted.returncode) == (0, 0), adapted.stderr
    assert plain.stdout != adapted.stdout
    several = ("--lora", f"style={path}", "--lora", f"other={path}")
    assert "choose one with --lora-name" in generate(*several).stderr
    assert generate(*several, "--lora-name", "other").stdout == adapted.stdout
    wrong = generate("--lora", str(path))
    assert wrong.returncode != 0
    assert "NAME=PATH" in wrong.stderr
