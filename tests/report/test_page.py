"""report.html in a real browser: offline, on a desk and on a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report.synthetic_records import write_runs, write_study

from moesaic.report.load import load
from moesaic.report.results import analyse
from moesaic.report.write import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    runs = load(write_runs(root / "runs", backbones=("synthetic-a", "synthetic-b")))
    return write_report(analyse(runs), root / "out").page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM)
        yield started
        started.close()


@pytest.fixture(params=[(1280, 900, "light"), (1280, 900, "dark"), (390, 844, "light"), (390, 844, "dark")], ids=str)
def page(request: pytest.FixtureRequest, browser: Any, page_file: Path) -> Iterator[Any]:
    """The page, ready; afterwards it must have raised nothing and asked the network for nothing."""
    width, height, scheme = request.param
    context = browser.new_context(offline=True, viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    requests: list[str] = []
    page.on("request", lambda asked: requests.append(asked.url))
    page.goto(page_file.as_uri())
    page.wait_for_function("document.body.dataset.ready === '1'")
    yield page
    assert problems == []
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [page_file.as_uri()]
    context.close()


def _marks(page: Any) -> dict[str, int]:
    """Points that are really drawn, by the name of their trace."""
    return page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll("#front .scatterlayer .trace")].map((node) => [
            node.__data__[0].trace.name, node.querySelectorAll(".point").length]))"""
    )


def _first_column(page: Any) -> list[str]:
    return page.locator("#points tbody th").all_inner_texts()


def _numbers(page: Any, heading: str) -> list[float]:
    index = [text.split("\n")[0] for text in page.locator("#points thead button").all_inner_texts()].index(heading)
    cells = page.locator(f"#points tbody tr > :nth-child({index + 1})").all_inner_texts()
    return [float(cell.split("\n")[0]) for cell in cells if not cell.startswith("—")]


def test_every_point_is_drawn(page: Any) -> None:
    routed = {"static_slice": 3, "moefication": 3, "factorllm": 3}
    expected = {"front": 0, "to ideal": 0, "ideal": 9, "dense": 1, "dense_same_tokens": 1, **routed}
    assert _marks(page) == expected
    assert len(_first_column(page)) == 11
    assert page.locator("#gaps .scatterlayer .point").count() == 6 * 5


def test_nothing_sticks_out_of_the_window(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    clipped = page.evaluate(
        """() => [...document.querySelectorAll(".plot")].flatMap((plot) => {
            const box = plot.getBoundingClientRect();
            return [...plot.querySelectorAll("text")].filter((text) => {
                const own = text.getBoundingClientRect();
                const across = own.left < box.left - 1 || own.right > box.right + 1;
                return own.width && (across || own.bottom > box.bottom + 1);
            }).map((text) => text.textContent);
        })"""
    )
    assert clipped == []


def test_choosing_another_cell_quality_and_model(page: Any) -> None:
    before = _numbers(page, "time /")
    page.select_option("#cell", label="decode, batch 8, after 128 tokens")
    assert _numbers(page, "time /") != before
    assert sum(_marks(page).values()) == 11 + 9
    page.select_option("#quality", "next_line.acc")
    assert "next_line accuracy" in page.locator("#front .ytitle").text_content()
    perplexity = _numbers(page, "perplexity")
    page.select_option("#setting", "synthetic-b")
    assert page.locator("#cell option:checked").inner_text() == "decode, batch 8, after 128 tokens"
    assert min(_numbers(page, "perplexity")) > max(perplexity)


def test_sorting_by_mouse_and_keyboard(page: Any) -> None:
    head = page.locator("#points thead button", has_text="perplexity")
    head.click()
    assert _numbers(page, "perplexity") == sorted(_numbers(page, "perplexity"))
    assert page.locator("#points th[aria-sort='ascending']").count() == 1
    page.keyboard.press("Enter")  # the heading keeps the focus
    assert _numbers(page, "perplexity") == sorted(_numbers(page, "perplexity"), reverse=True)
    assert page.locator("#points th[aria-sort='descending']").inner_text().startswith("perplexity")


def test_hiding_a_method(page: Any) -> None:
    page.get_by_label("moefication").uncheck()
    assert "moefication" not in _marks(page)
    assert "moefication" not in _first_column(page)
    page.get_by_label("ideal ratio").uncheck()
    assert "ideal" not in _marks(page)


def test_the_theme_follows_the_system_and_the_button(page: Any) -> None:
    light = "rgb(255, 255, 255)"
    ground = "getComputedStyle(document.body).backgroundColor"
    starts_dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (page.evaluate(ground) == light) is not starts_dark
    page.locator("#theme").click()
    assert (page.evaluate(ground) == light) is starts_dark
    assert sum(_marks(page).values()) == 11 + 9


def test_hover_tells_configuration_budget_and_intervals(page: Any) -> None:
    texts = page.evaluate("document.getElementById('front').data.find((trace) => trace.name === 'moefication').text")
    assert all("active FFN" in text and "perplexity" in text and "captured" in text for text in texts)
    assert {text.split("<br>")[0] for text in texts} == {f"<b>moefication</b> k={k}" for k in (8, 16, 24)}
    page.locator("#front").scroll_into_view_if_needed()
    page.locator("#front .scatterlayer .trace .point").last.hover(force=True)
    page.wait_for_selector("#front .hoverlayer .hovertext")


def test_controls_can_be_reached_by_tab(page: Any) -> None:
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className || ''"))
    assert reached[:5] == ["skip", "theme", "setting", "cell", "quality"]


def test_quality_against_active_share_is_drawn_and_follows_the_choices(page: Any) -> None:
    drawn = """() => Object.fromEntries([...document.querySelectorAll("#shares .scatterlayer .trace")].map((node) => [
        node.__data__[0].trace.name, node.querySelectorAll(".point").length]))"""
    methods = {"static_slice": 3, "moefication": 3, "factorllm": 3}
    oracles = {"moefication oracle": 3, "factorllm oracle": 3}
    assert page.evaluate(drawn) == {**methods, **oracles}
    page.get_by_label("moefication").uncheck()
    assert "moefication" not in page.evaluate(drawn)
    page.select_option("#quality", "next_line.acc")
    assert "next_line accuracy" in page.locator("#shares .ytitle").text_content()


def test_a_study_without_times_shows_what_it_has(browser: Any, tmp_path: Path) -> None:
    file = write_report(analyse(load(write_study(tmp_path / "runs", seeds=(0, 1)))), tmp_path / "out").page
    page = browser.new_context(offline=True, viewport={"width": 1280, "height": 900}).new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(file.as_uri())
    page.wait_for_function("document.body.dataset.ready === '1'")
    assert not page.locator("#front").is_visible()
    assert not page.locator("#cell").is_visible()
    assert page.locator("#front-note").inner_text().startswith("Nothing was timed.")
    assert page.locator("#shares .scatterlayer .point").count() > 15 * 3
    assert len(_first_column(page)) == 2 + 15 * 3
    assert problems == []
