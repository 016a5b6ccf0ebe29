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
from monai_conres.draw import Drawing, DrawnSlice, PageServer
from monai_conres.draw import drawing as drawing_module
from monai_conres.files import save_network
from tests.browser import ALT, CONTROL, PROGRAM, SHIFT, Browser, NavigatedError, Page
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


def text(page: Page, name: str) -> str:
    return page.run(f"document.getElementById('{name}').textContent")


def answer(page: Page, path: str, script: str) -> None:
    """Replace what the page gets for the next request of a path: ``script`` returns it and knows ``get()``."""
    page.run(f"""(() => {{
        const fetch = window.fetch;
        window.fetch = (path, options) => {{
            if (!path.startsWith("{path}")) return fetch(path, options);
            window.fetch = fetch;
            const get = () => fetch(path, options);
            {script}
        }};
    }})()""")


FAIL = "return Promise.reject(new TypeError('no connection'));"


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


def test_page_saves_only_what_the_program_has(browser, start, monkeypatch):
    running = start()
    page = open_page(browser, running)
    page.key("d")
    saved(page)
    save = np.savez_compressed

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(drawing_module.np, "savez_compressed", full)
    page.key("ArrowUp")
    page.key("d")
    page.wait("document.getElementById('banner').textContent.includes('No space left on device')")
    page.key("s", CONTROL)
    page.run("new Promise((done) => setTimeout(done, 300))")
    assert "No space left on device" in text(page, "banner")
    assert text(page, "saved") == ""
    assert not running.drawing.out.exists()
    monkeypatch.setattr(drawing_module.np, "savez_compressed", save)
    page.key("s", CONTROL)
    page.wait("document.getElementById('saved').textContent === 'Saved volume.nii.gz'")
    assert page.run("document.getElementById('banner').hidden")
    assert running.drawing.scan.drawn == [6, 7]
    completed = np.moveaxis(running.drawing.completed(), 0, running.drawing.scan.spatial_axis)
    np.testing.assert_array_equal(read(running.drawing.out), completed)


def test_page_never_shows_an_older_answer(browser, start):
    running = start(predict=False)
    page = open_page(browser, running)
    page.run("void (window.hold = new Promise((done) => (window.release = done)))")
    late = "const old = get().then((r) => r.arrayBuffer()); window.held = 1;"
    answer(page, "completed", f"{late} return Promise.all([old, hold]).then(([content]) => new Response(content));")
    running.drawing.predict()
    page.wait("window.held")
    page.key("x")
    page.key("f")
    page.mouse(place(page, 0.5, 0.5))
    page.key("d")
    page.wait("document.getElementById('chip').textContent === 'done'")
    page.wait("document.getElementById('saved').textContent === 'Strokes are kept'")
    page.run("new Promise((done) => setTimeout(done, 500))")  # time for a newer answer to come too early
    assert running.drawing.scan.drawn == [6]
    page.run("window.release()")
    saved(page)
    proposal = running.drawing.completed()[7]
    page.key("ArrowUp")
    page.key("d")
    saved(page)
    np.testing.assert_array_equal(running.drawing.slices[7].values, proposal)
    assert browser.errors == []


def test_page_recovers_from_failed_requests(browser, start):
    running = start(predict=False)
    page = open_page(browser, running)
    page.key("x")
    page.key("f")
    page.mouse(place(page, 0.5, 0.5))
    page.key("d")
    saved(page)
    answer(page, "predicted", FAIL)
    running.drawing.predict()
    page.wait("document.getElementById('banner').textContent.includes('does not answer. Your strokes are kept')")
    page.wait("document.getElementById('banner').hidden")
    page.key("ArrowUp")

    def shown() -> np.ndarray:
        """Slice 7, which the page sends when it is done."""
        page.key("d")
        saved(page)
        values = running.drawing.slices[7].values
        page.key("z", CONTROL)
        saved(page)
        return values

    np.testing.assert_array_equal(shown(), running.drawing.completed()[7])
    before = running.drawing.completed()[7]
    for path, script in (
        ("completed", FAIL),
        ("slices", "return get().then(() => { throw new TypeError('the answer is lost'); });"),
    ):
        answer(page, path, script)
        page.key("ArrowDown")
        page.key("d")  # opens the slice again: now no slice is done
        page.wait("!document.getElementById('banner').hidden")
        page.wait("document.getElementById('banner').hidden")
        saved(page)
        page.key("ArrowUp")
        now = running.drawing.completed()[7]
        assert (now != before).any()
        np.testing.assert_array_equal(shown(), now)
        page.key("ArrowDown")
        page.key("d")
        saved(page)
        page.key("ArrowUp")
    assert browser.errors == []


def test_page_recovers_from_a_missing_image(browser, start):
    running = start(channels=2)
    page = open_page(browser, running)
    answer(page, "image/1", "return Promise.resolve(new Response('{}', {status: 500, statusText: 'no file'}));")
    page.key("c")
    page.wait("document.getElementById('banner').textContent.includes('no file')")
    page.click("#auto")
    page.click("#banner button")
    page.wait("document.getElementById('whiteText').textContent")
    assert page.run("document.getElementById('banner').hidden")
    assert any(sum(color(page, x, 0.4)) > 0 for x in (0.3, 0.4, 0.5))
    assert browser.errors == []


