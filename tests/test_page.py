"""The page, in a real browser without a window."""

import contextlib
import re

import pytest
import web
from playwright.sync_api import expect, sync_playwright

from sd_progress.server import Settings

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
TOKEN = "a-secret-of-these-tests"
WAIT_MS = 1000 * web.WAIT_S
SOURCES = "(images) => images.map((image) => image.src)"
WATCH = """() => {
  window.seen = {pictures: new Set(), progress: []};
  new MutationObserver(() => {
    const picture = document.getElementById("picture");
    if (picture.alt.includes("step")) seen.pictures.add(picture.src);
    const {value} = document.getElementById("progress");
    if (value !== seen.progress.at(-1)) seen.progress.push(value);
  }).observe(document.body, {subtree: true, attributes: true, childList: true});
}"""


@pytest.fixture(scope="module")
def url():
    with web.service() as (url, _):
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium, as Debian has it, with a profile of its own."""
    path = web.program("chromium")
    folder = tmp_path_factory.mktemp("profile")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch_persistent_context(
            folder, executable_path=path, args=FLAGS, viewport={"width": 900, "height": 1100}
        )
        with contextlib.closing(launched):
            yield launched


@pytest.fixture
def page(browser):
    """A new tab, in which nothing may go wrong and which may ask nobody else."""
    with new_tab(browser) as (tab, wrong):
        yield tab
    assert wrong == []


@pytest.fixture
def refused_page(browser):
    """The same, but that the browser reports answers that are errors."""
    with new_tab(browser) as (tab, wrong):
        yield tab
    assert all(line.startswith("Failed to load resource") for line in wrong)


@contextlib.contextmanager
def new_tab(browser):
    wrong, asked = [], []
    tab = browser.new_page()
    tab.set_default_timeout(WAIT_MS)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    tab.on("request", lambda request: asked.append(request.url))
    yield tab, wrong
    tab.close()
    assert all(re.match(r"http://127\.0\.0\.1:\d+/|data:", url) for url in asked)


def paint(page, url, **fields):
    """Ask for a picture, as people do."""
    page.goto(url)
    page.evaluate(WATCH)
    page.get_by_text("Settings").click()
    page.get_by_label("Prompt").fill(web.PROMPT)
    for label, value in fields.items():
        page.get_by_label(label).fill(str(value))
    page.get_by_role("button", name="Paint").click()


def phase(page, text):
    """Wait until the page says so."""
    expect(page.locator("#phase")).to_have_text(text, timeout=WAIT_MS)


def steps(page):
    """Wait until the strip has some."""
    page.locator("#strip img").nth(3).wait_for(timeout=WAIT_MS)


def test_a_picture_forms(page, url):
    """In at least ten different previews, while progress moves; then it can be saved."""
    paint(page, url, Steps=60, Seed=4)
    phase(page, "Done")
    pictures = page.evaluate("() => seen.pictures.size")
    progress = page.evaluate("() => seen.progress")
    assert pictures >= 10
    assert len(progress) >= 10
    assert progress == sorted(progress)
    assert page.locator("#strip img").count() == pictures + 1
    assert page.locator("#picture").evaluate("x => x.naturalWidth") == 128
    expect(page.locator("#save")).to_have_attribute("download", "picture.png")


def test_stop_ends_the_run(page, url):
    """The newest preview stays."""
    paint(page, url, Steps=150)
    steps(page)
    page.get_by_role("button", name="Stop").click()
    phase(page, "Stopped")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    assert page.locator("#picture").get_attribute("alt").startswith(f"{web.PROMPT}, step ")
    assert page.locator("#progress").evaluate("x => x.value") < 1


def test_a_reload_in_the_middle_goes_on(page, url):
    """With the same run, and all of its steps."""
    paint(page, url, Steps=150)
    steps(page)
    address = page.url
    before = page.locator("#strip img").evaluate_all(SOURCES)
    page.reload()
    steps(page)
    assert page.locator("#phase").text_content() == "Painting"
    assert page.get_by_label("Prompt").input_value() == web.PROMPT
    phase(page, "Done")
    after = page.locator("#strip img").evaluate_all(SOURCES)
    assert after[: len(before)] == before
    assert page.url == address


def test_another_tab_watches_the_same_run(page, browser, url):
    """Its address is enough."""
    paint(page, url, Steps=60)
    steps(page)
    with contextlib.closing(browser.new_page()) as other:
        other.goto(page.url)
        phase(other, "Done")
        phase(page, "Done")
        sources = [tab.locator("#picture").get_attribute("src") for tab in (page, other)]
    assert sources[0] == sources[1]


def test_a_step_can_be_held(page, url):
    """While new ones come, until the newest is chosen."""
    paint(page, url, Steps=60)
    steps(page)
    page.locator("#strip button").first.click()
    held = page.locator("#picture").get_attribute("src")
    phase(page, "Done")
    assert page.locator("#picture").get_attribute("src") == held
    page.locator("#strip button").last.click()
    assert page.locator("#picture").evaluate("x => x.naturalWidth") == 128


def test_a_broken_connection_is_taken_up_again(page, url):
    """Behind the last event that came."""
    asked = []

    def cut(route):
        asked.append(route.request.headers.get("last-event-id"))
        if len(asked) == 1:
            run_id = route.request.url.split("/")[-2]
            first, second, *_ = web.told(url, run_id)
            texts = [f"event: queued\nid: {x.id}\ndata: {{}}\n\n" for x in (first, second)]
            route.fulfill(content_type="text/event-stream", body="".join(texts))
            asked.append(second.id)
        else:
            route.continue_()

    page.route("**/events", cut)
    paint(page, url, Steps=20)
    phase(page, "Done")
    assert asked[0] is None
    assert asked[2] == asked[1]


def test_what_is_wrong_is_told(refused_page, url):
    """As the service says it."""
    paint(refused_page, url, Size="100x100")
    told = refused_page.get_by_role("alert")
    expect(told).to_contain_text("size must be multiples of 8 pixels", timeout=WAIT_MS)


def test_a_run_that_is_forgotten_is_told(refused_page, url):
    """And the address is clean again."""
    refused_page.goto(f"{url}/#run=none-of-these")
    told = refused_page.get_by_role("alert")
    expect(told).to_contain_text("run_id must be that of a run", timeout=WAIT_MS)
    assert refused_page.url == f"{url}/"


def test_a_token_is_asked_for_and_kept(refused_page):
    """In this tab only: in no URL and no cookie."""
    page = refused_page
    with web.service(settings=Settings(token=TOKEN)) as (url, _):
        paint(page, url, Steps=60)
        expect(page.locator("#token")).to_be_visible(timeout=WAIT_MS)
        page.locator("#token").fill(TOKEN)
        page.get_by_role("button", name="Paint").click()
        steps(page)
        page.reload()
        phase(page, "Done")
        assert TOKEN not in page.url
        assert page.context.cookies() == []
