"""`modelport bench` on a tiny model, and the arithmetic that turns token times into figures."""

import importlib.util
import json
from pathlib import Path

import pytest

from modelport import cli
from modelport.cli import bench, measure
from modelport.cli.measure import Work
from modelport.frontend import Frontend, engine_config

SUMMARY = Path(__file__).parents[3] / "benchmarks" / "summary.py"
SMALL = ["--num-kv-blocks", "64", "--rounds", "2", "--json"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    status = cli.main(["bench", *arguments])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out)


def test_throughput(tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen, drive = [], measure.drive
    monkeypatch.setattr(measure, "drive", lambda front, work: seen.extend(work) or drive(front, work))
    found = run(capsys, "throughput", "-m", tiny, "--batch", "1,3", "--input-len", "20", "--output-len", "6", *SMALL)
    assert [case["batch"] for case in found["cases"]] == [1, 3]
    for case in found["cases"]:
        assert len(case["rounds"]) == 2
        assert all(case["median"][name] > 0 for name in ("prefill_tok_s", "decode_tok_s", "output_tok_s"))
        assert case["median"]["cached_share"] == 0
    prompts = [tuple(work.prompt) for work in seen]
    assert len(set(prompts)) == len(prompts) == 2 + 2 * 2 * (1 + 3)  # warm-up, then prompts alone and with outputs
    assert found["cache_bytes"] > 0
    assert found["weight_bytes"] > 0
    assert found["settings"]["model"] == tiny


def test_latency_of_one_request_and_of_a_trace_that_shares_beginnings(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--input-len", "16", "--output-len", "8", "--requests", "8", "--rate", "200", "--prefix-len", "48"]
    found = run(capsys, "latency", "-m", tiny, *flags, "--prefixes", "1", "--max-num-seqs", "2", *SMALL)
    one, trace = (case["median"] for case in found["cases"])
    assert 0 < one["first_token_p50_s"] < one["seconds"]
    assert one["inter_token_p50_s"] <= one["inter_token_p99_s"]
    assert one["cached_share"] == 0
    assert trace["cached_share"] > 0.3  # in an earlier round's cache nothing is found: each has texts of its own


def test_startup(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "startup", "-m", tiny, "--num-kv-blocks", "64", "--rounds", "1", "--json")
    (one,) = found["rounds"]
    assert one["total_s"] == pytest.approx(one["import_s"] + one["load_s"] + one["first_token_s"])
    assert min(one.values()) > 0


def test_tables_for_people(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--rounds", "1", "--input-len", "8", "--output-len", "4", "--num-kv-blocks", "64"]
    assert cli.main(["bench", "throughput", "-m", tiny, "--batch", "2", *short]) == 0
    out = capsys.readouterr().out
    assert out.startswith("BATCH  PREFILL tok/s")
    assert "peak memory" in out
    assert cli.main(["bench", "latency", "-m", tiny, "--requests", "0", *short]) == 0
    out = capsys.readouterr().out
    assert "one request" in out
    assert "trace" not in out


def test_what_cannot_be_measured_is_said(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "throughput", "-m", tiny, "--batch", "1", "--input-len", "9000"]) == 2
    assert "9001 tokens" in capsys.readouterr().err
    assert cli.main(["bench", "startup", "-m", "./nowhere", "--rounds", "1"]) == 2
    assert "./nowhere" in capsys.readouterr().err
    for wrong in (["throughput", "--batch", "0"], ["latency", "--rate", "0"], ["startup", "--rounds", "0"]):
        with pytest.raises(SystemExit):
            cli.main(["bench", *wrong])


def test_every_kind_takes_the_engine_flags() -> None:
    parser = cli._parser(["bench"])
    for kind in ("throughput", "latency", "startup"):
        args = parser.parse_args(["bench", kind, "--dtype", "float32", "--quantization", "int8"])
        assert bench.engine_settings(args)["quantization"] == "int8"


def test_drive_gives_the_tokens_that_generate_gives(tiny: str) -> None:
    from modelport import LLM, SamplingParams

    front = Frontend(engine_config(tiny, {"num_kv_blocks": 64}))
    work = measure.batch(3, 10, 5, front.config.vocab_size, "x")
    late = [Work(0.01 * i, one.prompt, 5) for i, one in enumerate(work)]
    times, tokens, cached = measure.drive(front, late)
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    outputs = LLM(tiny, num_kv_blocks=64).generate([one.prompt for one in work], params, use_tqdm=False)
    assert tokens == [list(output.outputs[0].token_ids) for output in outputs]
    assert cached == 0
    assert all(stamps == sorted(stamps) and stamps[0] >= one.arrival for stamps, one in zip(times, late, strict=True))


def test_figures_of_known_times() -> None:
    work = [Work(0.0, [1] * 10, 3), Work(1.0, [2] * 30, 4)]
    found = measure.figures(work, [[2.0, 3.0, 6.0], [3.0, 4.0, 5.0, 8.0]])
    assert found["seconds"] == 8.0
    assert found["output_tok_s"] == 7 / 8
    assert found["total_tok_s"] == 47 / 8
    assert found["prefill_tok_s"] is None
    assert found["first_token_p50_s"] == 2.0  # both wait two seconds, counted from their arrivals
    assert found["inter_token_p50_s"] == 1.0
    assert found["decode_tok_s"] == 3 / 3  # from 3.0 to 6.0: one of the first, two of the second
    assert measure.figures(work[:1], [[2.0, 3.0, 6.0]])["decode_tok_s"] == 2 / 4
    assert measure.figures([Work(0.0, [1] * 10, 1)], [[2.0]])["prefill_tok_s"] == 5.0
    with pytest.raises(ValueError, match="2 tokens instead of 3"):
        measure.figures(work[:1], [[2.0, 3.0]])


def test_a_batch_that_was_never_whole_has_no_decode_rate() -> None:
    assert measure.decode_rate([[1.0, 2.0], [2.0, 3.0]]) is None
    assert measure.decode_rate([[1.0]]) is None


def test_percentile_and_medians_and_ratio() -> None:
    assert [measure.percentile([4, 1, 3, 2], p) for p in (0, 50, 100)] == [1, 2.5, 4]
    assert measure.medians([{"a": 3.0, "b": None}, {"a": 1.0, "b": 7.0}, {"a": 2.0, "b": None}]) == {"a": 2.0, "b": 7.0}
    # Round 1 ran on a machine half as fast; by medians of each it would be 20 / 12, within rounds it is 2.
    assert measure.ratio({0: 20.0, 1: 10.0, 2: 24.0}, {0: 10.0, 1: 5.0, 2: 12.0, 3: 99.0}) == 2.0
    assert measure.ratio({0: 1.0}, {1: 1.0}) is None


def test_texts_depend_on_the_seed_and_traces_share_beginnings() -> None:
    assert measure.batch(2, 8, 1, 100, "a") == measure.batch(2, 8, 1, 100, "a")
    assert measure.batch(2, 8, 1, 100, "a") != measure.batch(2, 8, 1, 100, "b")
    trace = measure.trace(400, 10.0, 100, 0, prefixes=3, prefix_len=16, longest_input=8, longest_output=8)
    assert len({tuple(one.prompt[:16]) for one in trace}) == 3
    assert {len(one.prompt) - 16 for one in trace} == set(range(2, 9))
    assert {one.max_tokens for one in trace} == set(range(2, 9))
    assert trace[-1].arrival == pytest.approx(40, rel=0.2)


def test_summary_of_a_comparison() -> None:
    spec = importlib.util.spec_from_file_location("summary", SUMMARY)
    summary = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(summary)
    rounds = [
        {"round": n, "case": "decode-1", "engine": e, "figures": {"decode_tok_s": v, "seconds": 1.0}, "first_tokens": t}
        for n, e, v, t in [
            (0, "modelport", 60.0, [1, 2]), (0, "transformers", 20.0, [1, 2]), (0, "llamacpp-q8_0", 50.0, [1, 3]),
            (1, "modelport", 40.0, [5, 6]), (1, "transformers", 10.0, [5, 6]),
        ]
    ]  # fmt: skip
    limit = {"read_bytes_s": 100.0, "bfloat16_flop_s": 50.0, "float32_flop_s": 10.0}
    model = {"bytes_per_token": 1.0, "flop_per_token_at_1024": 1.0}
    found = summary.summarize({"rounds": rounds, "limits": [limit, limit], "model": model})
    assert found["medians"]["decode-1"]["modelport"]["decode_tok_s"] == 50.0
    assert found["ratios"]["decode-1"] == {"modelport / transformers": {"decode_tok_s": 3.5}}  # of 3 and 4
    assert found["shares"]["modelport"]["decode-1 of read bandwidth"] == 0.5
    assert found["agreement"] == {"modelport": 1.0, "llamacpp-q8_0": 0.5}
