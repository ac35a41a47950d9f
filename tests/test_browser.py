"""The report in a real browser: headless Chromium, at two widths, light and dark."""

import shutil
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

import retrainscope as rs

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    assert path, "These tests need Chromium: install it, or run `make test` without them."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_report_opens(chromium, study_folder, width, scheme):
    """Every figure and table is there and visible, nothing is asked of another host, nothing sticks out."""
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((study_folder / "report.html").as_uri())
    assert messages == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    images = page.locator("figure img")
    assert images.count() == len(list(study_folder.glob("*.png")))
    loaded = "image => image.complete && image.naturalWidth > 0 && image.getBoundingClientRect().height > 50"
    assert all(images.nth(i).evaluate(loaded) for i in range(images.count()))
    tables = page.locator("table")
    assert tables.count() == 10
    assert all(tables.nth(i).locator("tbody tr").count() > 0 for i in range(tables.count()))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


HOSTILE = '<script>self["hacked"] = 1</script> "quotes" & \' \U0001f600 ' + 300 * "x"


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    """The page of a network whose layers and classes have names that would do harm."""
    torch.manual_seed(0)
    layers = [(HOSTILE, nn.Linear(4, 8)), *((f"<img src=x onerror=hack()> {n}", nn.Linear(8, 8)) for n in range(20))]
    model = nn.Sequential(OrderedDict([*layers, ("head", nn.Linear(8, 2))]))
    X, y = torch.randn(80, 4), [HOSTILE, "b"] * 40
    shift = torch.tensor([[3.0 if label == HOSTILE else 0.0] for label in y])
    rec = rs.recommend_layers(model, (X + shift, y), (X - shift, y), random_state=0)
    with warnings.catch_warnings(action="ignore"):  # the font has no smileys
        return rec.report(tmp_path_factory.mktemp("page") / "advice.html", title=HOSTILE)


@pytest.mark.parametrize("width", [1200, 390])
def test_hostile_names_are_text(chromium, hostile_page, width):
    """Names that are code, quotes, smileys or very long are shown as they are, run nowhere, and fit the page."""
    page = chromium.new_page(viewport={"width": width, "height": 900})
    messages = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(hostile_page.as_uri())
    assert messages == []
    assert page.evaluate("window.hacked") is None
    assert page.locator("script").count() == 0
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.locator("tbody td").first.inner_text() == HOSTILE
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
