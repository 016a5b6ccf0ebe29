"""The page's drawing, its file and its server, without a browser."""

from __future__ import annotations

import dataclasses
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

import nibabel as nib
import numpy as np
import pytest
import torch

from monai_conres import ConResNet
from monai_conres.__main__ import main
from monai_conres.completion import ScanCompletion, complete_scan
from monai_conres.draw import Drawing, DrawnSlice, PageServer
from monai_conres.draw import drawing as drawing_module
from monai_conres.files import ScanSettings, TrainedNetwork, save_network
from tests.nih import ORIGIN, SPACING, write_series

CLASSES = {"ET": (4,), "WT": (1, 2, 4), "TC": (1, 4)}
VALUES = [0, 1, 2, 4]
SIZE = (12, 15, 9)
DONE = np.ones((12, 15), np.uint8)


def network(axis: int = -1, activation: str = "softmax", channels: int = 1) -> TrainedNetwork:
    """A network that was never trained: it is in doubt everywhere."""
    scans = ScanSettings(
        channels=("T1", "T2")[:channels], patch_size=(16, 16, 8), classes=CLASSES, activation=activation
    )
    torch.manual_seed(0)
    net = ConResNet(
        channels,
        scans.out_channels,
        include_background=activation == "sigmoid",
        spatial_axis=axis,
        channels=(8, 16),
        strides=((2, 2, 1),),
        blocks=(1, 1, 1),
    )
    return TrainedNetwork(net.eval(), scans, {})


def write_scan(file: Path, codes: str = "RAS", size: tuple[int, ...] = SIZE) -> Path:
    """A noisy scan, stored along other axes; sizes and voxels differ along all axes."""
    volume = np.random.default_rng(0).normal(size=size).astype(np.float32)
    image = nib.Nifti1Image(volume, np.diag([1.0, 1.5, 4.0, 1.0]))
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes))
    nib.save(image.as_reoriented(turn), file)
    return file


def write_label(file: Path, value: int) -> Path:
    """A label map of the voxels of :func:`write_scan` with one value in one slice."""
    label = np.zeros(SIZE, np.uint8)
    label[2:5, 3:9, 4] = value
    nib.save(nib.Nifti1Image(label, np.diag([1.0, 1.5, 4.0, 1.0])), file)
    return file


def start(folder: Path, trained: TrainedNetwork | None = None, codes: str = "RAS", **arguments) -> Drawing:
    scan = folder / "scan.nii.gz"
    if not scan.exists():
        write_scan(scan, codes)
    return Drawing(ScanCompletion(trained or network(), scan), folder / "volume.nii.gz", **arguments)


def plane(drawing: Drawing, seed: int) -> np.ndarray:
    """Random label values of a slice."""
    shape = [size for axis, size in enumerate(drawing.scan.shape) if axis != drawing.scan.spatial_axis]
    return np.random.default_rng(seed).choice(VALUES, shape).astype(np.uint8)


def read(file: Path) -> np.ndarray:
    return np.asarray(nib.load(file).dataobj)


# what is drawn


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("codes", "axis"), [("RAS", -1), ("LPS", -1), ("PIR", 0), ("SLA", 1)])
def test_saved_volume_equals_what_complete_gives(tmp_path, codes, axis, activation):
    trained = network(axis, activation)
    drawing = start(tmp_path, trained, codes)
    size = drawing.scan.shape[drawing.scan.spatial_axis]
    drawing.change(1, DrawnSlice(plane(drawing, 1), done=True))  # before the network has run
    drawing.predict()
    drawing.change(size - 2, DrawnSlice(plane(drawing, 2), done=True))
    drawing.change(4, DrawnSlice(0 * plane(drawing, 3), done=True))
    drawing.change(5, DrawnSlice(plane(drawing, 4), done=False))  # somebody still works on it
    drawing.change(size - 2, None)
    drawing.change(3, DrawnSlice(plane(drawing, 5), done=True))
    assert [number for number, part in drawing.slices.items() if not part.done] == [5]
    volume, drawn = drawing.save()
    slices = [1, 3, 4]
    expected = complete_scan(trained, tmp_path / "scan.nii.gz", drawn, slices=slices)
    np.testing.assert_array_equal(read(volume), expected.label[0])
    np.testing.assert_array_equal(np.moveaxis(drawing.completed(), 0, expected.spatial_axis), expected.label[0])
    np.testing.assert_array_equal(np.moveaxis(drawing.predicted(), 0, expected.spatial_axis), expected.predicted[0])
    by_slice = np.moveaxis(read(drawn), expected.spatial_axis, 0)
    for number, seed in ((1, 1), (3, 5)):
        np.testing.assert_array_equal(by_slice[number], plane(drawing, seed))
    assert not np.delete(by_slice, slices, 0).any()
    scan = nib.load(tmp_path / "scan.nii.gz")
    for file in (volume, drawn):
        written = nib.load(file)
        assert written.shape == scan.shape
        np.testing.assert_array_equal(written.affine, scan.affine)
        assert written.get_data_dtype() == np.uint8


