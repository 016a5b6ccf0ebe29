"""The page's server: one drawing, on the loopback address of this machine, for those who know the token in the URL."""

from __future__ import annotations

import hmac
import json
import secrets
import sys
import threading
from collections.abc import Mapping
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
from monai.utils import optional_import

from monai_conres.draw.drawing import Drawing, DrawnSlice

nib, _ = optional_import("nibabel", descriptor="{}; install it with: pip install 'monai-conres[draw]'")

__all__ = ["PageServer"]

PAGE = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
HOSTS = ("127.0.0.1", "localhost")


class _Refused(Exception):
    """A request that is refused, with the status and the reason for the page."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class PageServer(ThreadingHTTPServer):
    """Serve the page of a drawing and nothing else. ``serve_forever()`` answers until ``shutdown()``.

    Args:
        drawing: what is drawn.
        class_names: the names of the label values, for the buttons of the page.
        port: the port on 127.0.0.1; 0 takes a free one.

    Attributes:
        url: the address of the page, with the token.

    Raises:
        ValueError: when the port is in use.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, drawing: Drawing, class_names: Mapping[int, str], *, port: int = 0) -> None:
        self.drawing, self.class_names = drawing, class_names
        self.token = secrets.token_urlsafe(24)
        self.tab = 0  # the tab that was opened last; only this one draws
        self._lock = threading.Lock()
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise ValueError(f"expected a free port, cannot use port {port} ({error}); give another --port.") from error
        self.url = f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that is closed or loaded again ends its connections, which is no error of the program."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    @cached_property
    def info(self) -> dict[str, Any]:
        """What does not change: size, directions and names."""
        scan = self.drawing.scan
        order = [scan.spatial_axis, *(axis for axis in range(3) if axis != scan.spatial_axis)]
        spacing = np.linalg.norm(scan.affine[:3, :3], axis=0)
        codes = nib.aff2axcodes(scan.affine)
        return {
            "name": scan.files[0].name,
            "shape": [scan.shape[axis] for axis in order],
            "spacing": [float(spacing[axis]) for axis in order],
            "codes": [codes[axis] for axis in order],  # where each axis goes to: R, L, A, P, S or I
            "channels": list(scan.scans.channels),
            "classes": [{"value": value, "name": self.class_names[value]} for value in self.drawing.values],
            "out": str(self.drawing.out),
            "drawing": str(self.drawing.file),
            "usesResidual": scan.uses_residual,
        }

    def state(self) -> dict[str, Any]:
        """What changes."""
        drawing = self.drawing
        completes = drawing.completes
        ranking = drawing.ranking() if completes else {}
        return {
            "tab": self.tab,
            "slices": {number: part.done for number, part in drawing.slices.items()},
            "progress": drawing.progress,
            "completes": completes,
            "problem": drawing.problem,
            "ranking": [[number, error] for number, error in ranking.items()][:5],
        }

    def image(self, channel: int) -> tuple[float, float, np.ndarray]:
        """A channel in steps of 1 / 65535 from its smallest to its largest value, and these two."""
        image = self.drawing.image(channel)
        low, high = float(image.min()), float(image.max())
        image -= low
        image *= 65535 / max(high - low, 1e-30)
        return low, high, image.round(out=image).astype("<u2")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # of a connection that says nothing
    server: PageServer

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, *arguments: Any) -> None:
        """Nothing: the terminal shows what the user needs to know."""

    def _answer(self, method: Any) -> None:
        self._unread = True
        try:
            place = self._place()
            method(*place)
        except _Refused as error:
            self._send_error(error.status, str(error))
        except ValueError as error:
            self._send_error(HTTPStatus.BAD_REQUEST, str(error))
        except (ConnectionError, TimeoutError):  # the page was closed, or sends no more
            self.close_connection = True
        except OSError as error:
            text = f"cannot write ({error.strerror or error}); free space or permissions, then try again"
            self._send_error(HTTPStatus.INSUFFICIENT_STORAGE, f"{text}.")
        except Exception as error:
            self._send_error(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")

    def _place(self) -> tuple[list[str], dict[str, str]]:
        """The parts of the path after the token, and the query."""
        host = self.headers.get("Host", "").rpartition(":")
        if (host[0] or host[2]) not in HOSTS:  # a name that leads here is how other sites would reach this server
            raise _Refused(HTTPStatus.FORBIDDEN, "wrong host")
        url = urlsplit(self.path)
        _, token, *parts = [*url.path.split("/"), ""]
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise _Refused(HTTPStatus.FORBIDDEN, "wrong token; open the address that the command prints")
        return [part for part in parts if part], {key: values[-1] for key, values in parse_qs(url.query).items()}

    def _get(self, parts: list[str], query: dict[str, str]) -> None:
        server, drawing = self.server, self.server.drawing
        match parts:
            case [] | ["page.css" | "page.js"]:
                name, kind = PAGE["/".join(parts)]
                self._send((resources.files(__package__) / "page" / name).read_bytes(), kind)
            case ["info"]:
                self._send_json(server.info)
            case ["state"]:
                self._send_json(server.state())
            case ["image", channel] if channel.isdecimal() and int(channel) < len(drawing.scan.scans.channels):
                low, high, image = server.image(int(channel))
                self._send(image, headers={"X-Low": repr(low), "X-High": repr(high)})
            case ["slices", number] if number.isdecimal() and int(number) in drawing.slices:
                self._send(drawing.slices[int(number)].values)
            case ["predicted"] if drawing.completes:
                self._send(drawing.predicted())
            case ["completed"] if drawing.completes:
                self._send(drawing.completed(self._range(query)))
            case ["doubt"] if drawing.completes:
                self._send(drawing.doubt(self._range(query)))
            case _:
                raise _Refused(HTTPStatus.NOT_FOUND, "there is no such thing")

    def _post(self, parts: list[str], query: dict[str, str]) -> None:
        body = self._body()
        with self.server._lock:  # no other tab takes over between the check of the tab and the change
            answer = self._change(parts, body)
        if parts == ["save"]:  # strokes do not wait for it
            answer = {"files": [str(file) for file in self.server.drawing.save()]}
        self._send_json(answer)

    def _change(self, parts: list[str], body: bytes) -> dict[str, Any]:
        server, drawing = self.server, self.server.drawing
        if parts == ["claim"]:
            server.tab += 1
            return server.state()
        if self.headers.get("X-Tab") != str(server.tab):
            raise _Refused(HTTPStatus.CONFLICT, "this drawing is open in another tab")
        match parts:
            case ["slices", number, "open" | "done" | "none" as kind] if number.isdecimal():
                drawn = None
                if kind != "none":
                    shape = server.info["shape"][1:]
                    if len(body) != shape[0] * shape[1]:
                        raise ValueError(f"expected {shape[0]} x {shape[1]} bytes, got {len(body)}.")
                    drawn = DrawnSlice(np.frombuffer(body, np.uint8).reshape(shape).copy(), kind == "done")
                changed = drawing.change(int(number), drawn)
                return {**server.state(), "changed": [changed.start, changed.stop]}
            case ["save"]:
                return {}
            case _:
                raise _Refused(HTTPStatus.NOT_FOUND, "there is no such thing")

    def _range(self, query: dict[str, str]) -> range | None:
        if not query:
            return None
        size = self.server.info["shape"][0]
        try:
            low, high = int(query["from"]), int(query["to"])
        except (KeyError, ValueError) as error:
            raise ValueError("expected whole numbers in from and to.") from error
        if not 0 <= low < high <= size:
            raise ValueError(f"expected a range in 0 to {size}, got {low} to {high}.")
        return range(low, high)

    def _body(self) -> bytes:
        length, largest = self.headers.get("Content-Length", "0"), 1 << 26
        if not length.isdecimal() or int(length) > largest:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected up to {largest} bytes")
        body = self.rfile.read(int(length))
        self._unread = False
        return body

    def _send(
        self,
        content: Any,
        kind: str = "application/octet-stream",
        headers: Mapping[str, str] = {},
        status: HTTPStatus = HTTPStatus.OK,
    ) -> None:
        data = content.tobytes() if isinstance(content, np.ndarray) else content
        self.send_response(status)
        for name, value in {**HEADERS, **headers, "Content-Type": kind, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _send_json(self, content: Mapping[str, Any], **options: Any) -> None:
        self._send(json.dumps(content).encode(), "application/json", **options)

    def _send_error(self, status: HTTPStatus, reason: str) -> None:
        self.close_connection = self.close_connection or self._unread
        try:
            self._send_json(
                {"error": reason}, status=status, headers={"Connection": "close"} if self.close_connection else {}
            )
        except OSError:
            self.close_connection = True
