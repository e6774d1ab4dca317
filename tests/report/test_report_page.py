"""The page: complete, offline, deterministic, and deaf to what names say."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from weft.error import FormatError, PathError, ResourceError
from weft.report import figures, words
from weft.report.page import read, render
from weft.report.schema import Interval, Report

Make = Callable[..., Report]
SECTIONS = [
    "headline", "comparison", "size-and-loss", "sites", "predicted", "training", "steps", "fallbacks", "about",
    "reproduce", "next",
]  # fmt: skip


class Page(HTMLParser):
    """Tags with attributes, text outside scripts, and scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text += data


def test_every_section_is_there_in_order(make: Make) -> None:
    page = Page(render(make()))
    assert [a["id"] for t, a in page.tags if t == "section"] == SECTIONS
    for word in ("27 %", "Fit is ahead of the best uniform GPTQ", "No detectable difference", "layers.3.down_proj"):
        assert word in page.text
    plots = {a["id"] for t, a in page.tags if a.get("class") == "plot"}
    assert plots == {"pareto", "scores", "checked", "heat-0", "heat-1", "curves-0", "curves-1"}
    assert plots == set(json.loads(page.scripts[0]))


def test_without_tuning_and_with_one_seed(make: Make) -> None:
    page = Page(render(make(tuned=False, seeds=1)))
    assert "Nothing was tuned" in page.text and "One seed only" in page.text and "None." in page.text
    assert "tuning:" not in page.text and "after the same tuning" not in page.text
    assert set(json.loads(page.scripts[0])) == {"pareto", "scores", "checked", "heat-0", "heat-1"}


@pytest.mark.parametrize("hostile", [False, True])
def test_the_same_report_gives_the_same_bytes(make: Make, hostile: bool) -> None:
    assert render(make(hostile=hostile)) == render(make(hostile=hostile))


def test_hostile_names_add_no_tag_and_no_script(make: Make, samples: ModuleType) -> None:
    good, bad = Page(render(make())), Page(render(make(hostile=True)))
    assert [t for t, _ in bad.tags] == [t for t, _ in good.tags]
    assert [sorted(a) for _, a in bad.tags] == [sorted(a) for _, a in good.tags]
    assert len(bad.scripts) == 3 and bad.scripts[1:] == good.scripts[1:]
    assert not re.search("[<>&]", bad.scripts[0])
    assert all(text in bad.text for text in samples.HOSTILE)


def test_plot_texts_keep_no_tag_of_a_name(make: Make) -> None:
    plots = json.loads(Page(render(make(hostile=True))).scripts[0])
    allowed = re.compile("</?b>|<br>")
    assert "<" not in allowed.sub("", json.dumps(plots))


def test_nothing_is_loaded_and_only_its_own_scripts_run(make: Make) -> None:
    page = Page(render(make(hostile=True)))
    loads = [(t, k) for t, a in page.tags for k in a if k in {"src", "href", "srcset", "data", "action", "poster"}]
    assert loads == []
    assert not [k for _, a in page.tags for k in a if k.startswith("on")]
    policy = next(a["content"] or "" for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "http" not in policy.replace("http-equiv", "")
    for script in page.scripts[1:]:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


def test_a_file_reads_back(make: Make, tmp_path: Path) -> None:
    for hostile in (False, True):
        report = make(hostile=hostile)
        path = tmp_path / "report.json"
        path.write_text(report.model_dump_json(), "utf8")
        assert read(path) == report


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"extra": 1}, "extra"),
        ({"format": 2}, "format"),
        ({"budgets": []}, "budgets"),
        ({"seeds": ["0"]}, "seeds.0"),
        ({"original": {"score": 1.0, "bytes": 1, "tuned_score": None, "more": 0}}, "original.more"),
    ],
)
def test_a_wrong_file_is_refused(make: Make, tmp_path: Path, change: dict[str, object], where: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(make().model_dump(mode="json") | change), "utf8")
    with pytest.raises(FormatError, match=re.escape(where)):
        read(path)


@pytest.mark.parametrize("raw", [b"", b"{", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"[]", b"\xff\xfe", b"null"])
def test_what_is_no_report_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(raw)
    with pytest.raises(FormatError):
        read(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(PathError):
            read(path)


@pytest.mark.parametrize("package", ["jinja2", "plotly.offline"])
def test_missing_packages_say_what_to_install(make: Make, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ResourceError, match=re.escape('pip install "weft[report]"')):
        render(make())


def test_the_headline_is_honest(make: Make, samples: ModuleType) -> None:
    report = make(tuned=False)
    first = report.budgets[0]
    behind = [
        r if r.arm == "fit" else r.model_copy(update={"versus_fit": samples.interval(-0.01, 0.002)}) for r in first.rows
    ]
    words_of = words.judgements(report, first.model_copy(update={"rows": behind}))
    assert [w for w, _ in words_of] == ["fit behind", "fit behind"]
    assert words_of[0][1].startswith("Fit is behind the best uniform GPTQ by 0.0100")
    for half in (0.01, 0.02):
        touching = Interval(mean=0.01, low=0.01 - half, high=0.01 + half, detectable=half)
        assert words.verdict(touching) == "no detectable difference"
    alone = first.model_copy(update={"rows": [r for r in first.rows if r.arm == "fit"]})
    assert "GPTQ" not in words.headline(report, alone) and words.judgements(report, alone) == []
    assert "no result" in words.headline(report, first.model_copy(update={"rows": []}))


def test_values_that_no_axis_shows_are_counted_and_stay_json(make: Make) -> None:
    report = make(tuned=False)
    values = (0.0, -1.0, float("inf"))
    odd = [u.model_copy(update={"predicted": v}) for u, v in zip(report.uniform, values, strict=False)]
    page = Page(render(report.model_copy(update={"uniform": odd})))
    assert "Not drawn: 3 points" in page.text
    assert "Infinity" not in page.scripts[0]


def test_an_empty_run_still_renders(make: Make) -> None:
    report = make(tuned=False, seeds=1)
    bare = report.budgets[0].model_copy(update={"rows": [], "sites": [], "checks": [], "curves": []})
    page = Page(render(report.model_copy(update={"budgets": [bare], "uniform": [], "steps": [], "next": []})))
    assert [a["id"] for t, a in page.tags if t == "section"] == SECTIONS


def test_sites_that_share_a_cell_are_all_told(make: Make) -> None:
    budget = make().budgets[0]
    twice = [*budget.sites, budget.sites[1].model_copy(update={"name": "expert.1", "bits": 9.0})]
    trace = figures.heat(budget.model_copy(update={"sites": twice}))["data"][0]
    assert trace["x"] == ["other", "0", "1", "2", "3", "4", "5"]
    assert "expert.1" in trace["hovertext"][1][1] and "layers.0.q_proj" in trace["hovertext"][1][1]
    assert trace["z"][1][1] == pytest.approx((budget.sites[1].bits + 9.0) / 2)


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (words.number(-0.00001, 3, signed=True), "0.000"),
        (words.number(-1.5, 2), "−1.50"),
        (words.number(float("nan"), 2), words.NONE),
        (words.round_percent(0.2693), "27 %"),
        (words.round_percent(0.0634), "6.3 %"),
        (words.size(999), "999 B"),
        (words.size(2_540_000), "2.54 MB"),
        (words.duration(151), "2.5 min"),
    ],
)
def test_numbers_in_words(made: str, text: str) -> None:
    assert made == text
