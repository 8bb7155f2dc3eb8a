"""The public API: forms of prompts, sampling, stopping, streams, and what bad input does to everybody else."""

import asyncio
import inspect
import math
from itertools import pairwise

import pytest

from modelport import LLM, AsyncLLM, EngineConfig, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm(tiny) -> LLM:
    return LLM(tiny, max_model_len=200)


def tokens(outputs) -> list[list[list[int]]]:
    return [[list(c.token_ids) for c in o.outputs] for o in outputs]


def test_the_signature_shows_the_settings():
    shown = inspect.signature(LLM).parameters
    assert set(shown) == set(EngineConfig.model_fields)
    assert shown["seed"].default == 0


def test_forms_of_prompts_are_equal(llm):
    ids = llm.tokenizer.encode("Hello")
    forms = ["Hello", ids, {"prompt": "Hello"}, {"prompt_token_ids": ids}]
    alone = [tokens(llm.generate(form, GREEDY)) for form in forms]
    assert all(a == alone[0] for a in alone)
    assert tokens(llm.generate(forms, GREEDY)) == alone[0] * 4


def test_outputs_have_the_order_of_the_prompts(llm):
    prompts = ["first", "the second prompt is longer", "x"]
    outputs = llm.generate(prompts, [SamplingParams(max_tokens=n, ignore_eos=True) for n in (9, 1, 4)])
    assert [o.prompt for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == [9, 1, 4]
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)


def test_text_is_the_decoded_tokens(llm):
    output = llm.generate("abc", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))[0].outputs[0]
    assert output.text == llm.tokenizer.decode(output.token_ids)


def test_a_seed_gives_the_same_tokens_whatever_else_runs(llm):
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=16, ignore_eos=True)
    alone = tokens(llm.generate("seeded", params))
    others = SamplingParams(temperature=1.3, top_p=0.9, max_tokens=21, ignore_eos=True)
    crowd = llm.generate(["noise", "seeded", "more noise", "seeded"], [others, params, others, params])
    assert tokens(crowd)[1:4:2] == alone * 2
    assert tokens(llm.generate("seeded", SamplingParams(seed=12, max_tokens=16, ignore_eos=True))) != alone


def test_a_seed_survives_preemption(tiny, llm):
    params = [SamplingParams(seed=i, max_tokens=40, ignore_eos=True) for i in range(6)]
    prompts = [f"prompt number {i}" for i in range(6)]
    small = LLM(tiny, max_model_len=200, num_kv_blocks=13)
    outputs = small.generate(prompts, params)
    assert sum(o.metrics.num_preemptions for o in outputs) > 0
    assert tokens(outputs) == tokens(llm.generate(prompts, params))


def test_an_engines_seed_fixes_requests_without_one(tiny):
    runs = [tokens(LLM(tiny, max_model_len=64, seed=s).generate(["a", "a"])) for s in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_n_completions_differ_and_share_the_prompt(llm):
    params = SamplingParams(n=4, temperature=1.5, seed=5, max_tokens=10, ignore_eos=True)
    output = llm.generate("a prompt that is longer than one block of the cache", params)[0]
    assert [c.index for c in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in output.outputs}) == 4
    first = SamplingParams(temperature=1.5, seed=5, max_tokens=10, ignore_eos=True)
    assert tokens(llm.generate(output.prompt, first))[0][0] == list(output.outputs[0].token_ids)


def test_stopping(llm):
    base = llm.generate("stop here", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))[0].outputs[0]
    third = base.token_ids[2]
    first_at = list(base.token_ids).index(third)
    by_id = llm.generate("stop here", SamplingParams(temperature=0, max_tokens=30, stop_token_ids=[third]))[0].outputs[
        0
    ]
    assert (by_id.finish_reason, by_id.stop_reason) == ("stop", third)
    assert list(by_id.token_ids) == list(base.token_ids[: first_at + 1])
    assert by_id.text == llm.tokenizer.decode(base.token_ids[:first_at])
    word = base.text[4:6]
    by_text = llm.generate("stop here", SamplingParams(temperature=0, max_tokens=30, stop=word, ignore_eos=True))[
        0
    ].outputs[0]
    assert (by_text.finish_reason, by_text.stop_reason) == ("stop", word)
    assert by_text.text == base.text[: base.text.index(word)]
    kept = SamplingParams(temperature=0, max_tokens=30, stop=word, include_stop_str_in_output=True, ignore_eos=True)
    assert llm.generate("stop here", kept)[0].outputs[0].text == by_text.text + word
    late = SamplingParams(temperature=0, max_tokens=30, stop_token_ids=[third], min_tokens=first_at + 3)
    assert len(llm.generate("stop here", late)[0].outputs[0].token_ids) >= first_at + 3


