"""The report in a real browser: headless Chromium, at two widths, light and dark."""

import shutil

import pytest

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
