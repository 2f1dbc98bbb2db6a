"""The report of runs written by hand: what it answers, what it admits, and that it stands alone."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from pipeline.errors import UsageError
from tests.study_folders import of_lengths, write_run
from tools import report
from tools.comparing.doubts import warnings
from tools.comparing.records import Cell, Group, Study, read_study
from tools.comparing.scores import Score, baseline_score, margins
from tools.comparing.verdict import verdict
from train.journal import earlier_environments

MAE = ((50, 0.28), (100, 0.31), (200, 0.34))
DAAE = ((50, 0.31), (100, 0.34), (200, 0.37))
VOID = ("meta", "img", "path", "use", "br")


class Page(HTMLParser):
    """Text, addresses and balance of an HTML file."""

    def __init__(self, html: str):
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "srcset", "poster", "data"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def page_of(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> tuple[Page, dict, str]:
    """Run the command; the page, what --json said, and the raw file."""
    out = folders[0].parent / "page.html"
    assert report.main([*map(str, folders), "--out", str(out), "--json"]) == 0
    html = out.read_text(encoding="utf-8")
    return Page(html), json.loads(capsys.readouterr().out), html


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "mae", curve=MAE),
        write_run(tmp_path / "daae", preset="daae-tiny", rate=480.0, curve=DAAE),
    ]


def test_one_seed_gives_a_ratio_and_refuses_an_interval(pair, capsys):
    page, said, _ = page_of(pair, capsys)
    assert said["verdict"] == (
        "After 200 s of training each, daae-tiny scores 37.0 ± 1.0 % and mae-tiny 34.0 ± 1.0 % (+3.0 points); "
        "daae-tiny reaches mae-tiny's final score of 34.0 ± 1.0 % 2.00 times as fast, from one seed and without an "
        "interval."
    )
    assert said["tone"] == "open"
    first, second = said["verdict"].split("; ")
    assert f"{first}.{second}" in page.text  # a line each
    assert "One seed cannot tell a gain from chance" in page.text
    assert page.text.index(second) < page.text.index("Scores at the end")
    # 640 against 480 images/s: an epoch costs 4/3, so 2x as fast is 8/3 fewer epochs.
    assert "2.67x epochs factor" in page.text.replace("2.67xepochs", "2.67x epochs")
    assert "0.75x" in page.text


def test_three_seeds_give_an_interval(tmp_path, capsys):
    folders = []
    for seed, shift in enumerate((0.0, 0.004, -0.003)):
        folders.append(write_run(tmp_path / f"mae{seed}", seed=seed, curve=MAE))
        curve = [(at, value + shift) for at, value in DAAE]
        folders.append(write_run(tmp_path / f"daae{seed}", preset="daae-tiny", seed=seed, rate=480.0, curve=curve))
    page, said, html = page_of(folders, capsys)
    found = re.search(
        r"([\d.]+) times as fast \(95 % interval ([\d.]+) to ([\d.]+); 2.05 or more in (\d) of 3 seeds\)",
        said["verdict"],
    )
    assert found is not None
    mean, low, high = map(float, found.groups()[:3])
    assert 1 < low < mean < high
    assert said["tone"] == ("good" if low > 1.5 and mean >= 2.05 else "open" if high >= 2.05 else "bad")
    scores = html[html.index("Score against") : html.index("What the speed")]
    marks = [chunk for chunk in scores.split("<g ") if "line2d" in chunk and "stroke: #" in chunk]
    assert sum("stroke-width: 2" in mark for mark in marks) == 6  # a line for each run
    assert len(page.ids) == len(set(page.ids))


def test_the_page_stands_alone(pair, capsys):
    page, said, html = page_of(pair, capsys)
    assert all(address.startswith(("#", "data:image/")) for address in page.addresses)
    assert len([address for address in page.addresses if address.startswith("data:")]) == 2
    assert not re.search(r"https?://|@import|//[a-z]+\.", html)
    assert all(target in page.ids for target in re.findall(r"url\(#([^)]+)\)", html))
    assert all(address[1:] in page.ids for address in page.addresses if address.startswith("#"))
    assert "script" not in page.tags
    assert said["bytes"] == len(html.encode()) < 3e6


def test_the_seconds_of_each_arm_are_laid_out(pair, capsys):
    _, _, page = page_of(pair, capsys)
    part = page[page.index("Where the seconds went") :]
    part = part[: part.index("</section>")]
    # 640 and 480 images a second are 1.56 and 2.08 ms an image, three fifths of them backward.
    assert "<td class=n>0.94</td><td class=n>0.11</td><td class=n>1.56</td>" in part
    assert "<td class=n>1.25</td><td class=n>0.15</td><td class=n>2.08</td>" in part
    assert re.findall(r'width:([\d.]+)%;background:#\w+" title="backward', part) == ["45.00", "60.00"]
    assert "evaluation:" not in part  # off the clock
    assert "<td class=n>5.0</td><td class=n>7.0</td><td class=n>–</td><td class=n>31%</td><td class=n>1.5</td>" in part


@pytest.mark.parametrize(
    ("others", "title"),
    [
        ("daae can", "daae-tiny and can-tiny against mae-tiny"),
        ("daae can byol", "daae-tiny, can-tiny and byol-tiny against mae-tiny"),
        ("daae can byol simclr", "4 arms against mae-tiny"),
    ],
)
def test_many_arms_are_a_number_in_the_title(tmp_path, others, title):
    folders = [write_run(tmp_path / arm, preset=f"{arm}-tiny") for arm in ["mae", *others.split()]]
    page = tmp_path / "page.html"
    assert report.main([*map(str, folders), "--html", str(page)]) == 0
    assert f"<h1>{title}</h1>" in page.read_text()


def test_large_pictures_still_fit(tmp_path, capsys):
    folders = [
        write_run(tmp_path / f"run{seed}", preset=preset, seed=seed, gallery=(1830, 1144))
        for seed, preset in enumerate(("mae-tiny", "daae-tiny", "contrast-tiny"))
    ]
    page, said, _ = page_of(folders, capsys)  # noise: nine megabytes of PNG
    assert said["bytes"] < 3e6
    assert sum(address.startswith("data:image/jpeg") for address in page.addresses) == 3


def test_the_slides_stand_apart_and_are_named_theirs(pair, capsys):
    _, _, html = page_of(pair, capsys)
    slides = html[html.index('<aside class="slides">') : html.index("</aside>")]
    assert "theirs, not measured here" in slides
    for number in ("83.3", "83.5", "42.5", "42.8", "44.8", "2.05x", "1.08x", "1.45x"):
        assert number in slides
    elsewhere = Page(html.replace(slides + "</aside>", "")).text
    for number in ("83.3", "83.5", "42.5", "42.8", "44.8"):
        assert number not in elsewhere


def test_scores_stand_beside_their_baselines(pair, capsys):
    page, _, _ = page_of(pair, capsys)
    assert "raw 32 px pixels22.01.0" in page.text
    assert "untrained encoder24.01.0" in page.text
    assert "+12.0+10.0" in page.text  # MAE above pixels and above untrained


def test_a_baseline_that_arms_share_counts_once_a_seed(tmp_path):
    """Pixels have no spread between seeds, the untrained encoder has one; both keep the test set's error."""
    untrained = {0: 0.24, 1: 0.26}
    folders = [
        write_run(tmp_path / f"{preset}-{seed}", preset=preset, seed=seed, baselines=(0.22, value))
        for seed, value in untrained.items()
        for preset in ("mae-tiny", "daae-tiny")
    ]
    trials = read_study(folders).trials
    assert baseline_score(trials, "pixels") == Score(0.22, None, 0.01, 2)
    score = baseline_score(trials, "untrained")
    assert score is not None
    assert score.spread is not None
    assert (score.seeds, round(score.mean, 9), score.error) == (2, 0.25, 0.01)
    assert round(score.spread, 9) == round(0.02 / 2**0.5, 9)
    first = baseline_score(read_study(folders[:2]).trials, "untrained")
    assert first is not None
    assert first.words() == "24.0 ± 1.0"


