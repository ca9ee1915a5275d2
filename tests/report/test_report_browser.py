"""The HTML report in headless Chromium: clicked, driven by keyboard, in both colour schemes and at two widths."""

import shutil

import pytest
from report_runs import OUTCOMES, answer_rows, write_run

from apo_lora.evaluation.gallery import write_gallery
from apo_lora.report.page import report

pytestmark = pytest.mark.slow

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    return report([write_run(tmp_path_factory.mktemp("runs") / "run")]).path


@pytest.fixture(scope="module")
def four_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(folder / f"{method}-with-a-rather-long-name-{seed}", f"train.seed={seed}", *changes)
        for method, changes in (("apo", ()), ("grpo", ("apo.dads=null", "apo.stcr=null")))
        for seed in (1, 2)
    ]
    return report(runs, folder / "report.html").path


@pytest.fixture
def open_page(browser):
    """open_page(path, **context) -> a page whose console is clean and which asked for nothing but itself."""
    contexts, complaints = [], []

    def opened(path, **options):
        context = browser.new_context(**{"viewport": {"width": 1600, "height": 1000}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complaints.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"page error: {error}"))
        page.on("request", lambda request: requested(request.url, path.as_uri()))
        page.goto(path.as_uri())
        page.complaints = complaints
        return page

    def requested(url, own):
        if not url.startswith(("data:", own)):
            complaints.append(f"request: {url}")

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def shown(page):
    return page.locator("#shown").inner_text()


def count(page, name):
    return int(page.locator(f"#filters label:has(input[value={name}]) .count").inner_text())


def choose(page, name):
    page.locator(f"#filters label:has(input[value={name}])").click()


def test_the_watch_sees_a_request_and_the_policy_stops_it(open_page, one_run):
    page = open_page(one_run)
    assert page.complaints == []
    page.evaluate("new Image().src = 'file:///nowhere.png'; fetch('file:///nowhere.json').catch(() => 0)")
    page.wait_for_timeout(300)
    assert len([c for c in page.complaints if "Content Security Policy" in c or "request" in c]) >= 2
    page.complaints.clear()


def test_filters_are_clicked_and_count(open_page, one_run):
    page = open_page(one_run)
    assert shown(page) == "24 of 40 shown" == f"{page.locator('.item:visible').count()} of 40 shown"
    assert page.locator(".pictures use").first.evaluate("use => use.getBBox().width") == 84  # it finds its picture
    names = ("all", "right", "wrong", "changed", "fixed", "broken")
    assert [count(page, name) for name in names] == [40, 32, 8, 16, 12, 4]
    assert len(OUTCOMES) == 40
    for name, badge in (("fixed", "✗→✓ fixed"), ("broken", "✓→✗ broken")):
        choose(page, name)
        assert shown(page) == f"{count(page, name)} of {count(page, name)} shown"
        assert set(page.locator(".item:visible > header .badge").all_inner_texts()) == {badge}
    choose(page, "all")
    page.get_by_role("button", name="Show more").click()
    assert shown(page) == "40 of 40 shown" and page.locator("#more").is_hidden()
    page.get_by_label("Search").fill("board 17?")
    assert shown(page) == "1 of 1 shown" and count(page, "all") == 1
    page.get_by_label("Search").fill("no such words")
    assert shown(page) == "No matching answers."


def test_it_works_by_keyboard(open_page, one_run):
    page = open_page(one_run)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == "filter":
            break
    assert page.evaluate("document.activeElement.value") == "all"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"  # focus is seen
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.value") == "wrong" and shown(page) == "8 of 8 shown"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "text"  # a long answer is scrolled by its arrow keys
    page.locator("#record summary").first.focus()
    page.keyboard.press("Enter")
    assert page.get_by_text("num_generations: 8").is_visible()


def test_a_script_in_a_completion_stays_text(open_page, one_run):
    page = open_page(one_run)
    text = page.locator(".answer .text").first.text_content()
    assert "<script>window.hacked = true</script>" in text and "onerror" in text
    assert page.locator(".gallery script, .gallery img, .gallery image[href^=x]").count() == 0
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("which", ["one_run", "four_runs"])
def test_both_schemes_and_widths(open_page, which, width, scheme, request):
    path = request.getfixturevalue(which)
    page = open_page(path, viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(WIDER_THAN_THE_PAGE) == []
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 100 and {text: c for text, c in contrasts if c < 4.5} == {}
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 27)"
    assert dark == (scheme == "dark")
    assert page.locator(".chart svg .line").first.bounding_box()["width"] > 200


def test_the_colour_scheme_can_be_chosen(open_page, one_run):
    page = open_page(one_run, color_scheme="light")
    colours = {}
    for name in ("System", "Light", "Dark"):
        page.get_by_label(name, exact=True).click()
        colours[name] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colours["System"] == colours["Light"] != colours["Dark"]


def test_reduced_motion_is_respected(open_page, one_run):
    behaviour = {
        motion: open_page(one_run, reduced_motion=motion).evaluate(
            "getComputedStyle(document.documentElement).scrollBehavior"
        )
        for motion in ("reduce", "no-preference")
    }
    assert behaviour == {"reduce": "auto", "no-preference": "smooth"}


def test_runs_can_be_looked_through_one_by_one(open_page, four_runs):
    page = open_page(four_runs)
    page.locator("#source").select_option(index=3)
    assert shown(page) == "24 of 40 shown"
    assert page.locator(".chart .band").count() > 10


def test_a_run_without_anything_has_an_empty_gallery(open_page, tmp_path):
    folder = write_run(tmp_path / "run", answers=False)
    for name in ("metrics.jsonl", "completions.jsonl", "eval.json"):
        (folder / name).unlink()
    page = open_page(report([folder]).path)
    assert shown(page) == "No matching answers." and count(page, "all") == 0
    choose(page, "changed")
    assert page.locator(".item").count() == 0


@pytest.mark.parametrize("javascript", [True, False])
def test_the_page_of_an_evaluation_filters_and_shows_all_without_javascript(open_page, tmp_path, javascript):
    write_gallery(answer_rows(), write_run(tmp_path / "run"), tmp_path / "gallery.html")
    page = open_page(tmp_path / "gallery.html", viewport={"width": 400, "height": 900}, java_script_enabled=javascript)
    assert page.locator(".item:visible").count() == (24 if javascript else 40)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400 and page.evaluate(WIDER_THAN_THE_PAGE) == []
    assert {text: c for text, c in page.evaluate(CONTRASTS) if c < 4.5} == {}
    if javascript:
        choose(page, "broken")
        assert shown(page) == f"{page.locator('.item:visible').count()} of 4 shown" == "4 of 4 shown"


WIDER_THAN_THE_PAGE = """[...document.querySelectorAll("main *, header *")].filter((element) =>
  !element.closest(".scroll, .unseen") && element.getBoundingClientRect().right > innerWidth + 1
).map((element) => element.outerHTML.slice(0, 80))"""

CONTRASTS = """(() => {
  // The page's own pixels: whatever notation a colour has, a canvas turns it into numbers.
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((byte) => {
      const part = byte / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      if (at.tagName === "text" && at.closest(".bar"))
        return getComputedStyle(at.previousElementSibling).fill;
      const colour = getComputedStyle(at).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
    if (!text || !element.checkVisibility() || element.closest("script, style, .skip")) continue;
    const style = getComputedStyle(element);
    const colour = element instanceof SVGElement ? style.fill : style.color;
    const [one, other] = [luminance(colour), luminance(behind(element))].sort((a, b) => b - a);
    found.push([text.slice(0, 40), (one + 0.05) / (other + 0.05)]);
  }
  return found;
})()"""