def test_max_model_len_ends_a_request(llm):
    output = llm.generate("x" * 190, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))[0]
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == 200
    assert output.outputs[0].finish_reason == "length"


def test_log_probabilities(llm):
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    output = llm.generate("score me", params)[0]
    completion = output.outputs[0]
    assert len(completion.logprobs) == 5
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert len(entry) == 3
        assert entry[token].rank == 1
        assert entry[token].decoded_token == llm.tokenizer.token(token)
        assert sorted(e.rank for e in entry.values()) == [1, 2, 3]
    assert math.isclose(
        completion.cumulative_logprob,
        sum(e[t].logprob for t, e in zip(completion.token_ids, completion.logprobs, strict=True)),
    )
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert all(t in e for t, e in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True))
    again = llm.generate("score me" + completion.text, params)[0]  # what was generated scores the same as a prompt
    if again.prompt_token_ids[-5:] == list(completion.token_ids):
        for token, then, now in zip(completion.token_ids, completion.logprobs, again.prompt_logprobs[-5:], strict=True):
            assert math.isclose(then[token].logprob, now[token].logprob, abs_tol=1e-4)


def test_prompt_log_probabilities_survive_chunks_and_preemption(tiny, llm):
    params = SamplingParams(temperature=0, max_tokens=30, prompt_logprobs=0, ignore_eos=True)
    prompts = [f"{i} " * 15 for i in range(5)]
    small = LLM(tiny, max_model_len=100, num_kv_blocks=9, max_num_batched_tokens=8)
    outputs = small.generate(prompts, params)
    assert sum(o.metrics.num_preemptions for o in outputs) > 0
    for got, want in zip(outputs, llm.generate(prompts, params), strict=True):
        pairs = list(zip(got.prompt_logprobs[1:], want.prompt_logprobs[1:], strict=True))
        assert all(math.isclose(a[t].logprob, b[t].logprob, abs_tol=1e-4) for a, b in pairs for t in b)


def test_custom_logits_processors(llm):
    def only_seven(output_token_ids, logits):
        masked = logits.clone().fill_(float("-inf"))
        masked[100 + len(output_token_ids)] = 0.0
        return masked

    params = SamplingParams(temperature=1, max_tokens=3, logits_processors=[only_seven], ignore_eos=True)
    assert tokens(llm.generate(["a", "b"], params)) == [[[100, 101, 102]]] * 2


def test_the_prefix_cache_is_used_and_changes_nothing(tiny):
    fresh = LLM(tiny, max_model_len=200)
    prompt = "a beginning that is shared by all of them, " * 3
    first = fresh.generate(prompt + "one", GREEDY)[0]
    second = fresh.generate(prompt + "two", GREEDY)[0]
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == len(prompt) // 16 * 16
    cold = LLM(tiny, max_model_len=200, enable_prefix_caching=False).generate(prompt + "two", GREEDY)[0]
    assert cold.num_cached_tokens == 0
    assert second.outputs[0].token_ids == cold.outputs[0].token_ids


def test_chat_is_generate_with_the_template(llm):
    chat = llm.chat([{"role": "user", "content": "Hi"}], GREEDY)[0]
    assert chat.prompt == "<|user|>Hi<|assistant|>"
    assert chat.prompt_token_ids[0] == 3
    assert tokens([chat]) == tokens(llm.generate({"prompt_token_ids": chat.prompt_token_ids}, GREEDY))
    two = llm.chat([[{"role": "user", "content": c}] for c in ("Hi", "Ho")], GREEDY)
    assert tokens(two[:1]) == tokens([chat])