def test_a_weak_run_is_called_too_short_or_broken(tmp_path, capsys):
    weak = ((50, 0.23), (100, 0.24), (200, 0.26))
    folders = [
        write_run(tmp_path / "mae", curve=MAE),
        write_run(tmp_path / "daae", preset="daae-tiny", curve=weak),
    ]
    page, said, _ = page_of(folders, capsys)
    assert said["tone"] == "bad"
    assert said["meaning"].startswith("The run is too short or broken: daae-tiny does not beat raw pixels and")
    assert any("daae-tiny" in line and "too short or broken" in line for line in said["warnings"])
    assert not any("mae-tiny is only" in line and not line.startswith("daae") for line in said["warnings"])
    assert "Before you believe it" in page.text


def test_five_points_do_not_do_without_three_errors(tmp_path, capsys):
    folders = [write_run(tmp_path / "mae", curve=MAE, error=0.05)]
    _, said, _ = page_of(folders, capsys)
    assert said["tone"] == "bad"  # 12 and 10 points, but 2.4 and 2.0 standard errors


def test_a_target_never_reached_is_shown_as_such(tmp_path, capsys):
    folders = [
        write_run(tmp_path / "mae", curve=DAAE),
        write_run(tmp_path / "daae", preset="daae-tiny", rate=480.0, curve=MAE),
    ]
    page, said, _ = page_of(folders, capsys)
    assert (
        "daae-tiny reaches mae-tiny's final score of 37.0 ± 1.0 % at most 1.00 times as fast, from one seed and "
        "without an interval, since daae-tiny did not get there." in said["verdict"]
    )
    assert "not reached in 200 s" in page.text
    assert "≤ 1.00x" in page.text