def test_drawing_of_another_scan_of_the_same_size_is_refused(tmp_path):
    """As of two patients in one folder, where both scans have the name t1.nii.gz."""
    drawing = start(tmp_path)
    drawing.change(3, DrawnSlice(DONE, done=True))
    image = nib.load(tmp_path / "scan.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + 1, image.affine), tmp_path / "scan.nii.gz")
    with pytest.raises(ValueError, match=r"drawing of this scan in .*, got other voxels"):
        start(tmp_path)


def test_values_keep_their_meaning_in_a_drawing(tmp_path):
    start(tmp_path).change(3, DrawnSlice(DONE, done=True))
    for classes, agrees in (({**CLASSES, "new": (7,)}, True), ({"WT": (4,), "ET": (1, 2, 4), "TC": (1, 4)}, False)):
        other = network()
        other = dataclasses.replace(
            other, scans=dataclasses.replace(other.scans, classes=classes, activation="sigmoid")
        )
        if agrees:
            assert list(start(tmp_path, other).slices) == [3]
        else:
            with pytest.raises(ValueError, match="got other classes"):
                start(tmp_path, other)


def test_drawing_of_an_older_version_continues(tmp_path):
    drawing = start(tmp_path)
    drawing.change(3, DrawnSlice(DONE, done=True))
    with np.load(drawing.file) as file:
        content = {name: value for name, value in file.items() if name not in ("voxels", "classes")}
    with open(drawing.file, "wb") as file:
        np.savez_compressed(file, **content)
    assert list(start(tmp_path).slices) == [3]


@pytest.mark.parametrize("name", ["volume.nii.gz", "volume_drawn.nii.gz"])
@pytest.mark.parametrize("again", [False, True])
def test_save_does_not_replace_what_others_wrote(tmp_path, name, again):
    drawing = start(tmp_path)
    drawing.predict()
    drawing.change(3, DrawnSlice(DONE, done=True))
    drawing.save()
    drawing.save()  # its own result
    write_label(tmp_path / name, 2)
    if again:
        drawing = start(tmp_path)
        drawing.predict()
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"or the last result, in .*{name}, got another file; move it away"):
        drawing.save()
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    (tmp_path / name).unlink()
    drawing.save()


def test_drawing_whose_file_is_gone_is_written_again(tmp_path):
    drawing = start(tmp_path)
    drawing.change(3, DrawnSlice(DONE, done=True))
    drawing.file.unlink()
    drawing.change(5, DrawnSlice(DONE, done=True))
    assert sorted(start(tmp_path).slices) == [3, 5]


def test_change_tells_the_slices_that_may_differ(tmp_path):
    drawing = start(tmp_path)
    drawing.predict()
    assert drawing.change(2, DrawnSlice(DONE, done=False)) == range(0)
    assert drawing.change(2, DrawnSlice(DONE, done=True)) == range(9)
    before = drawing.completed()
    assert drawing.change(6, DrawnSlice(2 * DONE, done=True)) == range(2, 9)
    after = drawing.completed()
    np.testing.assert_array_equal(before[:3], after[:3])
    np.testing.assert_array_equal(drawing.completed(range(2, 9)), after[2:])
    np.testing.assert_array_equal(drawing.doubt(range(4, 7)), drawing.doubt()[4:7])
    assert not drawing.doubt(range(6, 7)).any()
    assert set(drawing.ranking()) == {0, 1, 3, 4, 5, 7, 8}
    assert drawing.change(6, DrawnSlice(2 * DONE, done=False)) == range(2, 9)
    np.testing.assert_array_equal(drawing.completed(), before)
    assert 6 not in drawing.ranking()


