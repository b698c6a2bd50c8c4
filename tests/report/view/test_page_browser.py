"""The page of preference data in a real browser: what a reader sees, and that data cannot do anything there."""

import json

import pytest
from helpers import row, write_image

from trl_vpo.report.view.page import write_page
from trl_vpo.testbed.rows import write_jsonl

EVIL = "<script>window.hacked=1</script>\"><img src=x onerror=window.hacked=1>'{{ 7*7 }}"
HEADINGS = "article h2 a"


@pytest.fixture
def shown(browser, run_page):
    """The browser on the first page; the page must leave no message on the console and load nothing from anywhere."""
    browser.console(), browser.requests()
    browser.open(run_page)
    yield browser
    assert browser.console() == []
    assert {url for url in browser.requests() if not url.startswith("data:image/webp;base64,")} == {run_page.as_uri()}


def numbers(browser):
    return [int(text.removeprefix("Row ")) for text in browser.texts(HEADINGS)]


def test_first_page(shown):
    assert shown.text("#counts") == "14 rows · 2 with problems · 20 media · 1 of them cannot be shown"
    assert shown.text("#status") == "1–10 of 14 rows"
    assert numbers(shown) == list(range(10))
    first = "article:first-child "
    assert shown.texts(first + ".strip li span") == [f"{n / 4:.2f} s" for n in range(8)]
    sizes = shown.run(
        "return Promise.all([...document.images].slice(0, 8).map((i) => i.decode().then(() => i.naturalWidth)))"
    )
    assert sizes == [84] * 8
    tops = shown.run("return [...document.images].slice(0, 8).map((i) => i.getBoundingClientRect().y)")
    assert shown.run("return innerWidth") == 1280 and len(set(tops)) == 1  # side by side
    alts = shown.run("return [...document.querySelectorAll('.strip img')].map((image) => image.alt)")
    assert alts[1] == "Enlarge row 0, video 1, 2 of 8, 0.25 s" and all(alts)
    assert shown.text(first + ".prompt .text") == "video 1Describe the video."
    assert shown.text(first + ".side.chosen dl") == "reward\n0"
    assert shown.text(first + ".side.rejected dl") == "trust\n0.25"
    assert shown.text(first + "> dl") == "answer\nIt moves."
    marked = shown.texts(first + "mark")
    chosen, rejected = shown.texts(first + ".side .text")
    assert len(marked) == 2 and marked[0] in chosen and marked[1] in rejected
    assert chosen.replace(marked[0], "") == rejected.replace(marked[1], "")
    lists = [t for t in shown.texts("figcaption") if t.startswith("Image list drawn from critical_box [")]
    assert len(lists) == 2 and "100 % hidden" in shown.texts("article:nth-child(9) .strip li span")


def test_every_row_has_its_own_pictures_in_order(browser, tmp_path):
    images = [write_image(tmp_path / f"{n}.png", (24 + n, 40), n % 4) for n in range(40)]
    rows = [row("image", images[2 * n : 2 * n + 2], score=-n) for n in range(20)]
    write_page(write_jsonl(rows, tmp_path / "rows.jsonl"), tmp_path / "page.html")
    browser.open(tmp_path / "page.html", "#size=25&sort=score")
    assert numbers(browser) == list(reversed(range(20)))
    widths = browser.run(
        "return Promise.all([...document.querySelectorAll('article')].map((a) => Promise.all("
        "[...a.querySelectorAll('img')].map((i) => i.decode().then(() => i.naturalWidth)))))"
    )
    assert widths == [[24 + 2 * n, 25 + 2 * n] for n in reversed(range(20))]


def test_what_cannot_be_shown_says_why(shown):
    error = shown.text("article:nth-child(3) figure .error")
    assert "broken.mp4 cannot be opened as a video" in error
    assert shown.texts("article:nth-child(3) img") == []
    shown.click("#problems")
    assert numbers(shown) == [2, 13] and shown.text("#status") == "1–2 of 2 that match, 14 rows in all"
    assert "line 14: not JSON" in shown.text("article:nth-child(2) li.error")
    assert shown.text("article:nth-child(2) pre") == "{nonsense"


