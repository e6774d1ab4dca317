"""The page in a real browser. WEFT_BROWSER=1 makes a missing browser a failure."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from weft.report.page import render

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "tuned": {},
    "plain": {"tuned": False, "seeds": 1},
    "hostile": {"hostile": True},
}


def _absent(why: str) -> None:
    if os.environ.get("WEFT_BROWSER") == "1":
        pytest.fail(f"WEFT_BROWSER=1, but {why}")
    pytest.skip(why)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chrome = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chrome is None or driver is None:
        _absent("no chromium" if chrome is None else "no chromedriver")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        _absent("selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = str(chrome)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.set_capability("unhandledPromptBehavior", "ignore")
    made = webdriver.Chrome(options=options, service=Service(str(driver)))
    made.set_page_load_timeout(60)
    yield made
    made.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = Path(__file__).parents[1] / "report" / "sample.py"
    spec = importlib.util.spec_from_file_location("weft_report_sample", path)
    assert spec and spec.loader
    sample = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sample)
    folder = tmp_path_factory.mktemp("pages")
    urls: dict[str, str] = {}
    for kind, options in KINDS.items():
        file = folder / f"{kind}.html"
        file.write_text(render(sample.report(**options)), "utf8")
        urls[kind] = file.as_uri()
    return urls


def _open(browser: Any, url: str, width: int, scheme: str = "light") -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(url)
    drawn = "return [...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))"
    WebDriverWait(browser, 30).until(lambda b: b.execute_script(drawn))


def _count(browser: Any, selector: str) -> int:
    return browser.execute_script("return document.querySelectorAll(arguments[0]).length", selector)


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("kind", KINDS)
def test_it_draws_fits_and_stays_silent(browser: Any, pages: dict[str, str], kind: str, width: int) -> None:
    from selenium.common.exceptions import NoAlertPresentException

    _open(browser, pages[kind], width)
    with pytest.raises(NoAlertPresentException):
        _ = browser.switch_to.alert.text
    assert [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
    plots = 5 if kind == "plain" else 7
    assert _count(browser, ".plot.js-plotly-plot") == plots
    assert _count(browser, ".js-plotly-plot .main-svg") >= plots
    assert _count(browser, "#heat-0 .heatmap-label") == _count(browser, "#heat-1 .heatmap-label") == 43
    assert _count(browser, "#pareto .point") == 58
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    inside = "s => s.getBoundingClientRect().right <= innerWidth"
    assert browser.execute_script(f"return [...document.querySelectorAll('.main-svg')].every({inside})")


def test_nothing_is_requested_from_the_net(browser: Any, pages: dict[str, str]) -> None:
    _open(browser, pages["hostile"], 1280)
    events = [e["message"] for e in browser.get_log("performance")]
    sent = [e for e in events if "Network.requestWillBeSent" in e]
    assert sent and not [e for e in sent if '"url":"http' in e]


def test_links_in_names_do_not_become_links(browser: Any, pages: dict[str, str]) -> None:
    _open(browser, pages["hostile"], 1280)
    assert _count(browser, "a, svg a, img[src='x'], svg[onload]") == 0
    assert browser.title.startswith("</script>")


def test_the_theme_reaches_the_plots(browser: Any, pages: dict[str, str]) -> None:
    fill = "return getComputedStyle(document.querySelector('#pareto .legendtext')).fill"
    _open(browser, pages["tuned"], 1280)
    light = browser.execute_script(fill)
    _open(browser, pages["tuned"], 1280, "dark")
    assert browser.execute_script(fill) != light


def test_the_command_can_be_copied(browser: Any, pages: dict[str, str]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    _open(browser, pages["tuned"], 1280)
    browser.execute_script("document.getElementById('copy').click()")
    label = "return document.getElementById('copy').textContent"
    WebDriverWait(browser, 10).until(lambda b: b.execute_script(label) in {"Copied", "Selected"})
    assert browser.execute_script("return getSelection().toString()").startswith("weft fit ref-lm")
