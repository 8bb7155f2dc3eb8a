"""Finding, loading, ordering, blocking and isolating plugins, with packages faked as files on sys.path."""

import importlib.metadata
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType

import pytest

from modelport.plugin import (
    Architecture,
    Manifest,
    PluginError,
    PluginRecord,
    Plugins,
    PluginWarning,
    installed_plugins,
    load_plugins,
    parse_options,
)

HEAD = """
from pathlib import Path
from pydantic import BaseModel
from modelport import Architecture, hookimpl
modelport_api = 1
"""


def source(*architectures: str, answer: str = "", replaces: str | None = None) -> str:
    """A plugin module that registers these architectures and, when told so, answers `resolve_checkpoint`."""
    text = f"""{HEAD}
@hookimpl
def register_architectures():
    return [Architecture(name, "json:JSONDecoder", BaseModel, replaces={replaces!r}) for name in {architectures!r}]
"""
    return text + (f"@hookimpl\ndef resolve_checkpoint(model):\n    return Path({answer!r})\n" if answer else "")


class Site:
    """A folder on sys.path that holds the only packages there are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def module(self, name: str, text: str) -> None:
        path = self.folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in path.relative_to(self.folder).parents[:-1]:
            (self.folder / parent / "__init__.py").touch()
        path.write_text(text)
        importlib.invalidate_caches()

    def package(self, distribution: str, version: str, entry_points: str, **modules: str) -> None:
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[modelport.plugins]\n{entry_points}\n")
        for name, text in modules.items():
            self.module(name, text)

    def plugin(self, name: str, text: str, *, distribution: str = "", version: str = "1.0") -> None:
        """A package with one plugin, `name`, in a module `<name>_port`."""
        self.package(distribution or f"{name}-modelport", version, f"{name} = {name}_port", **{f"{name}_port": text})


@pytest.fixture
def site(tmp_path, monkeypatch) -> Site:
    distributions = importlib.metadata.distributions
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: distributions(path=[str(tmp_path)]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("MODELPORT_PLUGINS", raising=False)
    before = set(sys.modules)
    yield Site(tmp_path)
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def status(plugins: Plugins) -> dict[str, str]:
    return {record.name: record.status for record in plugins.records}


def load_with_broken(*args, **kwargs) -> tuple[Plugins, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plugins = load_plugins(*args, **kwargs)
    return plugins, [str(w.message) for w in caught if w.category is PluginWarning]


# --- order -----------------------------------------------------------------------------------------------------------


def test_builtins_load_first_then_third_parties_both_by_name_then_asked_for_ones(site):
    site.plugin("beta", source())
    site.plugin("alpha", source())
    site.module("mine.model", source())
    site.package("modelport", "0.1", "zebra = zebra_mod\naardvark = aard_mod", zebra_mod=source(), aard_mod=source())
    records = load_plugins(["mine.model"]).records
    assert [r.name for r in records] == ["aardvark", "zebra", "alpha", "beta", "mine.model"]
    assert [r.builtin for r in records] == [True, True, False, False, False]
    assert [r.asked for r in records] == [False, False, False, False, True]


def test_a_third_party_answers_before_a_builtin_and_an_asked_for_plugin_before_both(site):
    site.package("modelport", "0.1", "zebra = zebra_mod", zebra_mod=source(answer="builtin"))
    assert load_plugins().hook.resolve_checkpoint(model="m", revision=None) == Path("builtin")
    site.plugin("alpha", source(answer="vendor"))
    assert load_plugins().hook.resolve_checkpoint(model="m", revision=None) == Path("vendor")
    site.module("mine", source(answer="mine"))
    assert load_plugins(["mine"]).hook.resolve_checkpoint(model="m", revision=None) == Path("mine")


def test_a_record_tells_where_a_plugin_came_from_and_what_it_provides(site):
    site.plugin("acme", source("AcmeForCausalLM", "AcmeMoEForCausalLM"), distribution="Acme.modelport", version="2.5")
    (record,) = load_plugins().records
    assert record == PluginRecord(
        name="acme",
        module="acme_port",
        distribution="Acme.modelport",
        version="2.5",
        api=1,
        status="loaded",
        provides=("AcmeForCausalLM", "AcmeMoEForCausalLM"),
        hooks=("register_architectures",),
    )


def test_loading_twice_gives_the_same_and_leaves_nothing_behind(site):
    site.plugin("acme", source("AcmeForCausalLM"))
    first = load_plugins()
    blocked = load_plugins(blocked=["acme"])
    again = load_plugins()
    assert first.records == again.records
    assert again.find(["AcmeForCausalLM"]).name == "AcmeForCausalLM"
    assert blocked.architectures == {}


def test_of_two_copies_of_one_distribution_the_first_on_the_path_counts(site, tmp_path, monkeypatch):
    later = Site(tmp_path / "later")
    later.folder.mkdir()
    site.plugin("acme", source("NewForCausalLM"), version="2.0")
    later.plugin("acme", source("OldForCausalLM"), version="1.0")
    distributions = importlib.metadata.Distribution.discover
    monkeypatch.setattr(
        importlib.metadata, "distributions", lambda: distributions(path=[str(site.folder), str(later.folder)])
    )
    assert [(r.version, r.provides) for r in load_plugins().records] == [("2.0", ("NewForCausalLM",))]


# --- asked for -------------------------------------------------------------------------------------------------------


def test_an_asked_for_module_that_is_also_installed_loads_once_under_its_own_name(site):
    site.plugin("acme", source("AcmeForCausalLM"))
    (record,) = load_plugins(["acme_port", "acme_port"]).records
    assert (record.name, record.status, record.asked) == ("acme", "loaded", True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([ModuleType("thing")], "not the object .*worker processes must be able to import it again"),
        ([Architecture], "not the object"),
        (["__main__"], "running script, which worker processes cannot import again"),
        (["no:llama"], r"write blocked_plugins=\['llama'\]"),
        (["pkg.mod:attr"], "not 'pkg.mod:attr'"),
        (["plugins/my.py"], "not 'plugins/my.py'"),
        (["../x"], r"not '\.\./x'"),
        ([".sibling"], "not '.sibling'"),
        ([""], "not ''"),
        ("my_pkg", r"write plugins=\['my_pkg'\]"),
    ],
)
def test_what_a_worker_could_not_import_again_is_refused(site, given, message):
    with pytest.raises(PluginError, match=message):
        load_plugins(given)


def test_an_asked_for_module_that_does_not_exist_is_an_error_at_once(site):
    with pytest.raises(PluginError, match=r"no module 'nowhere\.model'; install the package that has it"):
        load_plugins(["nowhere.model"])


def test_an_asked_for_plugin_that_is_broken_is_an_error_with_the_cause_attached(site):
    site.module("mine", HEAD + "import nothing_of_that_name")
    with pytest.raises(PluginError, match=r"'mine' is broken: ModuleNotFoundError: .*nothing_of_that_name") as caught:
        load_plugins(["mine"])
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


# --- block -----------------------------------------------------------------------------------------------------------


def test_the_option_grammar():
    assert parse_options(["a.b", "no:llama,c, no:gpt2 ", ""]) == (("a.b", "c"), ("llama", "gpt2"))


def test_a_blocked_plugin_is_listed_and_not_imported(site):
    site.plugin("acme", "raise RuntimeError('imported')")
    plugins = load_plugins(blocked=["acme"])
    assert status(plugins) == {"acme": "blocked"}
    assert "acme_port" not in sys.modules


def test_the_environment_blocks_and_loads(site, monkeypatch):
    site.plugin("acme", source("AcmeForCausalLM"))
    site.module("mine", source("MineForCausalLM"))
    monkeypatch.setenv("MODELPORT_PLUGINS", "no:acme, mine")
    assert status(load_plugins()) == {"acme": "blocked", "mine": "loaded"}
    assert {r.name: r.status for r in installed_plugins()} == {"acme": "blocked", "mine": "installed"}


@pytest.mark.parametrize("function", [load_plugins, installed_plugins])
def test_blocking_an_unknown_name_is_an_error_with_close_matches(site, function):
    site.plugin("llama", source())
    with pytest.raises(PluginError, match=r"plugin 'lama': .* did you mean 'llama'"):
        function(blocked=["lama"])
    with pytest.raises(PluginError, match=r"plugin 'xyz': .*`modelport plugins` lists all names"):
        function(blocked=["xyz"])


def test_the_environment_is_checked_as_the_arguments_are(site, monkeypatch):
    site.plugin("llama", source())
    monkeypatch.setenv("MODELPORT_PLUGINS", "no:lama")
    with pytest.raises(PluginError, match="did you mean 'llama'"):
        load_plugins()
    monkeypatch.setenv("MODELPORT_PLUGINS", "__main__")
    with pytest.raises(PluginError, match="running script"):
        load_plugins()


def test_asking_for_a_plugin_and_blocking_it_is_an_error(site):
    site.plugin("acme", source())
    with pytest.raises(PluginError, match=r"'acme' .* both asked for and blocked"):
        load_plugins(["acme_port"], blocked=["acme"])


# --- isolate ---------------------------------------------------------------------------------------------------------

BROKEN = {
    "raises": (HEAD + "raise RuntimeError('no luck\\nsecond line')", "RuntimeError: no luck"),
    "exits": (HEAD + "import sys; sys.exit(3)", "SystemExit: 3"),
    "syntax": (HEAD + "def (:", "SyntaxError: invalid syntax"),
    "import": (HEAD + "import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    "misspelt": (
        source() + "@hookimpl\ndef register_architecture(): return []",
        "there is no hook 'register_architecture'; did you mean register_architectures?",
    ),
    "specname": (
        source() + "@hookimpl(specname='read_confg')\ndef anything(): return []",
        "there is no hook 'read_confg'; did you mean read_config?",
    ),
    "argument": (source() + "@hookimpl\ndef read_config(checkpint): return None", "{'checkpint'} are declared"),
    "undecorated": (
        source() + "def read_config(checkpoint): return None",
        "the function read_config is named as a hook; put @hookimpl above it, or rename it",
    ),
    "no_api": (source().replace("modelport_api", "other"), "add `modelport_api = 1` to bad_port"),
    "text_api": (source().replace("api = 1", "api = '1'"), "`modelport_api = '1'`; write an integer"),
    "true_api": (source().replace("modelport_api = 1", "modelport_api = True"), "write an integer"),
    "newer_api": (
        source().replace("modelport_api = 1", "modelport_api = 2"),
        "written for plugin API 2, .* has API 1; install a version of bad-modelport for API 1, or upgrade modelport",
    ),
    "older_api": (source().replace("modelport_api = 1", "modelport_api = 0"), "plugin API 0.* use an older modelport"),
    "newer_api_and_a_name_that_is_gone": (
        source().replace("modelport_api = 1", "modelport_api = 2") + "\nfrom modelport import SomethingNew",
        "written for plugin API 2",
    ),
    "hook_raises": (HEAD + "@hookimpl\ndef register_architectures(): raise KeyError('x')", "KeyError: 'x'"),
    "hook_returns_nonsense": (
        HEAD + "@hookimpl\ndef register_architectures(): return ['AcmeForCausalLM']",
        "returned 'AcmeForCausalLM', which is no Architecture",
    ),
    "hook_repeats": (source("AForCausalLM", "AForCausalLM"), "returned AForCausalLM twice"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_left_out_with_its_reason_and_stops_nothing_else(site, case):
    text, reason = BROKEN[case]
    site.plugin("bad", text, version="0.3")
    site.plugin("good", source("GoodForCausalLM", answer="good"))
    plugins, messages = load_with_broken()
    assert status(plugins) == {"bad": "broken", "good": "loaded"}
    bad = plugins.records[0]
    assert "\n" not in bad.reason
    assert reason in bad.reason or re.search(reason, bad.reason)
    assert bad.traceback.startswith("Traceback")
    assert len(messages) == 1
    assert "'bad' (bad-modelport 0.3) is broken: " + bad.reason in messages[0]
    assert plugins.find(["GoodForCausalLM"]).name == "GoodForCausalLM"
    assert plugins.hook.resolve_checkpoint(model="m", revision=None) == Path("good")
    assert len(plugins.hook.register_architectures()) == 1, "nothing of the broken plugin stays registered"
    assert not hasattr(plugins.hook, "register_architecture")
    with pytest.raises(PluginError, match="'bad'"):
        load_plugins(["bad_port"])


def test_ctrl_c_during_an_import_is_not_swallowed(site):
    site.plugin("bad", HEAD + "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_plugins()


def test_a_function_imported_from_elsewhere_may_be_named_as_a_hook(site):
    site.module("helper", "def read_config(checkpoint): return None")
    site.plugin("good", source("GoodForCausalLM") + "from helper import read_config")
    assert status(load_plugins()) == {"good": "loaded"}


def test_an_optional_hook_of_a_later_release_is_no_error(site):
    site.plugin("good", source() + "@hookimpl(optionalhook=True)\ndef hook_of_tomorrow(): return None")
    assert status(load_plugins()) == {"good": "loaded"}


def test_metadata_that_cannot_be_read_breaks_its_package_only(site):
    site.package("bad-modelport", "1.0", "this line is no assignment")
    site.package("odd-modelport", "1.0", "odd = odd_port:object", odd_port=source())
    site.plugin("good", source())
    plugins, messages = load_with_broken()
    assert status(plugins) == {"bad-modelport": "broken", "odd": "broken", "good": "loaded"}
    assert "entry_points.txt of bad-modelport cannot be read" in messages[0]
    assert "must name a module (package.module), not 'odd_port:object'" in messages[1]


def test_of_two_plugins_of_one_name_the_second_is_broken_and_the_builtin_is_never_hidden(site):
    site.package("modelport", "0.1", "llama = llama_mod", llama_mod=source("LlamaForCausalLM"))
    site.plugin("llama", source("OtherForCausalLM"), distribution="acme-llama")
    plugins, messages = load_with_broken()
    assert [(r.builtin, r.status) for r in plugins.records] == [(True, "loaded"), (False, "broken")]
    assert "name is taken by the plugin of modelport 0.1" in messages[0]


def test_one_module_under_two_names_is_loaded_once(site):
    site.package("acme", "1.0", "a = acme_port\nb = acme_port", acme_port=source("AcmeForCausalLM"))
    plugins, messages = load_with_broken()
    assert status(plugins) == {"a": "loaded", "b": "broken"}
    assert "already the plugin 'a' (acme 1.0)" in messages[0]


# --- conflicts -------------------------------------------------------------------------------------------------------


def test_two_providers_are_an_error_that_names_both_when_the_architecture_is_wanted(site):
    site.package("modelport", "0.1", "llama = llama_mod", llama_mod=source("LlamaForCausalLM", "OnlyForCausalLM"))
    site.plugin("acme", source("LlamaForCausalLM", "AcmeForCausalLM"), version="0.3")
    plugins = load_plugins()
    with pytest.raises(PluginError) as caught:
        plugins.find(["LlamaForCausalLM"])
    message = str(caught.value)
    for part in (
        "LlamaForCausalLM is provided by 'llama' (modelport 0.1) and by 'acme' (acme-modelport 0.3)",
        "-p no:llama or -p no:acme",
        "replaces='llama' in the Architecture of 'acme'",
    ):
        assert part in message
    assert plugins.find(["AcmeForCausalLM"])
    assert plugins.find(["OnlyForCausalLM"])
    assert status(plugins) == {"llama": "loaded", "acme": "loaded"}
    assert [r.reason for r in plugins.records] == [message, message]


def test_blocking_one_of_two_providers_settles_it(site):
    site.package("modelport", "0.1", "llama = llama_mod", llama_mod=source("LlamaForCausalLM"))
    site.plugin("acme", source("LlamaForCausalLM"))
    for hidden in ("llama", "acme"):
        plugins = load_plugins(blocked=[hidden])
        assert plugins.find(["LlamaForCausalLM"])
        assert not any(record.reason for record in plugins.records)


def test_replaces_wins_over_the_plugin_it_names_and_only_over_that_one(site):
    site.package("modelport", "0.1", "llama = llama_mod", llama_mod=source("LlamaForCausalLM"))
    site.plugin("acme", source("LlamaForCausalLM", replaces="llama"))
    assert load_plugins().find(["LlamaForCausalLM"]).replaces == "llama"
    site.plugin("zeta", source("LlamaForCausalLM"))
    with pytest.raises(PluginError, match=r"provided by 'acme' .* and by 'zeta'"):
        load_plugins().find(["LlamaForCausalLM"])


def test_replacing_each_other_or_oneself_settles_nothing(site):
    site.plugin("a", source("XForCausalLM", replaces="b"))
    site.plugin("b", source("XForCausalLM", replaces="a"))
    with pytest.raises(PluginError, match=r"provided by 'a' .* and by 'b'"):
        load_plugins().find(["XForCausalLM"])
    site.plugin("c", source("YForCausalLM", replaces="c"))
    assert load_plugins().find(["YForCausalLM"])
    site.plugin("d", source("YForCausalLM"))
    with pytest.raises(PluginError, match=r"provided by 'c' .* and by 'd'"):
        load_plugins().find(["YForCausalLM"])


def test_an_asked_for_plugin_in_a_conflict_is_an_error_at_once(site):
    site.plugin("acme", source("LlamaForCausalLM"))
    site.module("mine", source("LlamaForCausalLM"))
    with pytest.raises(PluginError, match=r"provided by 'acme' \(acme-modelport 1\.0\) and by 'mine'"):
        load_plugins(["mine"])


def test_an_asked_for_plugin_is_not_blamed_for_a_conflict_of_others(site):
    site.plugin("a", source("XForCausalLM"))
    site.plugin("b", source("XForCausalLM"))
    site.module("mine", source("MineForCausalLM"))
    assert load_plugins(["mine"]).find(["MineForCausalLM"])


# --- find ------------------------------------------------------------------------------------------------------------


def test_the_first_name_that_is_provided_wins(site):
    site.plugin("acme", source("AForCausalLM", "BForCausalLM"))
    assert load_plugins().find(["ZForCausalLM", "BForCausalLM", "AForCausalLM"]).name == "BForCausalLM"


def test_an_unknown_architecture_lists_near_names_broken_and_blocked_plugins_and_how_to_install_one(site):
    site.plugin("bad", HEAD + "raise RuntimeError('no luck\\nsecond line')", version="0.3")
    site.plugin("hidden", source("HiddenForCausalLM"))
    site.plugin("llama", source("LlamaForCausalLM"))
    plugins, _ = load_with_broken(blocked=["hidden"])
    with pytest.raises(PluginError) as caught:
        plugins.find(["LLaMAForCasualLM"])
    message = str(caught.value)
    for part in (
        "no plugin provides the architecture 'LLaMAForCasualLM'",
        "near names: LlamaForCausalLM",
        "broken plugin 'bad' (bad-modelport 0.3): RuntimeError: no luck\n",
        "blocked plugins: hidden",
        "pip install <vendor>-modelport",
        'plugins=["your_package.your_module"]',
    ):
        assert part in message
    assert "second line" not in message


def test_no_name_at_all_is_said_so(site):
    with pytest.raises(PluginError, match=r"config\.json names no architecture"):
        load_plugins().find([])


def test_model_class_imports_a_string_when_asked(site):
    site.module("heavy.model", "class Model: pass")
    architecture = Architecture("XForCausalLM", "heavy.model:Model", dict)
    assert "heavy.model" not in sys.modules
    assert architecture.model_class() is sys.modules["heavy.model"].Model
    assert Architecture("XForCausalLM", Site, dict).model_class() is Site
    with pytest.raises(PluginError, match=r"'package.module:Class'"):
        Architecture("XForCausalLM", "heavy.model", dict).model_class()
    with pytest.raises(PluginError, match=r"'heavy\.model' has no 'Other'"):
        Architecture("XForCausalLM", "heavy.model:Other", dict).model_class()


def test_the_manifest_names_what_was_loaded_and_what_was_blocked(site):
    site.plugin("acme", source(), version="2.0")
    site.plugin("hidden", source())
    site.module("mine", source())
    manifest = load_plugins(["mine"], ["hidden"]).manifest()
    assert manifest == Manifest((("acme", "acme_port", "2.0"), ("mine", "mine", None)), ("hidden",), 1)


# --- the listing that imports nothing --------------------------------------------------------------------------------


def test_the_listing_runs_no_code_of_any_plugin_nor_of_the_packages_around_it(site):
    site.package("acme", "1.0", "acme = acme_pkg.sub.port")
    site.module("acme_pkg.sub.port", "raise RuntimeError\nmodelport_api: int = 1")
    (site.folder / "acme_pkg" / "__init__.py").write_text("raise RuntimeError")
    (record,) = installed_plugins()
    assert record == PluginRecord("acme", "acme_pkg.sub.port", "acme", "1.0", api=1, status="installed")
    assert not any(name.startswith("acme_pkg") for name in sys.modules)


@pytest.mark.parametrize(
    ("text", "state", "reason"),
    [
        (source(), "installed", ""),
        ("from elsewhere import modelport_api", "installed", ""),
        ("from elsewhere import *", "installed", ""),
        ("modelport_api = 1 + 0", "installed", ""),
        ("def (:", "broken", "SyntaxError: invalid syntax"),
        ("x = 1", "broken", "add `modelport_api = 1` to acme_port"),
        ("modelport_api = 7", "broken", "plugin API 7"),
        ("modelport_api = '1'", "broken", "write an integer"),
        ("\0", "broken", "null bytes"),
        ("# coding: klingon", "broken", "klingon"),
    ],
)
def test_what_the_listing_can_tell_from_the_source(site, text, state, reason):
    site.plugin("acme", text)
    (record,) = installed_plugins()
    assert record.status == state
    assert reason in record.reason
    assert bool(record.reason) == (state == "broken")
    assert "\n" not in record.reason


def test_the_listing_says_which_modules_are_missing(site):
    site.package("acme", "1.0", "a = gone\nb = gone.deeper\nc = acme_port.not_a_package", acme_port=source())
    assert {r.name: r.reason for r in installed_plugins()} == {
        "a": "there is no module 'gone'; reinstall acme",
        "b": "there is no module 'gone.deeper'; reinstall acme",
        "c": "there is no module 'acme_port.not_a_package'; reinstall acme",
    }


def test_the_listing_finds_modules_in_folders_without_init_as_import_does(site):
    site.package("acme", "1.0", "a = acme_pkg.sub.port\nb = acme_pkg.sub")
    site.module("acme_pkg.sub.port", source())
    (site.folder / "acme_pkg" / "sub" / "__init__.py").unlink()
    assert [r.status for r in installed_plugins()] == ["installed", "broken"]
    (site.folder / "acme_pkg" / "__init__.py").unlink()
    assert [r.status for r in installed_plugins()] == ["installed", "broken"]


def test_the_listing_takes_a_tenth_of_a_second_for_a_hundred_plugins(site):
    for i in range(100):
        module = f"acme_pkg{i}.port"
        site.package(f"acme{i}", "1.0", f"acme{i} = {module}", **{module: source("AcmeForCausalLM")})
    seconds = []
    for _ in range(5):
        start = time.process_time()  # the processor's time: other tests may run beside this one
        records = installed_plugins()
        seconds.append(time.process_time() - start)
    assert [r.status for r in records] == ["installed"] * 100
    assert min(seconds) < 0.1


def test_the_real_listing_names_the_builtins_and_imports_neither_them_nor_torch():
    code = """
import sys
from modelport.discovery import installed_plugins
for record in installed_plugins():
    if record.builtin:
        print(record.name, record.status)
        assert record.module not in sys.modules
assert not {"torch", "transformers", "pydantic", "pluggy"} & set(sys.modules)
"""
    env = {k: v for k, v in os.environ.items() if k != "MODELPORT_PLUGINS"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stderr
    assert "llama installed" in run.stdout.splitlines()