def raced(folder: Path, ratios: Sequence[float], **settings) -> list[Path]:
    """A pair of runs of each ratio: MAE is at 34 % after its 200 s, DAAE after 200 s over the ratio."""
    found = []
    for seed, ratio in enumerate(ratios):
        at = 200 / ratio
        found.append(write_run(folder / f"mae{seed}", seed=seed, curve=MAE, gallery=None))
        curve = ((at / 2, 0.32), (at, 0.34), (400.0, 0.36))
        found.append(
            write_run(
                folder / f"daae{seed}",
                preset="daae-tiny",
                seed=seed,
                seconds=400.0,
                curve=curve,
                gallery=None,
                **settings,
            )
        )
    return found


@pytest.mark.parametrize(
    ("ratios", "tone", "meaning"),
    [
        (
            (2.2, 2.4, 2.3),
            "good",
            "The claim of 2.05x holds on these images and at this size, by the rule set beforehand: the ratio is 2.05 "
            "or more and its interval stays above 1.5.",
        ),
        ((2.0, 2.1, 2.2), "good", "stays above 1.5; true ratios down to 1.86 are not excluded."),
        (
            (1.2, 1.3, 1.4),
            "bad",
            "daae-tiny is faster than mae-tiny beyond chance. The claim of 2.05x does not hold on these images and at "
            "this size: it lies above the interval.",
        ),
        ((0.7, 0.75, 0.72), "bad", "daae-tiny is slower than mae-tiny beyond chance. The claim of 2.05x does not hold"),
        ((0.9, 1.0, 1.1), "bad", "The difference in speed could be chance. The claim of 2.05x does not hold"),
        ((1.5, 2.5, 3.5), "open", "The difference in speed could be chance. Whether 2.05x holds on these images and"),
        (
            (1.7, 2.0, 2.2),
            "open",
            "daae-tiny is faster than mae-tiny beyond chance. Whether 2.05x holds on these images and at this size is "
            "open: the rule asks for 2.05 or more and an interval above 1.5, and found is 1.96 (1.41 to 2.70).",
        ),
        ((2.3,), "open", "One seed cannot tell a gain from chance, nor whether 2.05x is real"),
    ],
)
def test_the_claim_is_answered_by_the_rule_set_beforehand(tmp_path, ratios, tone, meaning):
    found = verdict(read_study(raced(tmp_path, ratios)))
    assert (found.tone, meaning in found.meaning) == (tone, True), found


def test_arms_that_are_there_at_once_or_never_leave_one_end(tmp_path):
    early, never = tmp_path / "early", tmp_path / "never"
    folders = []
    for seed in range(3):
        folders.append(write_run(early / f"mae{seed}", seed=seed, curve=MAE, gallery=None))
        curve = ((40 + seed, 0.35), (200, 0.37))
        folders.append(write_run(early / f"d{seed}", preset="daae-tiny", seed=seed, curve=curve, gallery=None))
    found = verdict(read_study(folders))
    assert (
        "at least 4.88 times as fast (95 % interval from 4.59; 2.05 or more in 3 of 3 seeds), since daae-tiny was "
        "there at its first score in 3 of 3 seeds"
    ) in found.sentence
    assert found.tone == "good"
    folders = []
    for seed in range(3):
        folders.append(write_run(never / f"mae{seed}", seed=seed, curve=MAE, gallery=None))
        curve = ((50, 0.30), (200, 0.335))
        folders.append(write_run(never / f"d{seed}", preset="daae-tiny", seed=seed, curve=curve, gallery=None))
    found = verdict(read_study(folders))
    assert (
        "at most 1.00 times as fast (95 % interval up to 1.00; 2.05 or more in 0 of 3 seeds), since daae-tiny did not "
        "get there in 3 of 3 seeds"
    ) in found.sentence
    assert found.tone == "bad"


def test_failed_runs_and_missing_baselines_keep_a_claim_open(tmp_path):
    folders = raced(tmp_path / "a", (2.2, 2.4, 2.3))
    how = {"preset": "daae-tiny", "seconds": 400.0, "gallery": None}
    failed = write_run(tmp_path / "a" / "failed", seed=3, state="failed", **how)
    study = read_study([*folders, failed])
    found = verdict(study)
    assert found.tone == "open"
    assert "One run failed: the seeds that are left are no fair draw of all." in found.meaning
    assert any(line.startswith("daae-tiny seed 3 failed: means are over the seeds") for line in warnings(study))
    found = verdict(read_study(raced(tmp_path / "b", (2.2, 2.4, 2.3), baselines=None)))
    assert found.tone == "open"
    assert "An arm was scored without its baselines." in found.meaning