def test_a_stream_grows_to_what_generate_gives(llm):
    params = SamplingParams(temperature=0, max_tokens=15, ignore_eos=True)
    seen = list(llm.stream("stream", params))
    texts = [o.outputs[0].text for o in seen]
    assert len(seen) == 15
    assert all(b.startswith(a) for a, b in pairwise(texts))
    assert [o.finished for o in seen] == [False] * 14 + [True]
    assert texts[-1] == llm.generate("stream", params)[0].outputs[0].text


def test_streams_may_be_read_in_turn_and_left_early(llm):
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    want = [tokens(llm.generate(p, params))[0][0] for p in ("one", "two")]
    one, two = llm.stream("one", params), llm.stream("two", params)
    next(one), next(two)
    left = llm.stream("three", params)
    next(left)
    left.close()
    assert [list(list(s)[-1].outputs[0].token_ids) for s in (one, two)] == want
    assert not llm._front.engine.has_work
    (group,) = llm._front.engine.cache.groups
    assert group.pool.num_free == group.pool.num_blocks


BAD_INPUT = [
    pytest.param("", {}, ValueError, "is empty", id="empty text"),
    pytest.param([[]], {}, ValueError, "is empty", id="empty ids"),
    pytest.param("x" * 500, {}, ValueError, "500 tokens; max_model_len=200", id="too long"),
    pytest.param([[5, 320]], {}, ValueError, r"token id 320 .* \(0 to 319\)", id="outside the vocabulary"),
    pytest.param([[5, -1]], {}, ValueError, "token id -1", id="negative id"),
    pytest.param([[5, 1.5]], {}, TypeError, "1.5", id="float id"),
    pytest.param({"text": "x"}, {}, ValueError, "'text'", id="unknown key"),
    pytest.param(7, {}, TypeError, "", id="number"),
    pytest.param("x", {"top_p": 0}, ValueError, "top_p", id="top_p=0"),
    pytest.param("x", {"max_tokens": -1}, ValueError, "max_tokens", id="negative max_tokens"),
    pytest.param("x", {"temperature": math.nan}, ValueError, "temperature", id="NaN temperature"),
    pytest.param("x", {"allowed_token_ids": [999]}, ValueError, "999", id="allowed id outside"),
    pytest.param("x", {"logit_bias": {400: 1.0}}, ValueError, "400", id="bias outside"),
]


@pytest.mark.parametrize(("prompt", "fields", "error", "message"), BAD_INPUT)
def test_bad_input_is_refused_and_the_others_go_on(llm, prompt, fields, error, message):
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    running = llm.stream("still here", params)
    next(running)
    with pytest.raises(error, match=message):
        llm.generate(prompt, SamplingParams(**fields))
    assert len(list(running)[-1].outputs[0].token_ids) == 8


def test_one_bad_prompt_in_a_list_starts_nothing(llm):
    with pytest.raises(ValueError, match="is empty"):
        llm.generate(["fine", ""], GREEDY)
    assert not llm._front.engine.has_work


