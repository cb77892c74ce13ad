"""Pages on runs in a real browser: no error, sliders that move, long comparisons that stay usable, keyboard, paper."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyrnode
from pyrnode import pages, plotting
from pyrnode.pages import live
from tests.page_runs import HOSTILE, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium is on PATH (Debian: apt-get install chromium)", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra `browser`)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page in the browser, with everything that went wrong on it."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.page = browser.new_page(**{"viewport": {"width": 1200, "height": 900}, **context})
        self.wrong: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.asked: list[str] = []
        self.page.goto(address)
        self.until("report.charts.size > 0 && [...report.charts.values()].every(c => c.plot.status)")

    def __call__(self, script: str) -> Any:
        return self.page.evaluate(script)

    def until(self, script: str) -> None:
        """Waits for something to be true; playwright's own way needs eval, which the page's policy forbids."""
        for _ in range(2000):
            if self(script):
                return
            self.page.wait_for_timeout(50)
        pytest.fail(f"never true: {script}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("browser") / "trained"
    settings = {"samples": 300, "hidden": [8], "max_steps": 30, "validate_every": 10, "batch_size": 64}
    pyrnode.train("8gaussians", out=out, **settings, progress=False)
    return out


@pytest.fixture(scope="module")
def single(run: Path) -> str:
    return pages.report(run).as_uri()


# What is drawn on a canvas in another colour than its ground.
INK = "(c => { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0;"
INK += " for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; })"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 360])
def test_a_page_is_drawn_without_an_error_and_asks_for_nothing(
    browser: Any, single: str, scheme: str, width: int
) -> None:
    opened = Opened(browser, single, color_scheme=scheme, viewport={"width": width, "height": 800})
    assert opened.wrong == []
    assert [url for url in opened.asked if not url.startswith(("file:", "data:"))] == []
    assert opened("document.documentElement.scrollWidth") <= width
    drawn = opened(f"[...document.querySelectorAll('.plot canvas, #drawn-particles canvas')].map({INK})")
    assert len(drawn) == len(opened("report.data.charts")) + 1
    assert min(drawn) > 200
    assert opened("[...document.images].every(i => i.complete && i.naturalWidth > 0)")


def test_the_ground_is_dark_where_that_is_asked_for(browser: Any, single: str) -> None:
    light, dark = (
        Opened(browser, single, color_scheme=scheme)("getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    )
    assert min(map(int, light[4:-1].split(","))) > 230
    assert max(map(int, dark[4:-1].split(","))) < 40


def test_the_slider_of_time_moves_the_particles_by_key(browser: Any, single: str) -> None:
    opened = Opened(browser, single)
    canvas = "document.querySelector('#drawn-particles canvas')"
    first, said = opened(f"{canvas}.toDataURL()"), opened(f"{canvas}.getAttribute('aria-label')")
    assert said.startswith("150 particles of trained at t = 0.00 of 1.00, the data")
    opened.page.focus("#time")
    for _ in range(100):
        opened.page.keyboard.press("ArrowRight")
    assert opened("document.getElementById('time').getAttribute('aria-valuetext')") == "t = 0.50 of 1.00"
    assert opened(f"{canvas}.toDataURL()") != first
    opened.page.keyboard.press("End")
    assert opened("document.getElementById('time-value').textContent") == "t = 1.00 of 1.00, the base"
    opened.page.click("#play")
    opened.until("+document.getElementById('time').value > 20")
    assert opened("document.getElementById('play').textContent") == "Pause"
    opened.page.click("#play")
    assert opened("document.getElementById('play').textContent") == "Play"
    assert opened.wrong == []


def test_values_are_read_by_key_and_are_those_of_the_run(browser: Any, single: str) -> None:
    opened = Opened(browser, single)
    energy = opened("report.data.runs[0].train.E")
    opened.page.focus("#at")
    opened.page.keyboard.press("Home")
    assert opened("document.getElementById('at-value').textContent") == "step 1"
    shown = "document.querySelector('[data-readout=energy]').textContent.trim()"
    assert float(opened(shown).replace("−", "-")) == pytest.approx(energy[0], rel=1e-3, abs=1e-9)
    opened.page.keyboard.press("End")
    assert float(opened(shown).replace("−", "-")) == pytest.approx(energy[-1], rel=1e-3)
    opened.page.hover("[data-chart=energy] .u-over")
    assert 12 <= int(opened("document.getElementById('at-value').textContent").removeprefix("step ")) <= 18


def test_controls_change_what_is_drawn(browser: Any, single: str) -> None:
    opened = Opened(browser, single)
    scale = "(({min, max}) => [min, max])(report.charts.get('energy').plot.scales.x)"
    title = "document.querySelector('[data-title=likelihood]').textContent"
    assert opened(scale) == [1, 30]
    opened.page.click("[data-do=in]")
    opened.until(f"{scale}[0] > 10")
    opened.page.click("[data-do=reset]")
    opened.until(f"{scale}[0] === 1")
    opened.page.select_option("#unit", label="bits/dim")
    assert opened(title) == "Negative log-likelihood, bits/dim"
    nats = opened("report.data.runs[0].train.nll[29]")
    assert opened("report.charts.get('likelihood').curves[0].y[29]") == pytest.approx(nats * 1.4426950408889634)
    opened.page.select_option("#along", "seconds")
    assert opened(f"{scale}[1]") == pytest.approx(opened("report.data.runs[0].train.seconds[29]"))
    rough = opened("report.charts.get('gradient').curves[0].y")
    opened.page.fill("#smooth", "2")
    smooth = opened("report.charts.get('gradient').curves[0].y")
    assert smooth[10] == pytest.approx(sum(rough[8:13]) / 5)
    assert smooth == pytest.approx(plotting.smooth(np.array(rough), 5).tolist())  # to the ends
    assert opened.wrong == []


def test_a_long_comparison_stays_usable(browser: Any, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{i:02d}", steps=3000, every=300, seed=i) for i in range(30)]
    opened = Opened(browser, pages.report(*runs, out=tmp_path / "page.html").as_uri())
    # Processor time of this page's thread, so that a busy machine is no failure.
    session = opened.page.context.new_cdp_session(opened.page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def worked() -> float:
        metrics = session.send("Performance.getMetrics")["metrics"]
        return float(next(m["value"] for m in metrics if m["name"] == "TaskDuration"))

    before = worked()
    opened.page.uncheck("#run3")
    opened.until("report.charts.get('energy').plot.series[4].show === false")
    assert worked() - before < 4
    before = worked()
    for place in range(0, 1000, 100):
        opened.page.fill("#at", str(place))
    assert worked() - before < 4
    assert opened("document.querySelectorAll('[data-readout=energy] span').length") == 12
    opened.page.click("[data-do=none]")
    opened.page.click("[data-do=all]")
    assert opened("[...document.querySelectorAll('[data-run]')].every(b => b.checked)")
    assert opened.wrong == []


def test_hostile_names_run_nothing(browser: Any, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in HOSTILE]
    opened = Opened(browser, pages.report(*runs, out=tmp_path / "page.html").as_uri())
    assert opened.wrong == []  # a dialogue of alert() would have been reported, and blocked
    assert opened("document.images.length") == 0
    assert opened("report.data.runs[0].name") == HOSTILE[0]
    assert HOSTILE[0] in opened("document.querySelector('[data-readout=energy]').textContent")


def test_a_code_that_is_not_ours_is_stopped_by_the_policy(browser: Any, tmp_path: Path) -> None:
    path = pages.report(write_run(tmp_path / "run"), out=tmp_path / "page.html")
    page = path.read_text(encoding="utf-8").replace("</main>", "</main><script>window.stolen = 1</script>", 1)
    path.write_text(page, encoding="utf-8")
    opened = Opened(browser, path.as_uri())
    assert opened("window.stolen") is None
    assert any("Content Security Policy" in text for text in opened.wrong)


def test_every_control_is_reached_by_tab_and_has_a_name(browser: Any, single: str) -> None:
    opened = Opened(browser, single)
    reached = []
    for _ in range(120):
        opened.page.keyboard.press("Tab")
        about = opened(
            "(e => [e.tagName, e.id || e.dataset.do || e.textContent, e.matches(':focus-visible')])"
            "(document.activeElement)"
        )
        if about[0] == "BODY":
            break
        reached.append(about)
    names = [name for _, name, _ in reached]
    assert names[0] == "Skip to the content"
    assert {"along", "unit", "smooth", "at", "in", "out", "reset", "play", "time"} <= set(names)
    assert all(seen for _, _, seen in reached)
    for control in ("#along", "#unit", "#smooth", "#at", "#time"):
        assert opened(f"document.querySelector('{control}').labels.length") == 1
    assert opened("[...document.querySelectorAll('[role=img]')].every(e => e.getAttribute('aria-label'))")


def test_on_paper_the_tables_are_open_and_the_ground_is_white(browser: Any, single: str) -> None:
    opened = Opened(browser, single, color_scheme="dark")
    opened("dispatchEvent(new Event('beforeprint'))")
    assert opened("document.querySelectorAll('details:not([open])').length") == 0
    assert opened("getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()") == "#1c1e21"
    opened("dispatchEvent(new Event('afterprint'))")
    assert opened("document.querySelectorAll('details[open]').length") == 0
    assert opened.page.pdf()[:5] == b"%PDF-"
    assert opened.wrong == []


def test_a_run_is_followed_while_it_goes_on(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=20)
    with live.Server([run]) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        opened = Opened(browser, server.address)
        opened.page.click("#numbers-energy summary")
        opened.page.focus("#unit")
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 21, "loss": 1.0, "nll": 1.0, "E": 77.0, "seconds": 3}) + "\n")
        opened.until("report.data.runs[0].train.step.at(-1) === 21")
        assert opened("report.charts.get('energy').curves[0].y.at(-1)") == 77
        opened.until("document.getElementById('numbers-energy').textContent.includes('77')")
        assert opened("document.getElementById('numbers-energy').open")
        assert opened("document.activeElement.id") == "unit"
        assert "step 21" in opened("document.getElementById('live').textContent")
        assert opened.wrong == []
        server.shutdown()
        thread.join()
    opened.until("document.getElementById('live').textContent.includes('no longer answers')")
