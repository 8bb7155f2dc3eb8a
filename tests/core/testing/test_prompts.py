"""Prompts of the kit: the lengths that matter, for both sides of an encoder-decoder model."""

from modelport.testing.prompts import make_prompts


def test_lengths_around_blocks_and_windows_and_a_shared_beginning() -> None:
    prompts = make_prompts(320, windows=[24], longest=200)
    assert {1, 15, 16, 17, 23, 24, 25, 51, 61} <= {len(prompt) for prompt in prompts}
    longest, shared = max(prompts, key=len), prompts[-1]
    assert longest.token_ids[:40] == shared.token_ids[:40]
    assert longest != shared
    assert all(0 < token < 320 for prompt in prompts for token in prompt.token_ids)
    assert make_prompts(320, windows=[24], longest=200) == prompts  # the same in every process


def test_nothing_is_longer_than_the_model_allows() -> None:
    assert max(map(len, make_prompts(320, windows=[30], longest=31))) == 31


def test_an_encoder_reads_something_else() -> None:
    prompts = make_prompts(320, [], 100, has_encoder=True, start=2)
    assert all(prompt.token_ids[0] == 2 and prompt.encoder_token_ids for prompt in prompts)
    assert {len(prompt.encoder_token_ids) for prompt in prompts} == {1, 16, 17, 40}
    assert prompts[1].for_engine() == {
        "encoder_prompt": {"prompt_token_ids": list(prompts[1].encoder_token_ids)},
        "decoder_prompt": {"prompt_token_ids": list(prompts[1].token_ids)},
    }


def test_tokens_that_stand_for_media_are_left_out():
    held = {5, 6, 7}
    assert not held & {token for prompt in make_prompts(12, [], 200, without=held) for token in prompt.token_ids}