def test_drawing_continues_after_the_program_was_killed(tmp_path):
    drawing = start(tmp_path)
    drawing.change(2, DrawnSlice(plane(drawing, 1), done=True))
    drawing.change(7, DrawnSlice(plane(drawing, 2), done=False))
    drawing.change(5, DrawnSlice(0 * DONE, done=True))
    again = start(tmp_path)  # the first one never ended
    assert {number: part.done for number, part in again.slices.items()} == {2: True, 5: True, 7: False}
    for number, part in again.slices.items():
        np.testing.assert_array_equal(part.values, drawing.slices[number].values)
    for each in (drawing, again):
        each.predict()
    np.testing.assert_array_equal(again.completed(), drawing.completed())
    again.change(2, None)
    with pytest.raises(ValueError, match="a second program draws on it"):
        drawing.change(2, None)


def test_drawing_starts_from_a_label_map(tmp_path):
    label = np.zeros(SIZE, np.uint8)
    label[3:6, 2:5, [1, 4]] = 4
    file = tmp_path / "started.nii.gz"
    nib.save(nib.Nifti1Image(label, np.diag([1.0, 1.5, 4.0, 1.0])), file)
    drawing = start(tmp_path, drawn=file)
    assert {number: part.done for number, part in drawing.slices.items()} == {1: True, 4: True}
    np.testing.assert_array_equal(drawing.slices[4].values, label[..., 4])
    assert drawing.file.exists()
    label[..., [0, 2, 3, 5, 6, 8]] = 255  # slice 7 is drawn empty
    nib.save(nib.Nifti1Image(label, np.diag([1.0, 1.5, 4.0, 1.0])), file)
    drawing.file.unlink()
    assert list(start(tmp_path, drawn=file, ignore_index=255).slices) == [1, 4, 7]


def test_full_disk_loses_nothing(tmp_path, monkeypatch):
    drawing = start(tmp_path)
    drawing.predict()
    drawing.change(2, DrawnSlice(DONE, done=True))
    drawing.save()
    files = {file: file.read_bytes() for file in (drawing.file, drawing.out, drawing.drawn_file)}
    shown = drawing.completed()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(drawing_module.np, "savez_compressed", full)
    monkeypatch.setattr(nib, "save", full)
    with pytest.raises(OSError, match="No space left"):
        drawing.change(6, DrawnSlice(DONE, done=True))
    with pytest.raises(OSError, match="No space left"):
        drawing.save()
    assert list(drawing.slices) == [2]
    np.testing.assert_array_equal(drawing.completed(), shown)
    assert {file: file.read_bytes() for file in files} == files
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["scan.nii.gz", *(file.name for file in files)])


