"""The page of preference data is readable: by eye in both colour schemes, by a screen reader, on a small screen."""

from itertools import pairwise

import pytest

CONTRAST = """
    const luminance = (colour) => {
      const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
        .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (node) => {
      for (; node; node = node.parentElement) {
        const colour = getComputedStyle(node).backgroundColor;
        if (!colour.startsWith("rgba(0, 0, 0, 0")) return colour;
      }
      return "rgb(255, 255, 255)";
    };
    const poor = [];
    for (const node of document.querySelectorAll("body *")) {
      const says = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
      if (!says || !node.checkVisibility() || node.tagName === "SCRIPT" || node.disabled) continue;
      const [a, b] = [luminance(getComputedStyle(node).color), luminance(ground(node))];
      const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      if (contrast < 4.5) poor.push([node.tagName, node.className, node.textContent, contrast]);
    }
    return poor;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_by_eye_and_by_screen_reader(browser, run_page, scheme):
    browser.emulate(prefers_color_scheme=scheme)
    browser.open(run_page, "#size=25")
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)" if scheme == "light" else "rgb(23, 25, 27)"
    )
    assert browser.run(CONTRAST) == []
    unnamed = """
        const inside = (node) => node.alt || node.innerText?.trim() || node.querySelector("img[alt]");
        const named = (node) => node.labels?.length || inside(node);
        const nodes = [...document.querySelectorAll("input, select, button, a, img")];
        return nodes.filter((node) => node.checkVisibility() && !named(node)).map((node) => node.outerHTML);
    """
    assert browser.run(unnamed) == []
    levels = browser.run("return [...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))
    style = "return getComputedStyle(document.querySelector(arguments[0])).textDecorationStyle"
    styles = [browser.run(style, f"article mark.{side}") for side in ("chosen", "rejected")]
    assert styles == ["solid", "dashed"]
    browser.press("Tab")
    assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_no_sideways_scrolling_on_a_small_screen(browser, run_page):
    browser.resize(500, 800)
    try:
        for view in ("#size=25", "#view=rejected", "#view=summary"):
            browser.open(run_page, view)
            assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    finally:
        browser.resize(1280, 1000)
