"""BART against transformers: encoder prompts of all lengths together, chunks, preemption, forced tokens."""

import json
from pathlib import Path

import pytest
import torch

from modelport import LLM, SamplingParams
from modelport.plugin import load_plugins
from modelport.testing.reference import ModuleReference

TOKENS = 24


class Case:
    def __init__(self, folder):
        self.reference = ModuleReference(load_plugins().find(["BartForConditionalGeneration"]))
        self.folder = str(self.reference.save(folder))
        generator = torch.Generator().manual_seed(3)
        self.encoder = [torch.randint(3, 320, (n,), generator=generator).tolist() for n in (1, 5, 16, 17, 40)]
        self.decoder = [[2], [2, 7, 9], [2], [2, *range(10, 40)], [2]]

    def prompts(self):
        pairs = zip(self.encoder, self.decoder, strict=True)
        return [{"encoder_prompt": e, "decoder_prompt": {"prompt_token_ids": d}} for e, d in pairs]

    @torch.inference_mode()
    def logits(self, encoder, decoder):
        model = self.reference.model
        return model(torch.tensor([encoder]), decoder_input_ids=torch.tensor([decoder]), use_cache=False).logits[0]

    def greedy(self, encoder, decoder):
        ids = list(decoder)
        for _ in range(TOKENS):
            ids.append(int(self.logits(encoder, ids)[-1].argmax()))
        return ids[len(decoder) :]

    def wanted(self):
        return [self.greedy(e, d) for e, d in zip(self.encoder, self.decoder, strict=True)]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("bart"))


def engine(folder, **settings):
    return LLM(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=128, **settings)


def greedy(llm, prompts):
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params)]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="together"),
        pytest.param({"max_num_batched_tokens": 8, "max_num_seqs": 8}, id="chunks-of-8"),
        pytest.param({"num_kv_blocks": 8, "max_num_seqs": 4}, id="preempted"),
        pytest.param({"block_size": 4}, id="small-blocks"),
    ],
)
def test_greedy_tokens_are_the_references(case, settings):
    llm, want = engine(case.folder, **settings), case.wanted()
    outputs = llm.generate(case.prompts(), SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True))
    assert [list(o.outputs[0].token_ids) for o in outputs] == want
    assert [o.encoder_prompt_token_ids for o in outputs] == case.encoder
    if "num_kv_blocks" in settings:
        assert sum(o.metrics.num_preemptions for o in outputs) > 0
    assert greedy(llm, case.prompts()) == want  # nothing is left over from the first round


def test_prompt_log_probabilities_are_the_references(case):
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (output,) = engine(case.folder).generate([case.prompts()[3]], params)
    want = case.logits(case.encoder[3], case.decoder[3]).log_softmax(-1)
    found = [next(iter(e.values())).logprob for e in output.prompt_logprobs[1:]]
    wanted = [float(want[i, t]) for i, t in enumerate(case.decoder[3][1:])]
    assert found == pytest.approx(wanted, abs=2e-5)


def test_a_plain_prompt_goes_to_the_encoder_and_forced_tokens_stand_where_the_checkpoint_wants_them(case, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(case.folder) / name).read_bytes())
    entries = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**entries, "forced_bos_token_id": 5, "forced_eos_token_id": 6}))
    llm = engine(str(tmp_path))
    want = [5, *case.greedy(case.encoder[1], [2, 5])][: TOKENS - 1]
    assert greedy(llm, [case.encoder[1]]) == [[*want, 6]]
    (output,) = llm.generate([case.encoder[1]], SamplingParams(n=2, seed=1, max_tokens=4, ignore_eos=True))
    assert [(o.token_ids[0], o.token_ids[-1]) for o in output.outputs] == [(5, 6)] * 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"encoder_prompt": [5], "decoder": [2]}, r"not \['decoder'\]"),
        ({"encoder_prompt": []}, "empty"),
        ({"encoder_prompt": [3] * 129}, "129 tokens, more than max_model_len=128"),
        ({"encoder_prompt": [5], "decoder_prompt": [400]}, "token id 400"),
    ],
)
def test_bad_pairs_are_refused(case, prompt, message):
    with pytest.raises(ValueError, match=message):
        greedy(engine(case.folder), [prompt])