@pytest.mark.slow  # starts a second program
@pytest.mark.parametrize("half", ["volume.nii.gz", "volume_drawn.nii.gz"])
def test_killed_save_leaves_complete_files(tmp_path, half):
    drawing = start(tmp_path)
    drawing.change(2, DrawnSlice(DONE, done=True))
    drawing.predict()
    drawing.save()
    files = {file.name: file.read_bytes() for file in (drawing.file, drawing.out, drawing.drawn_file)}
    code = f"""if True:
        import os, signal
        from pathlib import Path
        import nibabel as nib
        from tests.test_draw import start
        drawing, write = start(Path({str(tmp_path)!r})), nib.save
        drawing.predict()

        def save(image, path):
            write(image, path)
            if Path(path).name == {half!r}:
                os.truncate(path, 40)
                os.kill(os.getpid(), signal.SIGKILL)

        nib.save = save
        drawing.save()"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    again = start(tmp_path)
    again.predict()
    np.testing.assert_array_equal(again.completed(), np.moveaxis(read(drawing.out), -1, 0))
    again.save()
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == sorted(["scan.nii.gz", *files])


def test_series_of_dicom_files_is_drawn_on_like_a_scan(tmp_path):
    write_series(tmp_path / "series", np.random.default_rng(0).integers(-1000, 1000, (12, 15, 9)))
    drawing = Drawing(ScanCompletion(network(), tmp_path / "series"), tmp_path / "volume.nii.gz")
    drawing.change(2, DrawnSlice(DONE, done=True))
    drawing.predict()
    volume, drawn = drawing.save()
    assert nib.aff2axcodes(nib.load(volume).affine) == ("L", "P", "S")
    np.testing.assert_allclose(nib.load(volume).affine[:3, 3], (-ORIGIN[0], -ORIGIN[1], ORIGIN[2]))
    np.testing.assert_allclose(nib.load(drawn).header.get_zooms(), SPACING, rtol=1e-6)
    np.testing.assert_array_equal(read(volume)[..., 2], DONE)


def test_drawing_works_when_the_network_stops(tmp_path):
    trained = network()
    trained.network.with_residual = lambda image: 1 / 0
    drawing = start(tmp_path, trained)
    drawing.predict()
    assert drawing.problem == "ZeroDivisionError: division by zero"
    drawing.change(2, DrawnSlice(DONE, done=True))
    with pytest.raises(ValueError, match="expected the network's result before saving"):
        drawing.save()
    assert list(start(tmp_path).slices) == [2]


def test_progress_counts_the_windows(tmp_path):
    trained = network()
    scan = write_scan(tmp_path / "scan.nii.gz", size=(20, 17, 15))
    seen: list[float] = []
    ScanCompletion(trained, scan).predict(progress=seen.append)
    assert seen == pytest.approx([k / 12 for k in range(1, 13)])  # 2 x 2 x 3 windows of 16 x 16 x 8


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: {"out": folder / "volume.png"}, r"ends with .nii or .nii.gz"),
        (lambda folder: (folder / "volume.nii.gz").touch(), "a new name for the result"),
        (lambda folder: (folder / "volume_drawn.nii.gz").touch(), "a new name for the result"),
        (lambda folder: (folder / "volume.drawing.npz").write_bytes(b"PK") and None, "a drawing in .* or a broken one"),
        (lambda folder: (folder / "volume.drawing.npz").touch(), "a drawing in .* or a broken one"),
        (lambda folder: np.savez(folder / "volume.drawing.npz", a=1), "a drawing in .* or a broken one"),
        (lambda folder: {"drawn": write_scan(folder / "other.nii.gz")}, "expected whole numbers"),
        (lambda folder: {"drawn": write_label(folder / "other.nii.gz", 3)}, "expected the values .* got 3"),
        (lambda folder: {"drawn": write_scan(folder / "other.nii.gz", "LPS")}, "expected the same affine"),
        (lambda folder: {"drawn": write_scan(folder / "other.nii.gz", size=(12, 15, 8))}, "expected the same size"),
    ],
)
def test_drawing_refuses_files(tmp_path, prepare, message):
    scan = ScanCompletion(network(), write_scan(tmp_path / "scan.nii.gz"))
    arguments = {"out": tmp_path / "volume.nii.gz"} | (prepare(tmp_path) or {})
    with pytest.raises(ValueError, match=message):
        Drawing(scan, **arguments)


def test_drawing_is_not_replaced_by_a_label_map(tmp_path):
    start(tmp_path).change(1, DrawnSlice(DONE, done=False))
    with pytest.raises(ValueError, match="leave out --drawn to continue"):
        start(tmp_path, drawn=tmp_path / "scan.nii.gz")


def test_drawing_with_classes_of_another_network_is_refused(tmp_path):
    start(tmp_path).change(1, DrawnSlice(4 * DONE, done=False))
    trained = network()
    scans = ScanSettings(
        channels=("T1",), patch_size=(16, 16, 8), classes={"WT": (1, 2), "TC": (1,)}, activation="softmax"
    )
    with pytest.raises(ValueError, match=r"the network knows, got \[4\]. The drawing is in .*volume.drawing.npz"):
        start(tmp_path, TrainedNetwork(trained.network, scans, {}))


def test_drawing_of_another_scan_is_refused(tmp_path):
    start(tmp_path).change(1, DrawnSlice(DONE, done=False))
    write_scan(tmp_path / "scan.nii.gz", "LPS")
    with pytest.raises(ValueError, match="a drawing of this scan"):
        start(tmp_path)


@pytest.mark.parametrize(
    ("number", "values", "message"),
    [
        (9, DONE, "slices from 0 to 8, got 9"),
        (-1, DONE, "slices from 0 to 8, got -1"),
        (2, DONE.T, r"shape \(12, 15\)"),
        (2, 3 * DONE, r"values \[0, 1, 2, 4\], which the network knows, got \[3\]"),
    ],
)
def test_drawing_refuses_wrong_slices(tmp_path, number, values, message):
    drawing = start(tmp_path)
    with pytest.raises(ValueError, match=message):
        drawing.change(number, DrawnSlice(values, done=True))
    assert not drawing.slices


# the server


@pytest.fixture
def server(tmp_path) -> Iterator[PageServer]:
    page = PageServer(start(tmp_path), {1: "label 1", 2: "label 2", 4: "ET"})
    thread = threading.Thread(target=page.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield page
    page.shutdown()
    thread.join()
    page.server_close()


def ask(server: PageServer, path: str, body: bytes | None = None, *, token: str | None = None, **headers: str):
    """Status and answer of a request; ``path`` follows the token."""
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    place = f"/{server.token if token is None else token}/{path}"
    connection.request("GET" if body is None else "POST", place, body, names)
    response: HTTPResponse = connection.getresponse()
    content = response.read()
    connection.close()
    is_json = response.headers["Content-Type"] == "application/json"
    return response.status, json.loads(content) if is_json else content


def test_server_shows_the_page_and_nothing_else(server):
    assert server.server_address[0] == "127.0.0.1"
    status, page = ask(server, "")
    assert status == 200
    assert b"<!doctype html>" in page
    for name in ("page.css", "page.js"):
        assert ask(server, name)[0] == 200
        assert name.encode() in page
    for text in (page, ask(server, "page.css")[1], ask(server, "page.js")[1]):
        assert b"http:" not in text
        assert b"https:" not in text
    folder = server.drawing.out.parent
    for path in ("../page.js", "page.html", "server.py", "scan.nii.gz", f"/{folder}/scan.nii.gz", "..%2f..", "image/1"):
        assert ask(server, path)[0] == 404, path
    assert ask(server, "image/-1")[0] == ask(server, "completed")[0] == ask(server, "slices/2")[0] == 404


def test_server_wants_token_host_and_tab(server):
    for token in ("", "x", server.token[:-1], f"{server.token}x", server.token.swapcase(), "%C3%A9"):
        assert ask(server, "state", token=token)[0] == 403
    assert ask(server, "state", Host="evil.example:80")[0] == 403
    assert ask(server, "state", Host="localhost:1234")[0] == 200
    body = DONE.tobytes()
    assert ask(server, "slices/2/done", body)[0] == 409
    first, second = (ask(server, "claim", b"")[1]["tab"] for _ in range(2))
    status, answer = ask(server, "slices/2/done", body, X_Tab=str(first))
    assert (status, answer["error"]) == (409, "this drawing is open in another tab")
    assert not server.drawing.slices
    assert ask(server, "slices/2/done", body, X_Tab=str(second))[0] == 200
    assert ask(server, "state")[1]["tab"] == second


def test_tab_that_takes_over_knows_the_last_change_of_the_older_one(server, monkeypatch):
    older = str(ask(server, "claim", b"")[1]["tab"])
    change, entered, go = server.drawing.change, threading.Event(), threading.Event()

    def slow(*arguments):
        entered.set()
        assert go.wait(20)
        return change(*arguments)

    monkeypatch.setattr(server.drawing, "change", slow)
    statuses, claims = [], []
    stroke = threading.Thread(
        target=lambda: statuses.append(ask(server, "slices/2/open", DONE.tobytes(), X_Tab=older)[0])
    )
    claim = threading.Thread(target=lambda: claims.append(ask(server, "claim", b"")[1]))
    stroke.start()
    assert entered.wait(20)
    claim.start()
    claim.join(0.2)  # time to answer too early
    go.set()
    stroke.join()
    claim.join()
    assert statuses == [200]
    assert claims[0]["slices"] == {"2": False}


def test_server_takes_slices_and_gives_volumes(server):
    tab = str(ask(server, "claim", b"")[1]["tab"])
    values = plane(server.drawing, 1)
    assert ask(server, "info")[1]["shape"] == [9, 12, 15]
    assert ask(server, "slices/2/open", values.tobytes(), X_Tab=tab)[1]["slices"] == {"2": False}
    assert ask(server, "slices/2")[1] == values.tobytes()
    server.drawing.predict()
    status, answer = ask(server, "slices/2/done", values.tobytes(), X_Tab=tab)
    assert (status, answer["slices"], answer["changed"]) == (200, {"2": True}, [0, 9])
    assert answer["ranking"][0][0] == next(iter(server.drawing.ranking()))
    completed = np.frombuffer(ask(server, "completed")[1], np.uint8).reshape(9, 12, 15)
    np.testing.assert_array_equal(completed, server.drawing.completed())
    np.testing.assert_array_equal(completed[2], values)
    assert ask(server, "completed?from=2&to=3")[1] == values.tobytes()
    assert len(ask(server, "doubt?from=1&to=3")[1]) == 2 * 12 * 15
    status, answer = ask(server, "save", b"", X_Tab=tab)
    assert (status, answer) == (200, {"files": [str(server.drawing.out), str(server.drawing.drawn_file)]})
    assert ask(server, "slices/2/none", b"", X_Tab=tab)[1]["slices"] == {}
    status, answer = ask(server, "save", b"", X_Tab=tab)
    assert status == 400
    assert "expected a slice that is done" in answer["error"]


def test_server_gives_the_voxels_of_the_scan(server):
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("GET", f"/{server.token}/image/0")
    response = connection.getresponse()
    low, high = float(response.headers["X-Low"]), float(response.headers["X-High"])
    steps = np.frombuffer(response.read(), "<u2").reshape(9, 12, 15)
    connection.close()
    scan = np.moveaxis(nib.load(server.drawing.scan.files[0]).get_fdata(), -1, 0)
    np.testing.assert_allclose(low + steps * (high - low) / 65535, scan, atol=(high - low) / 65535)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("slices/9/done", DONE.tobytes(), 400),
        ("slices/2/done", DONE.tobytes()[1:], 400),
        ("slices/2/done", (3 * DONE).tobytes(), 400),
        ("slices/2/closed", DONE.tobytes(), 404),
        ("slices/two/done", DONE.tobytes(), 404),
        ("anything", b"", 404),
        ("save", b"", 400),
    ],
)
def test_server_refuses_bad_requests(server, path, body, status):
    tab = str(ask(server, "claim", b"")[1]["tab"])
    got, answer = ask(server, path, body, X_Tab=tab)
    assert got == status
    assert answer["error"]
    assert not server.drawing.slices


def test_server_refuses_bad_ranges(server):
    server.drawing.predict()
    for query in ("from=3&to=2", "from=0&to=10", "from=a&to=2", "from=1"):
        assert ask(server, f"completed?{query}")[0] == 400


def test_strokes_do_not_wait_until_the_results_are_written(server, monkeypatch):
    drawing = server.drawing
    drawing.predict()
    tab = {"X_Tab": str(ask(server, "claim", b"")[1]["tab"])}
    assert ask(server, "slices/3/done", DONE.tobytes(), **tab)[0] == 200
    write, begun, go_on = drawing_module.write_label_map, threading.Event(), threading.Event()

    def slow(*arguments):
        begun.set()
        assert go_on.wait(60)
        write(*arguments)

    monkeypatch.setattr(drawing_module, "write_label_map", slow)
    saving = threading.Thread(target=ask, args=(server, "save", b""), kwargs=tab)
    saving.start()
    try:
        assert begun.wait(60)
        assert ask(server, "slices/5/done", (2 * DONE).tobytes(), **tab)[0] == 200
    finally:
        go_on.set()
        saving.join()
    assert not read(drawing.drawn_file)[..., 5].any()  # saved is what was drawn before
    assert (read(drawing.drawn_file)[..., 3] == 1).all()


def test_server_says_that_the_disk_is_full(server, monkeypatch):
    tab = str(ask(server, "claim", b"")[1]["tab"])

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(drawing_module.np, "savez_compressed", full)
    status, answer = ask(server, "slices/2/open", DONE.tobytes(), X_Tab=tab)
    assert status == 507
    assert "cannot write (No space left on device)" in answer["error"]


def test_server_refuses_a_port_in_use(server):
    with pytest.raises(ValueError, match=r"expected a free port, .* give another --port"):
        PageServer(server.drawing, server.class_names, port=server.server_port)
    with pytest.raises(ValueError, match="expected a free port"):
        PageServer(server.drawing, server.class_names, port=70000)


# the command


def fails(arguments: list, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["draw", *map(str, arguments)])
    assert stop.value.code == 2
    return capsys.readouterr().err.rpartition("error: ")[2]


def test_command_refuses_bad_input_before_the_page_opens(tmp_path, capsys):
    trained = network()
    save_network(tmp_path / "run", trained.network, trained.scans)
    scan, text = write_scan(tmp_path / "scan.nii.gz"), tmp_path / "text.nii.gz"
    text.write_text("no scan")
    common = ["--network", tmp_path / "run", "--no-browser"]
    assert str(text) in fails([*common, text], capsys)
    assert "no.nii.gz" in fails([*common, tmp_path / "no.nii.gz"], capsys)
    assert "expected 1 channels, T1, got 2" in fails([*common, scan, scan], capsys)
    assert "ends with .nii" in fails([*common, scan, "--out", tmp_path / "a.png"], capsys)
    assert "found no" in fails(["--network", tmp_path, scan], capsys)
    write_series(tmp_path / "study" / "series", np.zeros((4, 5, 6), int))
    assert f"give one of the folders below it: {tmp_path / 'study' / 'series'}" in fails(
        [*common, tmp_path / "study"], capsys
    )
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"cannot use port {port}" in fails([*common, scan, "--port", port], capsys)


def test_command_prints_the_address_and_how_to_go_on(tmp_path, capsys, monkeypatch):
    trained = network()
    save_network(tmp_path / "run", trained.network, trained.scans)
    scan = write_scan(tmp_path / "scan.nii.gz")
    monkeypatch.chdir(tmp_path)

    def stop(server: PageServer) -> None:
        url = urlsplit(server.url)
        assert (url.hostname, url.path) == ("127.0.0.1", f"/{server.token}/")
        assert server.class_names == {1: "label 1", 2: "label 2", 4: "ET"}
        raise KeyboardInterrupt

    monkeypatch.setattr(PageServer, "serve_forever", stop)
    command = ["draw", "--network", str(tmp_path / "run"), str(scan)]
    main([*command, "--no-browser"])
    out = capsys.readouterr().out
    assert "The page: http://127.0.0.1:" in out
    assert f"The same command continues the drawing in {tmp_path / 'scan_completed.drawing.npz'}" in out
    label = write_label(tmp_path / "drawn.nii.gz", 4)
    main([*command, "--no-browser", "--out", "other.nii.gz", "--drawn", str(label)])
    assert "The same command without --drawn continues the drawing" in capsys.readouterr().out


def test_command_serves_while_a_browser_of_the_terminal_runs(tmp_path, monkeypatch):
    trained = network()
    save_network(tmp_path / "run", trained.network, trained.scans)
    scan = write_scan(tmp_path / "scan.nii.gz")
    monkeypatch.chdir(tmp_path)
    opened, closed, served = threading.Event(), threading.Event(), []

    def text_browser(url: str) -> None:
        opened.set()
        closed.wait(5)
        closed.set()

    def serve(server: PageServer) -> None:
        assert opened.wait(20)
        served.append(not closed.is_set())
        closed.set()

    monkeypatch.setattr("webbrowser.open", text_browser)
    monkeypatch.setattr(PageServer, "serve_forever", serve)
    main(["draw", "--network", str(tmp_path / "run"), str(scan)])
    assert served == [True]