def with_paces(study: Study, seconds_per_step: dict[str, float]) -> Study:
    """The study as if a step of each arm had been measured in turns to take so long."""
    groups = [
        Group(group.arm, [dataclasses.replace(trial, pace=seconds_per_step[group.arm]) for trial in group.trials])
        for group in study.groups
    ]
    return dataclasses.replace(study, groups=groups)


def test_the_rule_is_asked_of_both_clocks(tmp_path):
    """2.30 by the runs' own clock, in which a step of either takes 0.2 s."""
    study = read_study(raced(tmp_path / "wide", (1.6, 2.4, 3.2)))
    assert verdict(study).tone == "open"  # 2.31, but from 0.97
    study = read_study(raced(tmp_path, (2.2, 2.4, 2.3)))
    assert verdict(with_paces(study, {"mae-tiny": 0.2, "daae-tiny": 0.21})).tone == "good"
    slower = verdict(with_paces(study, {"mae-tiny": 0.2, "daae-tiny": 0.26}))
    assert slower.tone == "bad"  # 1.77, up to 1.97
    assert slower.meaning.startswith("daae-tiny is faster than mae-tiny beyond chance. The claim of 2.05x does not ")


def test_only_daae_beside_mae_is_asked_about_the_claim(tmp_path, capsys):
    folders = []
    for folder in raced(tmp_path, (2.2, 2.4, 2.3)):
        config = folder / "config.yaml"
        if folder.name.startswith("daae"):
            config.write_text(config.read_text().replace("objective: daae", "objective: can"))
        folders.append(folder)
    page, said, _ = page_of(folders, capsys)
    assert said["meaning"] == "daae-tiny is faster than mae-tiny beyond chance."
    assert said["tone"] == "good"
    assert "2.05" not in said["verdict"]
    assert "Is the 2x real?" not in page.text


def test_runs_that_were_asked_different_things_do_not_compare(tmp_path):
    folders = raced(tmp_path, (2.2, 2.4, 2.3))
    path = folders[1] / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"leading_name": "knn20 on category, mean of a"}))
    study = read_study(folders)
    said = [line for line in warnings(study) if "asked different things" in line]
    assert said == [
        "The runs were asked different things: knn20 on category, mean of a (1,600 pictures) and "
        "ridge on subcategory, mean of fluent and emojione (1,600 pictures)."
    ]
    assert verdict(study).tone == "open"
    assert "The runs do not compare" in verdict(study).meaning


def test_test_sets_that_disagree_are_said(tmp_path):
    folders = raced(tmp_path, (2.2, 2.4))
    assert not any("test sets disagree" in line for line in warnings(read_study(folders)))
    for folder in folders:
        path = folder / "evaluation.json"
        result = json.loads(path.read_text())
        for test, gap in (("fluent", -0.03), ("emojione", 0.05)) if folder.name.startswith("daae") else ():
            probes = result["scores"][test]["subcategory"]
            probes["ridge"] = {**probes["ridge"], "value": 0.34 + gap + 0.01 * int(folder.name[-1])}
        path.write_text(json.dumps(result))
    (said,) = (line for line in warnings(read_study(folders)) if "test sets disagree" in line)
    assert said == (
        "The test sets disagree: at the end daae-tiny is on fluent 2.5 points behind mae-tiny (-8.9 to +3.9); on "
        "emojione 5.5 points ahead of mae-tiny (-0.9 to +11.9). The score is their mean."
    )


def test_a_baseline_that_met_its_final_score_early_is_said(tmp_path, capsys):
    """MAE is at 34 % half way, in log seconds, between 50 and 100 s, and its run goes on to 200 s."""
    folders = [
        write_run(tmp_path / "mae", curve=((50, 0.30), (100, 0.38), (200, 0.34))),
        write_run(tmp_path / "daae", preset="daae-tiny", curve=((25, 0.30), (50, 0.38), (200, 0.40))),
    ]
    page, said, _ = page_of(folders, capsys)
    assert "2.00 times as fast, from one seed" in said["verdict"]
    assert (
        "mae-tiny itself first scored that after 71 s, and compared with its whole runs daae-tiny is 5.66 (one seed) "
        "times as fast" in said["verdict"]
    )
    assert "5.66one seed" in page.text[page.text.index("whole runs of mae-tiny") :]


def test_times_from_the_middle_of_a_schedule_are_said_to_be_such(pair):
    assert any("scores in the middle of a schedule" in line for line in warnings(read_study(pair)))


