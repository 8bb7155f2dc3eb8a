"""`conformance_tests` in a vendor's test file, and what the plugin costs those who do not use it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

VENDOR = """
from dataclasses import replace
from modelport.plugin import load_plugins
from modelport.testing import conformance_tests

sound = load_plugins().find(["LlamaForCausalLM"])
test_acme = conformance_tests("LlamaForCausalLM", only=["logits", "pooling"])
wrong = replace(sound, rename={"model.": "x."})
test_known = conformance_tests(replace(wrong, expected_failures={"weights": "so"}), only="weights")
test_wrong = conformance_tests(wrong, only=["runs"])
"""


def test_each_check_is_a_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_acme=VENDOR)
    result = pytester.runpytest_inprocess("-v", "-rA", "--conformance-reports", "reports", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, skipped=1, xfailed=1, failed=1)
    result.stdout.fnmatch_lines(["*test_acme?logits? PASSED*", "*test_acme?pooling? SKIPPED*not built yet*"])
    result.stdout.fnmatch_lines(["*runs: WeightsError: the checkpoint does not fit*"])
    result.stdout.fnmatch_lines(["LlamaForCausalLM: 1 passed, 1 not built yet in*"])
    assert "Traceback" not in result.stdout.str()
    report = json.loads(Path("reports/LlamaForCausalLM.json").read_text())
    assert report["architecture"] == "LlamaForCausalLM"


def test_loading_the_plugin_imports_pytest_and_nothing_else() -> None:
    code = (
        "import sys, time, pytest; before = set(sys.modules); start = time.perf_counter()\n"
        "import modelport.testing.pytest_plugin\n"
        "print(time.perf_counter() - start, *{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *modules = done.stdout.split()
    assert not {"torch", "transformers", "pydantic", "pluggy", "numpy"} & set(modules)
    assert float(seconds) < 0.2  # a few milliseconds; a busy machine gets room
