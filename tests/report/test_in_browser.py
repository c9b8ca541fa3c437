"""Pages in Chromium: contrast, keyboard, width, requests, time. Run by `make test-pages`.

Skipped where Chromium or playwright is missing.
"""

import shutil

import pytest

from batchnorm.report import (
    Details,
    Finding,
    Grid,
    Heat,
    Images,
    Plot,
    Report,
    Row,
    Section,
    Series,
    Table,
    Text,
)
from batchnorm.report.html import to_html

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
WIDTHS = (390, 1280, 1920)


def layers(count, channels):
    """A report with every kind of block, of so many layers."""
    values = tuple((i * 7919 % 1000) / 500 - 1 for i in range(channels))
    names = [f"backbone.stages.{i // 6}.blocks.{i % 6}.downsample.bn{i}" for i in range(count)]
    cells = tuple((n, channels, i / 7, None if i % 3 else i) for i, n in enumerate(names))
    small = Plot("γ", "histogram", (Series("γ", values),), "", "", "", small=True)
    curve = Plot("change of μ", "lines", (Series("a", (0, 1), (1.0, 2.0)),), "step", "", "words")
    digit = tuple(tuple(float(x * y) for x in range(8)) for y in range(8))
    findings = [
        Finding(
            f"BN{i}", severity, names[0], "words " * 30, "bn.calibrate(model, data)", {"σ²": 1e-9}
        )
        for i, severity in enumerate(("error", "warning", "info"))
    ]
    return (
        Section("findings", (*findings, Text("English", "中文"), curve)),
        Section("layers", (Table("all", ("layer", "channels", "σ²", "steps"), cells, sortable=True),)),
        Section("heat", (Heat("", ("γ", "β"), tuple(Row(n, (values, ())) for n in names)),)),
        Section("more", (Images("digits", (digit,) * 12, ("4",) * 12), Grid("cells", ("a",), ("b", "c"), ((0, 1),), "", 4))),
        Section("each", tuple(Details(name, (small, small)) for name in names)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("Chromium is not installed (Debian: apt install chromium)")
    with sync_api.sync_playwright() as playwright:
        # Its sandbox needs rights that a container does not have; the pages are our own.
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture
def shown(browser, tmp_path):
    """Show a report: the page, and the addresses that it asked for."""
    opened = []

    def show(report, width=1280, theme="light"):
        path = tmp_path / "page.html"
        path.write_text(to_html(report), "utf-8")
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=theme)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: asked.append(str(error)))
        page.goto(path.as_uri())
        opened.append(page)
        return page, [one for one in asked if not one.startswith(("data:", path.as_uri()))]

    yield show
    for page in opened:
        page.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_fits_is_legible_and_requests_nothing(shown, width, theme, language):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page, asked = shown(Report("title", ("summary",), layers(12, 64), language), width, theme)
    assert asked == []
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = axe.run(page).response
    assert [(one["id"], one["nodes"][0]["html"]) for one in found["violations"]] == []
    assert any(one["id"] == "color-contrast" for one in found["passes"])
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (theme == "dark")


def column(page, at):
    return page.eval_on_selector_all(f"tbody tr:not([hidden]) td:nth-child({at})", "all => all.map(one => one.textContent)")  # fmt: skip


def test_a_table_is_sorted_and_filtered_from_the_keyboard(shown):
    page, _ = shown(Report("title", (), (layers(12, 4)[1],)))
    page.locator("input[type=search]").focus()
    page.keyboard.press("Tab")  # the region that scrolls sideways
    for _ in range(4):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "steps"
    head = page.locator("thead th").nth(3)
    for order, expected in (
        ("ascending", ["0", "3", "6", "9"]),
        ("descending", ["9", "6", "3", "0"]),
    ):
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == order
        assert column(page, 4) == [*expected, *["–"] * 8]  # what is unknown comes last
    page.locator("input[type=search]").fill("blocks.5 bn11")
    assert column(page, 1) == ["backbone.stages.1.blocks.5.downsample.bn11"]
    assert page.locator("output").text_content() == "1 / 12 rows"


def test_details_open_from_the_keyboard(shown):
    page, _ = shown(Report("title", (), (layers(1, 4)[4],)))
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("details").get_attribute("open") is not None


def test_a_page_of_200_layers_and_one_of_10_000_channels_paint_within_a_second(shown):
    for count, channels in ((200, 256), (5, 10_000)):
        page, _ = shown(Report("title", (), layers(count, channels)))
        page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length > 0")
        painted = page.evaluate(
            "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        )
        assert painted < 1000, (count, channels)