def test_arms_beside_the_baseline_are_paired_with_one_another(tmp_path, capsys):
    scores = {"mae": (0.30, 0.31, 0.32), "daae": (0.36, 0.38, 0.37), "contrast": (0.35, 0.36, 0.37)}
    folders = [
        write_run(tmp_path / f"{arm}{seed}", preset=f"{arm}-tiny", seed=seed, curve=((200, value),), gallery=None)
        for arm, values in scores.items()
        for seed, value in enumerate(values)
    ]
    page, _, _ = page_of(folders, capsys)  # differences of 1, 2 and 0 points
    assert "At the end daae-tiny is 1.0 points ahead of contrast-tiny (-1.5 to +3.5); brackets: 95 %" in page.text


def test_no_other_arm_stands_in_for_one_that_failed(tmp_path):
    folders = raced(tmp_path, (2.2,))
    folders[1] = write_run(tmp_path / "failed", preset="daae-tiny", curve=DAAE, state="failed", gallery=None)
    folders.append(write_run(tmp_path / "other", preset="contrast-tiny", curve=DAAE, gallery=None))
    found = verdict(read_study(folders))
    assert "daae-tiny has finished no seed that mae-tiny has" in found.meaning


def test_runs_of_different_code_or_torch_are_said(tmp_path):
    folders = raced(tmp_path, (2.2,))
    env = json.loads((folders[1] / "env.json").read_text())
    (folders[1] / "env.json").write_text(json.dumps({**env, "code": "ffff+changes", "versions": {"torch": "2.11.0"}}))
    said = warnings(read_study(folders))
    assert any("code that differs or was never committed (0123456789ab and ffff+changes)" in line for line in said)
    assert any("different versions of torch (2.11.0 and 2.15.0)" in line for line in said)


def test_a_run_that_moved_is_told(tmp_path):
    folders = raced(tmp_path, (2.2, 2.4, 2.3))
    path = folders[1] / "env.json"
    env = json.loads(path.read_text())
    now = {**env, "code": "ffff", "device": "Another CPU, 2 threads"}
    assert earlier_environments(path, env) == []
    now["before"] = earlier_environments(path, now)
    assert now["before"] == [{name: env[name] for name in ("code", "device", "cores", "versions")}]
    path.write_text(json.dumps(now))
    assert earlier_environments(path, now) == now["before"]
    study = read_study(folders)
    assert any("2 different machines" in line for line in warnings(study))
    assert any("code that differs or was never committed (0123456789ab and ffff)" in line for line in warnings(study))
    assert verdict(study).tone == "open"
    assert earlier_environments(tmp_path / "nothing.json", now) == []


def test_different_seconds_are_said(tmp_path, capsys):
    folders = [
        write_run(tmp_path / "mae", curve=MAE),
        write_run(tmp_path / "daae", preset="daae-tiny", curve=((40, 0.31), (100, 0.35)), seconds=100.0),
    ]
    _, said, _ = page_of(folders, capsys)
    assert "After 100 s and 200 s of training" in said["verdict"]
    assert any("different times" in line for line in said["warnings"])


def test_names_and_settings_are_escaped(tmp_path, capsys):
    bad = '<script>alert("1")</script>&amp;$x^$'
    folders = [
        write_run(tmp_path / "mae", curve=MAE, settings={"preset": bad, "data": "<b>data</b>"}),
        write_run(tmp_path / "daae", preset="daae-tiny", curve=DAAE),
    ]
    page, said, html = page_of(folders, capsys)
    assert bad in said["verdict"]
    assert "script" not in page.tags
    assert "<b>data" not in html
    assert all(part in page.text for part in said["verdict"].split("; "))


def test_one_run_is_enough(tmp_path, capsys):
    page, said, _ = page_of([write_run(tmp_path / "mae", curve=MAE)], capsys)
    beside = "(raw 32 px pixels 22.0 ± 1.0 %; untrained encoder 24.0 ± 1.0 %)"
    assert said["verdict"] == f"mae-tiny scores 34.0 ± 1.0 % {beside} after 200 s of training."
    assert "`daae compare`" in said["meaning"]
    assert "slides" not in page.text


def test_unlabelled_runs_show_loss_speed_and_pictures(tmp_path, capsys):
    folders = [
        write_run(tmp_path / "mae", labelled=False),
        write_run(tmp_path / "daae", preset="daae-tiny", rate=480.0, labelled=False),
    ]
    page, said, _ = page_of(folders, capsys)
    assert (
        said["verdict"]
        == "No verdict on quality: nothing was scored, since the images have no labels or no score was asked for."
    )
    assert any(line.startswith("Scores:") for line in said["missing"])
    assert "Scores at the end" not in page.text
    assert "Losses" in page.text
    assert "0.75x" in page.text  # the pace is known all the same
    assert page.tags.count("img") == 2


