"""The pages in Chromium: on phones, on a wide screen in light and dark, and on paper."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.browser import DARK, DESKTOP, NARROW, PHONE, chromium, opened
from tests.service.conftest import Api
from tests.service.jobs.reported import LONG, add_reported_job

SMALLEST_TEXT_PX = 11
WIDEST_MM = 210

# Every SVG and image with its box, every text with its size in pixels of the screen.
MEASURED = """() => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.width, r.height, r.right]; };
  document.querySelectorAll('details').forEach(e => e.open = true);
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const inside = node.parentElement;
    if (!node.textContent.trim() || inside.getBoundingClientRect().width === 0) continue;
    const svg = inside.closest('svg');
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    texts.push([parseFloat(getComputedStyle(inside).fontSize) * scale, node.textContent.trim()]);
  }
  return {
    width: document.documentElement.scrollWidth, inner: innerWidth,
    svgs: [...document.querySelectorAll('svg')].map(box),
    shapes: [...document.querySelectorAll('svg path')].map(box),
    images: [...document.querySelectorAll('img')].map(e => [...box(e), e.naturalWidth]),
    texts: texts,
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
  };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def url(sqlite_api: Api) -> str:
    """Address of a page with every picture and names as long and as hostile as they can be."""
    job = add_reported_job(sqlite_api)
    return f"http://127.0.0.1:{sqlite_api.port}/jobs/{job}/report?format=html"


def check_layout(page: Page) -> dict[str, Any]:
    """Check that nothing is too wide, empty or too small to read."""
    found: dict[str, Any] = page.evaluate(MEASURED)
    assert found["width"] <= found["inner"], "the page scrolls to the side"
    assert len(found["svgs"]) > 16
    for width, height, right in found["svgs"]:
        assert width > 5 and height > 5 and right <= found["inner"]
    for width, height, _, natural in found["images"]:
        assert width > 20 and height > 20 and natural > 0
    small = [text for size, text in found["texts"] if size < SMALLEST_TEXT_PX]
    assert not small, small
    return found


@pytest.mark.parametrize("device", [PHONE, NARROW], ids=["390px", "360px"])
def test_on_a_phone(browser: Browser, url: str, device: dict[str, Any]) -> None:
    with opened(browser, url, device) as page:
        found = check_layout(page)
        assert len(found["images"]) == 11 + 6
        assert page.get_by_role("heading", name="Scores on the held-out images").is_visible()
        assert page.get_by_role("img", name="loss: 1 at step 0").is_visible()
        assert page.locator("h1").inner_text().startswith("<script>")
        page.get_by_role("link", name="Neighbours").click()
        assert page.get_by_role("heading", name="Nearest neighbours").is_visible()


def test_on_a_wide_screen_in_light_and_dark(browser: Browser, url: str) -> None:
    colours = {}
    for name, device in {"light": DESKTOP, "dark": DARK}.items():
        with opened(browser, url, device) as page:
            found = check_layout(page)
            colours[name] = [brightness(found[part]) for part in ("paper", "ink")]
    assert colours["light"][0] > 230 and colours["light"][1] < 60
    assert colours["dark"][0] < 60 and colours["dark"][1] > 200


def test_on_paper(browser: Browser, url: str) -> None:
    with opened(browser, url, DARK) as page:
        pdf = page.pdf(prefer_css_page_size=True)
        page.emulate_media(media="print")
        page.set_viewport_size({"width": 680, "height": 1000})  # A4 less its margins, at 96 dpi
        folded = page.locator('svg[aria-label^="gradient norm"]')
        height = folded.evaluate("e => e.getBoundingClientRect().height")
        assert height > 50, "what is folded away on the screen is printed"
        found = page.evaluate(MEASURED)
        assert brightness(found["ink"]) < 60, "no light text on paper"
        assert found["width"] <= found["inner"]
        assert not page.get_by_role("navigation").is_visible()
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", pdf)
    assert pdf.startswith(b"%PDF") and 3 <= len(boxes) <= 20
    assert {(round(float(w) / 72 * 25.4), round(float(h) / 72 * 25.4)) for w, h in boxes} == {
        (WIDEST_MM, 297)
    }


def test_the_comparison_on_a_phone(browser: Browser, sqlite_api: Api) -> None:
    ids = ",".join(add_reported_job(sqlite_api) for _ in range(6))
    url = f"http://127.0.0.1:{sqlite_api.port}/jobs/compare?ids={ids}&format=html"
    with opened(browser, url, NARROW) as page:
        found: dict[str, Any] = page.evaluate(MEASURED)
        assert found["width"] <= found["inner"]
        assert min(size for size, _ in found["texts"]) >= SMALLEST_TEXT_PX
        assert page.get_by_role("heading", name="Comparison of 6 jobs").is_visible()
        assert LONG in page.locator("#jobs").inner_text()
        page.get_by_role("region", name="Scores of jobs 1 to 5").scroll_into_view_if_needed()


def brightness(colour: str) -> float:
    """Return the mean of red, green and blue of a computed colour."""
    parts = [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]
    return sum(parts) / 3
