"""The demo's own decisions: which data, which command, and what a failing one ends with. `make demo` runs the rest."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from pipeline.errors import DaaeError, UsageError
from tests.images import make_folder
from tools import demo
from tools.children import PassOn
from tools.commands import Commands, Parts


def commands(out: Path) -> Commands:
    return Commands(out, PassOn(), "the demo")


def test_emoji_is_the_default_and_tests_on_two_styles_that_nothing_trains_on():
    name, source, parts = demo.source_of(demo.Demo().data)
    assert (name, source) == ("emoji", None)
    assert parts == Parts("train", ("fluent", "emojione"), "subcategory")


def test_a_wrong_name_is_one_sentence_with_the_nearest():
    with pytest.raises(UsageError, match=r"emojy is neither a folder nor one of .* Did you mean emoji\?"):
        demo.source_of("emojy")


def test_a_folder_of_ones_own_becomes_one_store_and_a_store_stays_one(tmp_path, capfd):
    make_folder(tmp_path / "my images", 12, 32)
    one = commands(tmp_path / "out")
    name, source, parts = demo.source_of(str(tmp_path / "my images"))
    assert source is not None
    store, tests = one.stores(name, source, parts)
    assert (store, tests) == (tmp_path / "out" / "stores" / "my images", [])
    assert (store / "manifest.json").is_file()
    said = capfd.readouterr().out
    assert f"$ daae convert '{source}' '{store}'\n" in said
    assert said.index("$ daae convert") < said.index("Converted 12 images")
    assert one.stores(store.name, store, Parts("")) == (store, [])
    assert "$" not in capfd.readouterr().out


def test_without_npm_the_demo_ends_with_code_5_and_another_way(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing here"))
    with pytest.raises(DaaeError) as raised:
        commands(tmp_path).call("fetch", "emoji", str(tmp_path / "emoji"))
    assert raised.value.code == 5
    assert "`daae fetch` ended with exit code 5" in str(raised.value)
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "npm" in said
    assert "make demo DATA=synthetic" in said


def test_a_second_run_does_not_profile_again(tmp_path, monkeypatch):
    called = []

    def call(self, *words):
        called.append(words[0])
        if "--html" in words:
            Path(words[words.index("--html") + 1]).write_text("bars")

    monkeypatch.setattr(Commands, "call", call)
    out = tmp_path / "not there yet"
    for _ in range(2):
        assert demo.tour(demo.Demo(out=out), commands(out)) == out / "compare-emoji-90s"
    first = ["doctor", "fetch", "convert", "convert", "convert", "profile", "compare", "report"]
    assert called == first + [name for name in first if name != "profile"]


def test_after_a_signal_no_command_starts(tmp_path, capfd):
    one = commands(tmp_path)
    one.stop.name = signal.Signals.SIGINT.name
    with pytest.raises(DaaeError, match="stopped by SIGINT") as raised:
        one.call("doctor")
    assert raised.value.code == 75
    assert capfd.readouterr().out == ""