def test_missing_baselines_are_missed(tmp_path, capsys):
    folders = [write_run(tmp_path / "mae", curve=MAE, baselines=None)]
    page, said, _ = page_of(folders, capsys)
    assert any("scored without its baselines" in line for line in said["warnings"])
    assert "raw 32 px pixels" not in page.text.replace(said["warnings"][0], "")


def test_an_unfinished_run_is_named_and_does_not_count(tmp_path, capsys):
    folders = [
        write_run(tmp_path / "mae", curve=MAE),
        write_run(tmp_path / "daae", preset="daae-tiny", curve=DAAE, state="preempted"),
    ]
    page, said, _ = page_of(folders, capsys)
    assert said["missing"] == ["daae-tiny seed 0 is not finished: preempted at step 500 of 1,000 (stopped by SIGTERM)."]
    assert "mae-tiny scores 34.0" in said["verdict"]
    assert "37.0" not in page.text
    assert "1 of 2 runs finished" in page.text


def test_nothing_finished_is_no_verdict(tmp_path, capsys):
    _, said, _ = page_of([write_run(tmp_path / "mae", state="running")], capsys)
    assert said["verdict"] == "No verdict yet: the run is not finished."


def test_runs_of_one_preset_with_other_settings_are_other_arms(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1)
    write_run(tmp_path / "c", seed=2, settings={"optim": {"lr": 0.5}})
    study = read_study([tmp_path / name for name in "abc"])
    assert [(group.arm, len(group.trials)) for group in study.groups] == [("mae-tiny", 2), (str(tmp_path / "c"), 1)]


def test_mae_is_the_baseline_whatever_the_order(pair):
    assert read_study(pair[::-1]).base.arm == "mae-tiny"


def test_a_run_without_evaluation_gives_the_last_score_of_its_training(tmp_path):
    folder = write_run(tmp_path / "mae", curve=MAE)
    (folder / "evaluation.json").unlink()
    assert "mae-tiny scores 34.0 % after 200 s" in verdict(read_study([folder])).sentence


def test_torn_files_are_read_as_far_as_they_go(tmp_path, capsys):
    folder = write_run(tmp_path / "mae", curve=MAE)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 99')
    (folder / "media" / "gallery.png").write_bytes(b"\x89PNG torn")
    (folder / "env.json").write_text("{")
    page, said, _ = page_of([folder], capsys)
    assert "mae-tiny scores 34.0" in said["verdict"]
    assert "img" not in page.tags


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "is not a folder"),
        (lambda path: path.mkdir(), "holds no run"),
        (lambda path: path.write_text("x"), "is not a folder"),
    ],
)
def test_no_runs_is_an_error_of_use(tmp_path, make, words):
    path = tmp_path / "runs"
    make(path)
    with pytest.raises(UsageError, match=words):
        report.main([str(path)])
    assert not (tmp_path / "report.html").exists()


def test_no_folder_at_all(capsys):
    with pytest.raises(UsageError, match="which runs"):
        report.main([])


