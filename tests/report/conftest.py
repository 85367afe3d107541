"""A page taken apart, and a browser to look at it."""

import base64
import fcntl
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

# The least contrast (WCAG 2.1) of any text with what lies behind it, and where.
CONTRAST = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const rgba = c => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data] };
  const light = c => c.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) {
    const c = rgba(getComputedStyle(e).backgroundColor); if (c[3] == 255) return c }
    return [255, 255, 255, 255] };
  let least = [21, ""];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, style = getComputedStyle(e);
    if (!walk.currentNode.data.trim()) continue;
    const ink = light(rgba(e.namespaceURI.endsWith("svg") ? style.fill : style.color));
    const page = light(behind(e));
    const ratio = (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
    if (ratio < least[0]) least = [ratio, walk.currentNode.data.slice(0, 40)];
  }
  return least })()"""

VOID = {"meta", "img", "source", "br", "link"}


class Page(HTMLParser):
    """A page taken apart; an element that is not closed in its place is an error."""

    def __init__(self, content: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # innermost element, text
        self._open: list[str] = []
        self.feed(content)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> out of place"

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for element, attributes in self.elements if element == name]

    @property
    def text(self) -> str:
        return "\n".join(text for element, text in self.texts if element != "style")

    def points(self, label: str, style: str) -> np.ndarray:
        """Return the points of the line of a class, in the chart with a label."""
        inside = False
        for element, attributes in self.elements:
            if element == "svg":
                inside = attributes.get("aria-label", "").startswith(label)
            if inside and element == "path" and attributes["class"].startswith(style):
                found = re.findall(r"[ML]([\d.-]+) ([\d.-]+)", attributes["d"])
                return np.array(found, float)
        raise AssertionError(f"no line {style} in a chart {label}")

    def assert_is_harmless(self) -> None:
        """Check that there is no code, and nothing that a browser would fetch."""
        assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & {
            element for element, _ in self.elements
        }
        for element, attributes in self.elements:
            for name, value in attributes.items():
                assert not name.startswith("on"), (element, name)
                if name in ("src", "href", "srcset", "xlink:href", "action", "data", "poster"):
                    assert value.startswith("data:"), (element, name, value[:80])
        css = "".join(text for element, text in self.texts if element == "style")
        assert "url(" not in css and "@import" not in css


class Browser:
    """A headless Chromium, spoken to over its pipe (the DevTools protocol)."""

    _NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
    _FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--mute-audio",
              "--remote-debugging-pipe")  # fmt: skip
    # The browser reads from descriptor 3 and writes to 4.
    _START = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4);"
        "os.execv(sys.argv[3], sys.argv[3:])"
    )

    def __init__(self, profile: str):
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
        words = [self.find(), *self._FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._START, *map(str, ends), *words],
            pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (theirs_in, theirs_out, *ends):
            os.close(end)
        self._in, self._out, self._read, self._number = ours_in, ours_out, b"", 0
        self.events: list[dict[str, Any]] = []
        self._session: dict[str, str] = {}
        target = self("Target.createTarget", url="about:blank")["targetId"]
        found = self("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": found["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    @classmethod
    def find(cls) -> str:
        """Return the browser's path."""
        result = os.environ.get("MMJAX_BROWSER") or next(
            filter(None, map(shutil.which, cls._NAMES)), None
        )
        assert result, (
            "This test needs a Chromium. On Debian: apt-get update && apt-get install -y "
            "--no-install-recommends chromium-headless-shell; elsewhere install Chromium or Chrome. "
            f"It is looked for on PATH ({', '.join(cls._NAMES)}) and in MMJAX_BROWSER."
        )
        return result

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return the result of a command; events that come before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def open(self, path: os.PathLike[str], width: int, scheme: str) -> None:
        """Show a file, to its end; without the events of before."""
        self.events.clear()
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self("Emulation.setEmulatedMedia", features=media)
        self("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1,
             mobile=width < 600)  # fmt: skip
        self("Page.navigate", url=Path(path).absolute().as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self.events.append(self._next())

    def ask(self, script: str) -> Any:
        """Return the value of an expression of JavaScript on the page."""
        result = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def picture(self) -> np.ndarray:
        """Return the page from top to bottom, `[H, W, 3]`."""
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 16_000)}
        shot = self("Page.captureScreenshot", captureBeyondViewport=True, clip={**clip, "scale": 1})
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB"))

    def assert_looks_right(self, path: os.PathLike[str], width: int, scheme: str) -> None:
        """Check that the page is quiet and no wider than the window, every picture there, text legible."""
        self.open(path, width, scheme)
        self.assert_is_quiet()
        broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
        assert self.ask(broken) == 0
        assert self.ask("document.documentElement.scrollWidth") == width
        least, where = self.ask(CONTRAST)
        assert least >= 4.5, where
        picture = self.picture()
        assert picture.shape[0] > 3000 and picture.shape[1] == width
        assert (np.median(picture) > 200) == (scheme == "light")
        for part in np.array_split(picture[100:-200], 8):
            assert len(np.unique(part[::2] @ [1 << 16, 1 << 8, 1])) > 20

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._in)
        os.close(self._out)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._in], [], [], 120)
            part = os.read(self._in, 1 << 20) if ready else b""
            assert part, f"the browser died or hangs (exit status {self._process.poll()})"
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        return dict(json.loads(message))

    def assert_is_quiet(self) -> None:
        """Check that there is no message, error or dialog, and nothing fetched but the file itself."""
        loud = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded",
                "Page.javascriptDialogOpening")  # fmt: skip
        assert not [event for event in self.events if event["method"] in loud]
        sent = [e["params"]["request"]["url"] for e in self.events
                if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
        assert [url[:5] for url in sent if not url.startswith("data:")] == ["file:"]


@pytest.fixture(scope="session")
def parse() -> type[Page]:
    """Return `parse(content)`: a page taken apart."""
    return Page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(str(tmp_path_factory.mktemp("browser")))
    yield made
    made.close()
