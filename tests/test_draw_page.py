"""The page in a headless browser with real mouse and keys: open, scroll, paint, complete, look, undo, save."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from monai_conres.completion import ScanCompletion, complete_scan
from monai_conres.draw import Drawing, PageServer
from monai_conres.draw import drawing as drawing_module
from monai_conres.files import save_network
from tests.browser import CONTROL, PROGRAM, Browser, Page
from tests.test_draw import network, read, write_scan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium or Chrome on this machine"),
]

NAMES = {1: "label 1", 2: "label 2", 4: "ET"}
SIZE = (28, 30, 12)  # R, A, S


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    program = Browser(tmp_path_factory.mktemp("chromium"))
    yield program
    program.close()


@pytest.fixture(autouse=True)
def closed_tabs(browser) -> Iterator[None]:
    yield
    for page in browser.pages:
        page.close()
    browser.pages.clear()
    browser.errors.clear()


class Running:
    """A page server in the background."""

    def __init__(self, folder: Path, codes: str = "LPS", axis: int = -1, *, predict: bool = True, **arguments) -> None:
        self.trained, self.scan = network(axis, channels=arguments.pop("channels", 1)), folder / "scan.nii.gz"
        if not self.scan.exists():
            write_scan(self.scan, codes, SIZE)
        files = [self.scan] * len(self.trained.scans.channels)
        self.drawing = Drawing(ScanCompletion(self.trained, files), folder / "volume.nii.gz")
        if predict:
            self.drawing.predict()
        self.server = PageServer(self.drawing, NAMES, **arguments)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def start(tmp_path) -> Iterator:
    running: list[Running] = []

    def run(*arguments, **options) -> Running:
        running.append(Running(tmp_path, *arguments, **options))
        return running[-1]

    yield run
    for each in running:
        if each.thread.is_alive():
            each.stop()


def open_page(browser: Browser, running: Running, **options) -> Page:
    page = browser.open(running.server.url, **options)
    page.wait("document.body?.dataset.ready")
    return page


def place(page: Page, x: float, y: float) -> tuple[float, float]:
    """A point of the screen; (0, 0) is the upper left corner of the picture, (1, 1) the lower right one."""
    rectangle = "document.getElementById('canvas').getBoundingClientRect()"
    box = page.run(f"(({{x, y, width, height}}) => [x, y, width, height])({rectangle})")
    left, top, width, height = box
    scale = min(width / 28, height / (30 * 1.5)) * 0.96  # axial slices of 28 x 30 voxels of 1 x 1.5 mm
    w, h = scale * 28, scale * 30 * 1.5
    return left + width / 2 + (x - 0.5) * w, top + height / 2 + (y - 0.5) * h


def saved(page: Page) -> None:
    """Wait until the server has written everything."""
    page.wait("document.body.dataset.sent === 'yes'")


def color(page: Page, x: float, y: float) -> list[int]:
    left, top = place(page, x, y)
    script = (
        "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => { "
        "const c = document.getElementById('canvas'), b = c.getBoundingClientRect(); "
        f"done([...c.getContext('2d').getImageData({left} - b.x, {top} - b.y, 1, 1).data].slice(0, 3)); }})))"
    )
    return page.run(script)


def opaque(page: Page) -> None:
    page.run("((input) => { input.value = 100; input.dispatchEvent(new Event('input')); })(opacity)")


def is_at(page: Page, number: int) -> None:
    """Wait until the page shows a slice."""
    page.wait(f"document.getElementById('slice').value === '{number}'")


def upright(file: Path) -> np.ndarray:
    """A label map with the axes R, A, S."""
    return np.asarray(nib.as_closest_canonical(nib.load(file)).dataobj)


@pytest.mark.parametrize("codes", ["LPS", "PIR"])
def test_page_paints_completes_undoes_and_saves(browser, start, codes):
    running = start(codes, {"LPS": -1, "PIR": -1}[codes])
    drawing, axis = running.drawing, running.drawing.scan.spatial_axis
    page = open_page(browser, running)
    assert page.run("document.getElementById('name').textContent") == "scan.nii.gz"
    is_at(page, 6)
    page.wheel(*place(page, 0.5, 0.5), -120)
    is_at(page, 7)
    for _ in range(12):
        page.key("ArrowDown")
    is_at(page, 0)
    for _ in range(4):
        page.key("ArrowUp")
    is_at(page, 4)

    # an anterior stroke on the patient's right, which is on the left of the screen
    page.key("x")
    page.key("3")  # the class ET, with the value 4
    page.mouse(place(page, 0.1, 0.1), place(page, 0.2, 0.1), place(page, 0.3, 0.15))
    saved(page)
    painted = drawing.slices[4].values
    assert set(np.unique(painted)) == {0, 4}
    assert not drawing.slices[4].done
    page.key("d")
    page.wait("document.getElementById('chip').textContent === 'done'")
    saved(page)
    assert drawing.scan.drawn == [4]
    sent = bytes(page.run("fetch('completed').then((r) => r.arrayBuffer()).then((b) => [...new Uint8Array(b)])"))
    np.testing.assert_array_equal(np.frombuffer(sent, np.uint8).reshape(drawing.completed().shape), drawing.completed())

    # a done slice is not painted
    page.mouse(place(page, 0.8, 0.8), place(page, 0.9, 0.8))
    assert "is done" in page.run("document.getElementById('hint').textContent")
    np.testing.assert_array_equal(drawing.slices[4].values, painted)

    # what is painted is shown, and hidden while H is down
    opaque(page)
    assert color(page, 0.2, 0.1) == [47, 196, 141]
    page.key("h", hold=True)
    red, green, blue = color(page, 0.2, 0.1)
    assert red == green == blue
    page.call("Input.dispatchKeyEvent", type="keyUp", key="h")
    assert color(page, 0.2, 0.1) == [47, 196, 141]

    # undo takes back "done", the stroke and the clearing; redo brings all back
    for left in (1, 1, 0):
        page.key("z", CONTROL)
        saved(page)
        assert len(drawing.slices) == left
        assert drawing.scan.drawn == []
    for _ in range(3):
        page.key("y", CONTROL)
    page.wait("document.getElementById('chip').textContent === 'done'")
    saved(page)
    assert drawing.scan.drawn == [4]
    np.testing.assert_array_equal(drawing.slices[4].values, painted)

    # the slice that is proposed next opens with its proposal and is corrected
    page.click("#next")
    second = next(iter(drawing.ranking()))
    is_at(page, second)
    proposal = drawing.completed()[second]
    page.key("e")
    page.mouse(place(page, 0.5, 0.5), place(page, 0.6, 0.5))
    page.click("#done")
    page.wait("document.getElementById('chip').textContent === 'done'")
    saved(page)
    corrected = drawing.slices[second].values
    assert 0 < (corrected != proposal).sum() < 200
    assert not corrected[corrected != proposal].any()
    page.key("s", CONTROL)
    page.wait("document.getElementById('saved').textContent === 'Saved volume.nii.gz'")

    volume, drawn = drawing.out, drawing.drawn_file
    expected = complete_scan(running.trained, running.scan, drawn, slices=[4, second])
    np.testing.assert_array_equal(read(volume), expected.label[0])
    assert axis == expected.spatial_axis
    at_four = upright(drawn)[..., 4 if codes[axis] == "S" else SIZE[2] - 5]
    r, a = (at_four == 4).nonzero()
    assert r.min() > 28 * 0.6  # R
    assert a.min() > 30 * 0.7  # A
    np.testing.assert_array_equal(nib.load(volume).affine, nib.load(running.scan).affine)

    # a reload shows the same
    page.go(running.server.url)
    page.wait("document.body?.dataset.ready")
    page.wait("document.getElementById('chip').textContent === 'done'")
    opaque(page)
    page.key("PageDown")
    page.key("PageDown")
    for _ in range(4):
        page.key("ArrowUp")
    is_at(page, 4)
    assert color(page, 0.2, 0.1) == [47, 196, 141]
    assert browser.errors == []


def test_page_fills_sizes_and_resets(browser, start):
    running = start()
    page = open_page(browser, running)
    page.key("x")
    page.key("f")
    page.mouse(place(page, 0.5, 0.5))
    saved(page)
    assert (running.drawing.slices[6].values == 1).all()
    page.wait("document.getElementById('readout').textContent.includes('label 1')")  # without a move of the mouse
    page.key("2")
    page.key("b")
    for _ in range(10):
        page.key("[")
    page.mouse(place(page, 14.5 / 28, 15.5 / 30))
    saved(page)
    assert (running.drawing.slices[6].values == 2).sum() == 1
    page.key("]")
    page.mouse(place(page, 14.5 / 28, 20.5 / 30))
    saved(page)
    twos = running.drawing.slices[6].values == 2
    assert twos.sum() > 1
    page.click("#only")
    page.key("e")
    for _ in range(20):
        page.key("]")
    page.mouse(place(page, 0.5, 0.5), place(page, 0.5, 0.8))
    saved(page)
    np.testing.assert_array_equal(running.drawing.slices[6].values, 1 - twos)  # only the chosen class was erased
    page.key("r")
    page.wait("document.getElementById('chip').className === ''")
    saved(page)
    assert running.drawing.slices == {}
    assert browser.errors == []


def test_page_looks_along_other_axes_and_channels(browser, start):
    running = start("PIR", channels=2)
    page = open_page(browser, running)
    edges = "[...document.querySelectorAll('.edge')].map((e) => e.textContent).join('')"
    frame = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    views = {}
    for _ in range(3):
        view = page.run("document.getElementById('axis').selectedOptions[0].textContent")
        page.run(frame)
        views[view] = page.run(edges)
        page.key("v")
    assert views == {"axial, to paint": "ARLP", "coronal, to look": "SRLI", "sagittal, to look": "SAPI"}
    page.key("v")
    page.mouse(place(page, 0.5, 0.5), place(page, 0.5, 0.2))  # goes to a slice, and paints nothing
    assert running.drawing.slices == {}
    page.key("c")
    page.wait("document.getElementById('channel').value === '1'")
    page.mouse((300, 300), (340, 280), button="right")
    page.wheel(300, 300, -100, CONTROL)
    page.key("?")
    page.wait("document.getElementById('keys').open")
    page.click("#keys button")
    page.key("o")
    page.key("u")
    page.run(frame)
    assert browser.errors == []


def test_page_opens_before_the_network_has_run(browser, start):
    running = start(predict=False)
    page = open_page(browser, running)
    assert not page.run("document.getElementById('progress').hidden")
    page.mouse(place(page, 0.4, 0.4), place(page, 0.6, 0.6))
    page.key("d")
    saved(page)
    assert page.run("document.getElementById('save').disabled")
    running.drawing.predict()
    page.wait("document.getElementById('progress').hidden && !document.getElementById('save').disabled")
    assert running.drawing.scan.drawn == [6]
    assert browser.errors == []


def test_killed_program_loses_no_stroke_that_it_has(browser, tmp_path):
    trained = network()
    save_network(tmp_path / "run", trained.network, trained.scans)
    scan = write_scan(tmp_path / "scan.nii.gz", "LPS", SIZE)
    command = [sys.executable, "-m", "monai_conres", "draw", "--network", tmp_path / "run", scan, "--no-browser"]

    def run() -> tuple[subprocess.Popen, str]:
        program = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        line = next(line for line in program.stdout if line.startswith("The page: "))
        return program, line.removeprefix("The page: ").strip()

    program, url = run()
    try:
        page = browser.open(url)
        page.wait("document.body?.dataset.ready")
        page.mouse(place(page, 0.4, 0.4), place(page, 0.6, 0.6))
        saved(page)
        program.kill()
        program.wait()
        page.mouse(place(page, 0.2, 0.2), place(page, 0.3, 0.3))
        page.wait("document.getElementById('banner').textContent.includes('The program does not answer')")
        assert "last stroke is only in this page" in page.run("document.getElementById('banner').textContent")
        page.mouse(place(page, 0.8, 0.8), place(page, 0.9, 0.9))
        assert "nothing can be painted" in page.run("document.getElementById('hint').textContent")
        program, url = run()
        page = browser.open(url)
        page.wait("document.body?.dataset.ready")
        is_at(page, 6)
        page.wait("document.getElementById('chip').textContent === 'started'")
    finally:
        program.kill()
        program.wait()


def test_page_says_that_the_disk_is_full(browser, start, monkeypatch):
    running = start()
    page = open_page(browser, running)
    save = np.savez_compressed

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(drawing_module.np, "savez_compressed", full)
    page.mouse(place(page, 0.4, 0.4), place(page, 0.6, 0.6))
    page.wait("document.getElementById('banner').textContent.includes('No space left on device')")
    assert running.drawing.slices == {}
    monkeypatch.setattr(drawing_module.np, "savez_compressed", save)
    page.click("#banner button")
    page.wait("document.getElementById('banner').hidden")
    saved(page)
    assert list(running.drawing.slices) == [6]


def test_only_the_last_tab_draws(browser, start):
    running = start()
    first = open_page(browser, running)
    second = open_page(browser, running)
    second.mouse(place(second, 0.4, 0.4), place(second, 0.6, 0.6))
    saved(second)
    values = running.drawing.slices[6].values
    first.front()
    first.wait("document.getElementById('elsewhere').open")
    first.click("#here")
    first.wait("document.getElementById('elsewhere')?.open === false && document.body.dataset.ready")
    first.wait("document.getElementById('chip').textContent === 'started'")
    second.wait("document.getElementById('elsewhere').open")
    np.testing.assert_array_equal(running.drawing.slices[6].values, values)