def test_html_that_is_a_folder(pair, tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        report.main([str(pair[0]), "--html", str(tmp_path)])


def test_runs_of_several_lengths_count_at_their_own_ends(tmp_path, capsys):
    """MAE .28 in 50 s, .31 in 100 s, .34 in 200 s; DAAE is at .34 between its runs of 50 s and 100 s."""
    study = read_study([of_lengths(tmp_path, mae=(0.28, 0.31, 0.34), daae=(0.33, 0.35, 0.37))])
    assert [group.arm for group in study.groups] == ["mae", "daae"]
    assert [trial.seconds for trial in study.base.finished] == [200.0, 200.0]
    assert study.missing == []
    assert [curve.scores for curve in study.groups[1].curves()] == [(0.33, 0.35, 0.37), (0.331, 0.351, 0.371)]
    contrast = study.contrasts()["daae"]
    assert [pair.base.seconds.low for pair in contrast.pairs] == [200.0, 200.0]
    # Half way between .33 at 50 s and .35 at 100 s, linear in log seconds: 50 sqrt(2).
    assert [pair.arm.seconds.low for pair in contrast.pairs] == pytest.approx([50 * 2**0.5] * 2)
    assert contrast.ratio is not None
    assert contrast.ratio.mean == pytest.approx(4 / 2**0.5)
    # Both take 0.2 s a step by the clock; measured in turns a step of DAAE takes 1.5 times as long as MAE's.
    assert study.paced_contrasts() == {}
    paces = {"mae": [0.2, 0.1, 0.3], "daae": [0.3, 0.3, 0.9]}
    (tmp_path / "pace.json").write_text(
        json.dumps({arm: {"digest": "", "seconds_per_step": each[0], "measured": each} for arm, each in paces.items()})
    )
    study = read_study([tmp_path])
    paced = study.paced_contrasts()["daae"]
    assert paced.ratio is not None
    assert paced.ratio.mean == pytest.approx(4 / 2**0.5 / 1.5)
    assert paced.epochs is not None
    assert contrast.epochs is not None
    assert paced.epochs.mean == pytest.approx(contrast.epochs.mean)
    assert paced.seconds_per_epoch == pytest.approx(1 / 1.5)
    assert any("2.83 (2.83 to 2.83) times as fast by the clock and 1.89 (1.89" in line for line in warnings(study))
    assert verdict(study).tone == "bad"  # by the lesser of the two
    assert "with steps timed in turns that is 1.89 (1.89 to 1.89)" in verdict(study).sentence
    page, said, _ = page_of([tmp_path], capsys)
    assert "daae reaches mae's final score of 34.1 ± 0.1 % 2.83 times as fast" in said["verdict"]
    assert "each point is a run of its own" in page.text
    assert "mae 50s" in page.text
    assert "mae 200s, the target" in page.text
    assert "target: mae 200s" in page.text  # a level in the picture
    assert "at the end of its own schedule, and a run of each length was trained" in page.text


def test_factors_that_do_not_make_up_the_ratio_are_said(tmp_path):
    """DAAE's longest runs, far behind the target, were made by a machine half as fast."""
    folder = of_lengths(tmp_path, mae=(0.28, 0.31, 0.34), daae=(0.33, 0.35, 0.37))
    assert not any("the machine's speed changed" in line for line in warnings(read_study([folder])))
    for seed in (0, 1):
        slow = folder / "runs" / Cell("daae", seed, 200.0).folder
        shutil.rmtree(slow)
        write_run(slow, preset="daae-tiny", seed=seed, curve=((200, 0.37),), rate=320.0, gallery=None)
    (said,) = (line for line in warnings(read_study([folder])) if "the machine's speed changed" in line)
    assert said == (
        "daae: epochs 2.83 x seconds an epoch of whole runs 0.50 is 1.41, and the ratio by the clock 2.83: the "
        "machine's speed changed in them."
    )


def test_a_baseline_that_falls_again_is_held_at_its_best(tmp_path, capsys):
    """MAE scores .33 after 100 s and less after 200; DAAE is at .33 half way, in log seconds, between 50 and 100 s."""
    study = read_study([of_lengths(tmp_path, mae=(0.28, 0.33, 0.27), daae=(0.31, 0.35, 0.38))])
    contrast = study.contrasts()["daae"]
    assert study.goal == 100
    assert [pair.target for pair in contrast.pairs] == pytest.approx([0.33, 0.331])
    assert [pair.base.seconds.low for pair in contrast.pairs] == [100.0, 100.0]
    assert contrast.ratio is not None
    assert contrast.ratio.mean == pytest.approx(2**0.5)
    assert contrast.difference is not None
    assert contrast.difference.mean == pytest.approx(0.11)  # at the end of the longest, all the same
    assert "mae's best score of 33.1 ± 0.1 % (its runs of 100s) 1.41 times as fast" in verdict(study).sentence
    assert verdict(study).tone != "good"
    # DAAE's first score, after 50 s, is above what MAE's runs of 200 s come to; MAE's own is too.
    assert verdict(study).sentence.endswith(
        "compared with mae's longest runs, as the slides count, daae is at least 4.00 (from 4.00) times as fast to "
        "their 27.1 ± 0.1 %, which flatters it: mae itself first scored that after at most 50 s."
    )
    assert "daae scores 38.0 ± 0.1 % and mae 27.1 ± 0.1 % (+11.0 points" in verdict(study).sentence
    assert "; +5.0 from its best)" in verdict(study).sentence
    page = page_of([tmp_path], capsys)[0].text
    assert "≥ 4.00from 4.00" in page
    assert "mae 100s, the target" in page
    said = warnings(study)
    assert any(line.startswith("mae's longest runs are only +3.1 points from the untrained encoder") for line in said)
    assert any("mae's runs of 200s score less than those of 100s (27.1 ± 0.1 %" in line for line in warnings(study))
    # It counts by the runs that are held against others: 27 % would be too near to the untrained encoder's 24 %.
    assert all(each.enough for each in margins(study, study.base).values())
    late = read_study([of_lengths(tmp_path / "late", mae=(0.28, 0.33, 0.31), daae=(0.29, 0.33, 0.38))])
    # .31 is at log-second shares 0.6 of MAE's first doubling and 0.5 of DAAE's.
    assert (
        "daae is 2.83 (2.83 to 2.83) times as fast to their 31.1 ± 0.1 %, which flatters it: mae itself first scored "
        "that after 76 s (compared with that daae is 1.07 (1.07 to 1.07) times as fast)" in verdict(late).sentence
    )
    rising = read_study([of_lengths(tmp_path / "rising", mae=(0.28, 0.31, 0.34), daae=(0.33, 0.35, 0.37))])
    assert rising.goal == 200
    assert not any("longest runs" in line for line in [*warnings(rising), verdict(rising).sentence])


def test_no_arm_at_its_longest_is_no_verdict_yet(tmp_path, capsys):
    of_lengths(tmp_path, mae=(0.28, 0.31, 0.34), daae=(0.33, 0.35, 0.37))
    for status in (tmp_path / "runs").glob("*200s*/status.json"):
        status.write_text(json.dumps({"state": "failed", "code": 4, "reason": "loss", "step": 5}))
        (status.parent / "evaluation.json").unlink()
    _, said, _ = page_of([tmp_path], capsys)
    assert said["verdict"] == "No verdict yet: no arm has finished its longest runs."


def test_without_a_target_no_times_to_one_are_told(tmp_path, capsys):
    of_lengths(tmp_path, mae=(0.28, 0.31, 0.34), daae=(0.33, 0.35, 0.37))
    path = tmp_path / "experiment.yaml"
    path.write_text(path.read_text().replace("target: baseline", "target: none"))
    contrast = read_study([tmp_path]).contrasts()["daae"]
    assert (contrast.pairs, contrast.ratio, contrast.whole, contrast.epochs) == ((), None, None, None)
    assert contrast.difference is not None
    assert contrast.difference.mean == pytest.approx(0.03)
    page, said, _ = page_of([tmp_path], capsys)
    assert not any("Times to the target" in line for line in said["warnings"])
    assert "epochs factor" not in page.text


def test_steps_are_in_turns_with_those_of_the_same_comparison_alone(tmp_path):
    for name, arms in (("one", {"mae": 0.2, "daae": 0.3}), ("other", {"mae": 0.4, "can": 0.5})):
        folder = of_lengths(tmp_path / name, **dict.fromkeys(arms, (0.3, 0.31, 0.32)))
        paces = {arm: {"digest": "", "seconds_per_step": each, "measured": [each]} for arm, each in arms.items()}
        (folder / "pace.json").write_text(json.dumps(paces))
    assert read_study([tmp_path / "one"]).paced_contrasts()
    assert read_study([tmp_path / "one", tmp_path / "other"]).paced_contrasts() == {}
    # An arm that later calls left out was measured at the first moment alone: no other moment counts.
    paces = {"mae": [0.2, 0.8, 0.8], "daae": [0.3]}
    moments = {arm: {"digest": "", "seconds_per_step": each[0], "measured": each} for arm, each in paces.items()}
    (tmp_path / "one/pace.json").write_text(json.dumps(moments))
    assert {trial.arm: trial.pace for trial in read_study([tmp_path / "one"]).trials} == {"mae": 0.2, "daae": 0.3}


def test_the_last_score_of_a_run_is_what_its_examination_says(tmp_path):
    """Folds ask about all pictures, where the scores on the way were of a fifth of them."""
    folder = write_run(tmp_path / "run", curve=((100, 0.30), (200, 0.34)))
    exam = json.loads((folder / "evaluation.json").read_text())
    exam["leading"]["value"] = 0.36
    (folder / "evaluation.json").write_text(json.dumps(exam))
    (trial,) = read_study([folder]).trials
    assert (trial.curve.seconds, trial.curve.scores) == ((100, 200), (0.30, 0.36))


def test_runs_of_several_lengths_without_labels_make_a_page(tmp_path, capsys):
    for arm in ("mae", "daae"):
        for seconds in (50.0, 100.0):
            folder = tmp_path / "runs" / Cell(arm, 0, seconds).folder
            write_run(folder, preset=f"{arm}-tiny", seconds=seconds, labelled=False, gallery=None)
    values = {"arms": {"mae": "mae-tiny", "daae": "daae-tiny"}, "seconds": [50, 100], "seeds": [0]}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    _, said, _ = page_of([tmp_path], capsys)
    assert said["verdict"].startswith("No verdict on quality: nothing was scored")


def test_a_missing_length_is_named(tmp_path, capsys):
    write_run(tmp_path / "runs" / "mae-50s-seed0", seconds=50.0, curve=((50, 0.3),), gallery=None)
    values = {"arms": {"mae": "mae-tiny"}, "seconds": [50, 100], "seeds": [0]}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(values))
    _, said, _ = page_of([tmp_path], capsys)
    assert any("mae 100s seed 0" in line for line in said["missing"])