def test_button_of_the_banner_starts_no_second_poll(browser, start):
    page = open_page(browser, start())
    page.run("for (let k = 0; k < 5; k++) document.querySelector('#banner button').click()")
    page.run("""window.asked = 0, window.fetch = ((fetch) => (path, options) => {
        if (path === "state") window.asked++;
        return fetch(path, options);
    })(window.fetch)""")
    page.run("new Promise((done) => setTimeout(done, 4000))")
    assert page.run("window.asked") <= 2  # one in 3 s
    assert browser.errors == []


def test_page_loads_again_after_a_failed_start(browser, start, monkeypatch):
    running = start()
    monkeypatch.setattr(PageServer, "state", lambda server: 1 / 0)
    page = browser.open(running.server.url)
    page.wait("document.getElementById('banner')?.textContent.includes('ZeroDivisionError')")
    monkeypatch.undo()
    page.click("#banner button")
    page.wait("document.body?.dataset.ready")


def test_script_ends_with_its_page(browser, start):
    page = open_page(browser, start())
    page.run("setTimeout(() => location.reload(), 100), 1")
    with pytest.raises(NavigatedError):
        page.run("new Promise(() => {})")
    page.wait("document.body?.dataset.ready")


def test_page_says_that_the_program_hangs(browser, start):
    running = start()
    page = open_page(browser, running)
    with running.drawing._lock:
        page.mouse(place(page, 0.4, 0.4), place(page, 0.6, 0.6))
        assert text(page, "saved") == "Keeping the stroke …"
        page.wait("document.getElementById('banner').textContent.includes('has not answered for 10 s')")
        assert text(page, "saved") == "Keeping the stroke …"
    saved(page)
    assert text(page, "saved") == "Strokes are kept"
    assert page.run("document.getElementById('banner').hidden")
    assert list(running.drawing.slices) == [6]


def test_page_takes_no_stroke_before_it_is_ready(browser, start, monkeypatch):
    running = start()
    running.drawing.change(6, DrawnSlice(np.full((28, 30), 4, np.uint8), done=False))
    image, arrived = PageServer.image, threading.Event()
    monkeypatch.setattr(PageServer, "image", lambda server, channel: arrived.wait(60) and image(server, channel))
    page = browser.open(running.server.url)
    try:
        page.wait("document.getElementById('chip')?.textContent")
        page.mouse(place(page, 0.4, 0.4), place(page, 0.6, 0.6))
        page.key("x")
        page.click("#clear")
        page.click("#done")
    finally:
        arrived.set()
    page.wait("document.body.dataset.ready")
    assert (running.drawing.slices[6].values == 4).all()
    page.key("x")
    saved(page)
    assert not running.drawing.slices[6].values.any()
    assert browser.errors == []


def test_second_finger_paints_nothing(browser, start):
    running = start()
    page = open_page(browser, running)
    page.key("x")
    saved(page)

    def touch(kind: str, *points: tuple[int, float, float]) -> None:
        places = [(number, *place(page, x, y)) for number, x, y in points]
        touched = [{"id": number, "x": x, "y": y} for number, x, y in places]
        page.call("Input.dispatchTouchEvent", type=kind, touchPoints=touched)

    touch("touchStart", (0, 0.2, 0.2))
    touch("touchMove", (0, 0.3, 0.2))
    touch("touchStart", (0, 0.3, 0.2), (1, 0.8, 0.8))
    touch("touchMove", (0, 0.3, 0.2), (1, 0.7, 0.8))
    touch("touchEnd", (1, 0.7, 0.8))
    touch("touchMove", (0, 0.4, 0.2))
    touch("touchEnd")
    saved(page)
    painted = running.drawing.slices[6].values.copy()
    assert {axis.max() - axis.min() < 15 for axis in painted.nonzero()} == {True}  # nothing near the second finger
    page.key("z", CONTROL)
    saved(page)
    assert not running.drawing.slices[6].values.any()
    page.mouse(place(page, 0.8, 0.8))
    saved(page)
    assert running.drawing.slices[6].values.any()
    assert browser.errors == []


def test_keys_work_with_caps_lock_altgr_and_tab(browser, start):
    running = start()
    page = open_page(browser, running)
    page.key("[", CONTROL | ALT)
    assert text(page, "sizeText") == "5"
    page.key("d", ALT)
    page.key("x")
    page.key("Z", CONTROL)  # with Caps Lock
    saved(page)
    assert running.drawing.slices == {}
    page.key("z", CONTROL | SHIFT)  # with Caps Lock, too
    saved(page)
    assert list(running.drawing.slices) == [6]
    page.click("#classes label:nth-child(2)")
    page.wait("document.activeElement.id === 'canvas'")
    page.key("ArrowUp")
    is_at(page, 7)
    page.run("document.querySelector('[name=class]:checked').focus()")
    page.key("ArrowDown")
    page.wait("document.querySelectorAll('[name=class]')[2].checked")
    is_at(page, 7)
    page.run("document.getElementById('clear').focus()")
    page.run("document.getElementById('clear').click()")  # as Enter does
    saved(page)
    assert page.run("document.activeElement.id") == "clear"
    assert browser.errors == []


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
    assert "What you drew is saved." in text(second, "elsewhere")
    np.testing.assert_array_equal(running.drawing.slices[6].values, values)


def test_older_tab_says_that_its_last_stroke_is_lost(browser, start):
    running = start()
    page = open_page(browser, running)
    running.server.tab += 1
    page.mouse(place(page, 0.4, 0.4), place(page, 0.6, 0.6))
    page.wait("document.getElementById('elsewhere').open")
    assert "The last stroke of this tab was not saved." in text(page, "elsewhere")
    assert running.drawing.slices == {}