def test_filters(shown):
    shown.type("#q", "SCENE-0002")
    assert numbers(shown) == [10]
    shown.type("#q", "")
    shown.choose("#source", "testbed/scene")
    assert numbers(shown) == [8, 9, 10, 11]
    shown.choose("#column", "chosen_reward")
    values = {n: round(-0.1 * (n * 7 % 12), 1) for n in (8, 9, 10, 11)}
    shown.type("#min", "-0.7")
    assert numbers(shown) == [n for n, value in values.items() if value >= -0.7]
    shown.type("#max", "-0.5")
    assert numbers(shown) == [n for n, value in values.items() if -0.7 <= value <= -0.5] == [11]
    assert "column=chosen_reward&min=-0.7&max=-0.5" in shown.run("return location.hash")
    shown.type("#q", "nobody wrote this")
    assert shown.text("#content") == "Nothing matches these filters." and shown.text("#status").startswith("None that")
    shown.click("[type=reset]")
    assert numbers(shown) == list(range(10)) and shown.run("return location.hash") == ""


def test_sorting(shown):
    shown.choose("#size", "25")
    order = sorted((n for n in range(12) if n != 5), key=lambda n: round(-0.1 * (n * 7 % 12), 1))
    shown.choose("#sort", "chosen_reward")
    assert numbers(shown) == [*order, 5, 12, 13]
    shown.choose("#order", "desc")
    assert numbers(shown) == [*reversed(order), 5, 12, 13]


def test_pages_and_links(shown, run_page):
    shown.click("#bar [data-step='1']")
    assert numbers(shown) == [10, 11, 12, 13] and shown.text("#status") == "11–14 of 14 rows"
    assert shown.run("return document.querySelector('#bar [data-step=\"1\"]').disabled")
    shown.back()
    assert numbers(shown) == list(range(10))
    shown.choose("#size", "5")
    shown.run("const page = document.querySelector('.page'); page.value = 3; page.dispatchEvent(new Event('change'))")
    assert numbers(shown) == [10, 11, 12, 13]
    shown.open(run_page, "#row=11&size=5")
    assert numbers(shown) == [10, 11, 12, 13]
    assert shown.run("return document.activeElement.querySelector('h2 a').innerText") == "Row 11"
    shown.open(run_page, "#row=11&q=clip-")
    assert "Row 11 is not among them" in shown.text("#status") and numbers(shown)[0] == 0
    shown.open(run_page, "#size=x&page=-3&view=nothing&sort=unknown&unknown=1")
    assert numbers(shown) == list(range(10))


def test_keyboard(shown):
    at = "return document.activeElement.querySelector('h2 a')?.innerText"
    shown.press("j")
    assert shown.becomes(at, "Row 0")
    shown.press("j", "ArrowRight")
    assert shown.becomes(at, "Row 2")
    shown.press("k", "ArrowLeft", "k")
    assert shown.becomes(at, "Row 0")
    shown.press(*"jjjjjjjjjj")
    assert shown.becomes(at, "Row 10") and numbers(shown) == [10, 11, 12, 13]
    shown.press("k")
    assert shown.becomes(at, "Row 9") and numbers(shown) == list(range(10))
    shown.press("/", *"jk")
    assert shown.becomes("return [document.activeElement.id, document.activeElement.value]", ["q", "jk"])


def test_enlarged_pictures(shown):
    shown.click("article:first-child .strip li:nth-child(2) button")
    assert shown.text("#viewer-caption") == "row 0, video 1, 2 of 8, 0.25 s"
    shown.press("ArrowRight", "j")
    assert shown.text("#viewer-caption") == "row 0, video 1, 4 of 8, 0.75 s"
    thumbs = shown.run("return [...document.querySelectorAll('article:first-child img')].map((i) => i.src)")
    assert shown.run("return document.getElementById('viewer-image').src") == thumbs[3]
    shown.click("[data-picture='1']")
    shown.press("Escape")
    assert not shown.run("return document.getElementById('viewer').open")
    assert numbers(shown) == list(range(10)) and shown.run("return location.hash") == ""


def test_a_runs_other_files(shown):
    shown.click("[data-view=rejected]")
    assert shown.texts("#kinds tbody tr") == ["answered correctly\t12\t75.0 %", "unreadable media\t4\t25.0 %"]
    assert shown.text("#status") == "1–10 of 16 left out"
    shown.choose("#kind", "unreadable media")
    assert [text.split("\t")[0] for text in shown.texts("#content tbody tr")] == ["in-12", "in-13", "in-14", "in-15"]
    shown.type("#q", "reason 13")
    assert shown.texts("#content tbody tr") == ["in-13\tunreadable media\tReason 13."]
    shown.click("[data-view=summary]")
    assert shown.texts("#content tbody tr") == ["kept\t14", "rejected_by_kind / unreadable media\t4"]
    assert not shown.run("return document.getElementById('filters').checkVisibility()")
    shown.click("[data-view=rows]")
    assert numbers(shown) == list(range(10))


