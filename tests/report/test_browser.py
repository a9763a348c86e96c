"""The report in a real browser: on a phone and on a desk, in light and dark mode, with names as long as they come."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from atoll.report.charts import STRONGEST
from atoll.report.html import write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
SIZES = {"phone": (360, 800), "desk": (1200, 900)}

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="chromium and chromedriver are not installed (apt-get install chromium chromium-driver)",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # The driver's path is given, or selenium would look for one in the network.
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def wide_study(model_study: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Names without a place to break, everywhere."""
    result, details = model_study
    name = "W" * 120
    result |= {"study": name, "program": name, "protection": name}
    result["sites"][name] = {"rows": 1}
    result["metrics"]["per_site"][name] = result["metrics"]["per_site"]["north"]
    result["metrics"]["notes"][name] = name
    result["model"]["table"].append({"name": name, "coefficient": 1.0, "std_error": 0.3, "p_value": 0.001})
    result["statistics"]["columns"][name] = result["statistics"]["columns"]["age"]
    result["fitted"]["1"][name] = 1.0
    result["privacy"]["statement"] = name
    details["units"][name] = name
    details["rounds"].append({"number": 8, "name": name, "seconds": 1.0})
    details["releases"][name] = [{"program": name, "handler": name, "what": name, "bytes": 1, "times": 1}]
    return result, details


@pytest.fixture
def wide_statistics(everything_study: Any, rename: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns, codes, sites and units without a place to break."""
    result, details = everything_study
    for name in ("income", "region", "coast", "north", "NT$"):
        result, details = (rename(part, name, name[0] + "W" * 120) for part in (result, details))
    return result, details


def show(browser: webdriver.Chrome, path: Path, size: str, scheme: str) -> None:
    """Open the page in a window of *size*, which is narrower than a headless window can be made."""
    width, height = SIZES[size]
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(path.as_uri())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "study", ["model_study", "statistics_study", "wide_study", "everything_study", "wide_statistics", "trees_study"]
)
def test_the_page_fits(
    browser: webdriver.Chrome, request: pytest.FixtureRequest, tmp_path: Path, study: str, size: str, scheme: str
) -> None:
    write_report(tmp_path / "report.html", *request.getfixturevalue(study))
    show(browser, tmp_path / "report.html", size, scheme)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.execute_script("return window.innerWidth") == SIZES[size][0]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= SIZES[size][0]
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => { const b = s.getBoundingClientRect();"
        " return [b.width, b.height, b.right] })"
    )
    assert drawn
    for width, height, right in drawn:
        assert width >= 90 and height >= 40 and right <= SIZES[size][0]
    # Nothing but a box made for it scrolls sideways, and none of a plot's text lies outside its card.
    stray = browser.execute_script(
        "return [...document.querySelectorAll('body *')].filter(e => e.scrollWidth > e.clientWidth + 1 &&"
        " e.clientWidth && !e.closest('.scroll, pre, svg')).map(e => e.outerHTML.slice(0, 200))"
    )
    assert stray == []
    outside = browser.execute_script(
        "return [...document.querySelectorAll('figure svg text')].filter(t => { const a = t.getBoundingClientRect(),"
        " b = t.closest('figure').getBoundingClientRect(); return a.left < b.left || a.right > b.right ||"
        " a.top < b.top || a.bottom > b.bottom }).map(t => t.textContent)"
    )
    assert outside == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("study", ["model_study", "everything_study"])
def test_text_stands_out(
    browser: webdriver.Chrome, request: pytest.FixtureRequest, tmp_path: Path, study: str, scheme: str
) -> None:
    """WCAG 2.2 success criterion 1.4.3: 4.5 to 1 for text, on the page and inside plots."""
    write_report(tmp_path / "report.html", *request.getfixturevalue(study))
    show(browser, tmp_path / "report.html", "desk", scheme)
    colours = browser.execute_script(
        "const s = e => getComputedStyle(document.querySelector(e));"
        "return {page: s('body').backgroundColor, card: s('figure').backgroundColor, text: s('body').color,"
        " note: s('.note').color, caption: s('figcaption').color,"
        " plots: [...new Set([...document.querySelectorAll('svg text')].map(t => getComputedStyle(t).fill))]}"
    )
    assert (luminance(colours["page"]) < 0.1) == (scheme == "dark")
    for front in (colours["text"], colours["note"], colours["caption"], *colours["plots"]):
        for back in (colours["page"], colours["card"]):
            light, dark = sorted((luminance(front), luminance(back)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_stand_out_of_the_fullest_cells(
    browser: webdriver.Chrome, everything_study: Any, tmp_path: Path, scheme: str
) -> None:
    write_report(tmp_path / "report.html", *everything_study)
    show(browser, tmp_path / "report.html", "desk", scheme)
    ink, card, *colours = (
        [int(part, 16) for part in (value[1:3], value[3:5], value[5:7])]
        for value in browser.execute_script(
            "const s = getComputedStyle(document.documentElement);"
            " return ['ink', 'card', 'positive', 'negative'].map(n => s.getPropertyValue('--' + n).trim())"
        )
    )
    for colour in colours:
        mixed = [STRONGEST * c + (1 - STRONGEST) * b for c, b in zip(colour, card, strict=True)]
        light, dark = sorted((luminance(f"rgb{tuple(ink)}"), luminance(f"rgb{tuple(map(round, mixed))}")), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)" (WCAG 2.2)."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
