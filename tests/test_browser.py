"""The report in a real browser: headless Chromium, at two widths, light and dark."""

import shutil
import warnings
from collections import OrderedDict
from contextlib import contextmanager

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


@contextmanager
def opened(chromium, path, width):
    """Open a page that says nothing, asks nothing of another host, shows all its pictures, and is not too wide."""
    page = chromium.new_page(viewport={"width": width, "height": 900})
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    assert messages == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert page.locator("figure img").count() > 0
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    yield page
    page.close()


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
    with opened(chromium, hostile_page, width) as page:
        assert page.evaluate("window.hacked") is None
        assert page.locator("script").count() == 0
        assert page.locator("h1").inner_text() == HOSTILE
        assert page.locator("tbody td").first.inner_text() == HOSTILE


class Residual(nn.Module):
    """Two convolutions with batch normalisation, and a way around them."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=n_out // n_in, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.downsample = nn.Conv2d(n_in, n_out, 1, stride=n_out // n_in) if n_in != n_out else nn.Identity()

    def forward(self, x):
        """Return the sum of both ways."""
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.downsample(x))


class TextClassifier(nn.Module):
    """An embedding, transformer layers, and a head on the tokens' mean."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.classifier = nn.Linear(16, 4)

    def forward(self, input_ids):
        """Return the logits."""
        return self.classifier(self.encoder(self.embedding(input_ids)).mean(dim=1))


def images():
    """Return a residual network, images that it knows, and images of other classes, in turn."""
    blocks = [("layer1", Residual(4, 4)), ("layer2", Residual(4, 8)), ("layer3", Residual(8, 16))]
    head = [("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten()), ("fc", nn.Linear(16, 6))]
    model = nn.Sequential(OrderedDict([("conv1", nn.Conv2d(3, 4, 3, padding=1)), *blocks, *head]))
    y = torch.arange(120) % 6
    X = torch.randn(120, 3, 12, 12) + y[:, None, None, None] / 3
    return model, (X, [f"species {label}" for label in y.tolist()]), (X.flip(0) * 1.5, 20 * [*"abcdef"])


def texts():
    """Return a transformer, token ids that it knows, and others."""
    y = torch.arange(120) % 4
    ids = torch.randint(0, 12, (120, 9)) + 10 * y[:, None]
    names = ["sports", "politics", "science and technology", "arts"]
    labels = [names[label] for label in y.tolist()]
    return TextClassifier(), ({"input_ids": ids}, labels), ({"input_ids": ids.flip(1)}, labels)


@pytest.fixture(scope="module", params=[images, texts])
def advice_page(request, tmp_path_factory):
    """The page of a residual network, and of a transformer."""
    torch.manual_seed(0)
    model, known, unknown = request.param()
    kwargs = {"input_layer": "embedding"} if request.param is texts else {}
    rec = rs.recommend_layers(model, known, unknown, random_state=0, **kwargs)
    trial = {"steps": 5, "learning_rates": (1e-2,), "n_seeds": 1, "random_state": 0, **kwargs}
    sweep = None if rec.verdict == "undecided" else rec.verify(model, known, unknown, **trial)
    return rec.report(tmp_path_factory.mktemp("page") / "advice.html", title=request.param.__name__, sweep=sweep)


@pytest.mark.parametrize("width", [1200, 390])
def test_advice_opens(chromium, advice_page, width):
    """The page of a network for images and of one for texts fits the window; its tables have rows."""
    with opened(chromium, advice_page, width) as page:
        tables = page.locator("table")
        assert tables.count() >= 5
        assert all(tables.nth(i).locator("tbody tr").count() > 0 for i in range(tables.count()))
        if width == 1200:  # the verdicts are in sight
            assert tables.first.evaluate("table => table.scrollWidth <= table.parentElement.clientWidth")
        links = page.locator("nav a")
        assert all(page.locator(links.nth(i).get_attribute("href")).count() == 1 for i in range(links.count()))