def test_parameters_must_be_as_many_as_prompts(llm):
    with pytest.raises(ValueError, match="2 prompts but 1 sampling_params"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(TypeError, match="sampling_params"):
        llm.generate(["a"], {"temperature": 0})


def test_a_request_whose_processor_fails_ends_alone(llm):
    def broken(output_token_ids, logits):
        raise RuntimeError("processor says no")

    good, bad = GREEDY, SamplingParams(max_tokens=5, logits_processors=[broken])
    fine, failed = llm.generate(["same", "same"], [good, bad])
    assert (failed.outputs[0].finish_reason, failed.finished) == ("error", True)
    assert "processor says no" in failed.outputs[0].stop_reason
    assert tokens([fine]) == tokens(llm.generate("same", GREEDY))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_length": 5}, "did you mean 'max_model_len'"),
        ({"dtype": "int4"}, "dtype='int4'"),
        ({"max_model_len": -1}, "max_model_len=-1"),
        ({"max_model_len": 100_000}, "100000 exceeds the 512 positions"),
        ({"num_kv_blocks": 2, "max_model_len": 100}, "has room for 32"),
        ({"max_num_batched_tokens": 4, "max_num_seqs": 8}, "max_num_batched_tokens=4"),
        ({"device": "abacus"}, "'abacus' is not known"),
    ],
)
def test_bad_settings(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        LLM(tiny, **settings)


def test_a_small_cache_shortens_the_default_length(tiny):
    small = LLM(tiny, num_kv_blocks=4)
    assert small.max_model_len == 64
    assert len(small.generate("x", SamplingParams(max_tokens=None, ignore_eos=True))[0].outputs[0].token_ids) == 63


def test_without_a_tokenizer(tiny, llm):
    bare = LLM(tiny, max_model_len=64, skip_tokenizer_init=True)
    ids = llm.tokenizer.encode("bare")
    output = bare.generate(ids, GREEDY)[0]
    assert output.outputs[0].text == ""
    assert tokens([output]) == tokens(llm.generate("bare", GREEDY))
    with pytest.raises(ValueError, match="needs a tokenizer"):
        bare.generate("text", GREEDY)


def test_generation_config_gives_defaults(tiny, tmp_path):
    import json
    import shutil

    folder = tmp_path / "with-defaults"
    shutil.copytree(tiny, folder)
    entries = {"eos_token_id": [2, 70], "temperature": 0.6, "top_p": 0.9, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(entries))
    loaded = LLM(str(folder), max_model_len=64)
    assert (loaded.get_default_sampling_params().temperature, loaded.get_default_sampling_params().top_p) == (0.6, 0.9)
    stopped = loaded.generate("x", SamplingParams(temperature=0, allowed_token_ids=[70]))[0].outputs[0]
    assert (stopped.finish_reason, stopped.stop_reason, list(stopped.token_ids)) == ("stop", None, [70])


def test_async(tiny, llm):
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    prompts = [f"async {i}" for i in range(5)]

    async def collect(engine: AsyncLLM, prompt: str):
        return [output async for output in engine.generate(prompt, params)]

    async def main():
        engine = AsyncLLM(tiny, max_model_len=200)
        try:
            streams = await asyncio.gather(*(collect(engine, p) for p in prompts))
            with pytest.raises(ValueError, match="is empty"):
                await collect(engine, "")
            async for _ in engine.generate("left early", SamplingParams(max_tokens=150, ignore_eos=True)):
                break
            chat = [o async for o in engine.chat([{"role": "user", "content": "Hi"}], GREEDY)][-1]
            for _ in range(100):  # the abort of the one left early arrives at its own time
                if not engine._front.engine.has_work:
                    break
                await asyncio.sleep(0.01)
            assert not engine._front.engine.has_work
        finally:
            engine.shutdown()
        with pytest.raises(RuntimeError, match="not running"):
            await collect(engine, "too late")
        return streams, chat

    streams, chat = asyncio.run(main())
    assert tokens([s[-1] for s in streams]) == tokens(llm.generate(prompts, params))
    assert all(s[-1].finished for s in streams)
    assert tokens([chat]) == tokens(llm.chat([{"role": "user", "content": "Hi"}], GREEDY))


def test_async_reports_a_failed_engine(tiny):
    async def main():
        engine = AsyncLLM(tiny, max_model_len=64)
        engine._front.engine.runner.launch = lambda *given: 1 / 0
        with pytest.raises(RuntimeError, match="engine failed"):
            [o async for o in engine.generate("x", GREEDY)]
        with pytest.raises(RuntimeError, match="not running"):
            [o async for o in engine.generate("x", GREEDY)]

    asyncio.run(main())


def test_a_cache_of_eight_bit_floats(tiny, llm):
    small = LLM(tiny, max_model_len=200, kv_cache_dtype="fp8")
    ids, params = list(range(5, 45)), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=0)
    exact, rounded = (engine.generate([ids], params)[0].prompt_logprobs[1:] for engine in (llm, small))
    gaps = [abs(a[t].logprob - b[t].logprob) for a, b, t in zip(exact, rounded, ids[1:], strict=True)]
    assert 0 < max(gaps) < 0.5