def test_data_cannot_do_anything(browser, tmp_path):
    hostile = {
        **row("video", [EVIL], chosen=EVIL + "1", rejected=EVIL + "2", id=EVIL, source=EVIL),
        **{EVIL: EVIL, "n" + EVIL: 1, "list" + EVIL: [EVIL], "chosen_" + EVIL: 2, "__proto__": EVIL, "constructor": 3},
    }
    hostile["prompt"][0]["role"] = "user"
    hostile["prompt"][0]["content"].append({"type": "text", "text": EVIL})
    broken = {"id": EVIL, "prompt": EVIL}
    folder = tmp_path / "run <img src=x onerror=window.hacked=1>"
    write_jsonl([hostile, broken], folder / "rows.jsonl")
    write_jsonl([{"id": EVIL, "kind": EVIL, "reason": EVIL, EVIL: EVIL}], folder / "rejected.jsonl")
    (folder / "summary.json").write_text(json.dumps({EVIL: EVIL}))
    write_page(folder, tmp_path / "page.html")
    browser.console(), browser.requests()
    everywhere = f"#q={EVIL}&source={EVIL}&column={EVIL}&row={EVIL}"
    for view in ("", "#view=rejected", "#view=summary", "#sort=n" + EVIL, everywhere):
        browser.open(tmp_path / "page.html", view)
        assert browser.run("return window.hacked") is None
        assert browser.run("return document.querySelectorAll('img:not(#viewer-image)').length") == 0
    browser.open(tmp_path / "page.html")
    assert browser.text("h1").endswith("run <img src=x onerror=window.hacked=1>")
    heading = browser.text("article:first-child h2")
    assert heading.count(EVIL) == 2
    assert browser.texts("article:first-child .side .text") == [EVIL + "1", EVIL + "2"]
    assert EVIL in browser.text("article:first-child figure")
    assert EVIL in browser.text("article:first-child .prompt")
    assert json.dumps(EVIL) in browser.text("article:nth-child(2) pre")
    assert all(text in browser.text("article:first-child > dl") for text in (EVIL, "__proto__", "constructor"))
    browser.choose("#column", "constructor")
    browser.type("#min", "3")
    assert numbers(browser) == [0]
    assert browser.run("return window.hacked") is None and browser.console() == []
    assert set(browser.requests()) == {(tmp_path / "page.html").as_uri()}


def test_the_policy_stops_what_is_not_the_pages_own(browser, run_page):
    """Should markup ever get in: no script, no handler, no style and no request comes of it."""
    browser.open(run_page)
    browser.console()
    browser.run("""
        const script = document.createElement("script");
        script.textContent = "window.hacked = 1";
        const box = document.createElement("div");
        box.innerHTML = '<img src="data:," onerror="window.hacked = 1"><img src="https://example.org/x.png">';
        document.body.append(script, box);
        return fetch("https://example.org/").catch(() => null);
    """)
    assert browser.run("return window.hacked") is None
    refused = "\n".join(browser.console())
    for directive in ("script-src", "img-src", "default-src"):
        assert directive in refused, refused
    fetched = "return performance.getEntriesByType('resource').filter((e) => e.responseStatus).length"
    assert browser.run(fetched) == 0


def test_thousands_of_rows(browser, tmp_path):
    chosen, rejected = "A red car\u2028number {} 👩‍👩‍👧 parks.", "سيارة رقم {} زرقاء."
    rows = [
        row(None, id=f"r{n}", score=n % 100, chosen=chosen.format(n), rejected=rejected.format(n)) for n in range(5000)
    ]
    write_page(write_jsonl(rows, tmp_path / "rows.jsonl"), tmp_path / "page.html")
    browser.console()
    browser.open(tmp_path / "page.html", "#size=50")
    nodes = "return document.querySelectorAll('body *').length"
    blocks = browser.run("return document.querySelectorAll('script').length")
    assert len(numbers(browser)) == 50 and blocks <= 5000 / 16 + 3
    most = browser.run(nodes)
    assert most - blocks < 50 * 40
    for _ in range(3):
        browser.click("#bar [data-step='1']")
        assert abs(browser.run(nodes) - most) < 20
    assert numbers(browser)[0] == 150
    browser.choose("#sort", "score")
    browser.choose("#order", "desc")
    assert numbers(browser)[:2] == [99, 199]
    browser.type("#q", "NUMBER 4321 👩")
    assert numbers(browser) == [4321]
    texts = browser.run("return [...document.querySelectorAll('.side .text')].map((e) => e.textContent)")
    assert texts == [chosen.format(4321), rejected.format(4321)]
    direction = "return [...document.querySelectorAll('.side .text')].map((e) => e.matches(':dir(rtl)'))"
    assert browser.run(direction) == [False, True]
    assert browser.console() == []
