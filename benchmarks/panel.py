"""Notebook 11_search in JupyterLab, in headless Chromium: seconds from Enter to the last of 20 results, and a picture.

    .venv/bin/python benchmarks/panel.py                                            # prints the seconds
    .venv/bin/python benchmarks/panel.py --screenshot notebooks/images/11_search.png      # the README's picture too

It searches the demo corpus by models/esr-tiny; the first time the index is made (a minute or two).
Chromium is the system's; all else that it needs is in requirements.txt.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import papermill
import psutil
from playwright.sync_api import Page, sync_playwright

from esr_utils import runs

NOTEBOOK = "11_search.ipynb"
SENTENCES = (
    "an angry man, shouting at me",
    "dull and uninterested, as if reading a shopping list",
    "she can hardly speak for laughing",
    "talking very quickly, out of breath",
    "a tired, sarcastic answer",
)
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required",
)  # fmt: skip


def find_chromium() -> str | None:
    """The system's Chromium, or Chrome, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def prepare(folder: Path, **parameters: str | int) -> None:
    """A copy of the notebook with these parameters in a folder."""
    source = runs.PROJECT / "notebooks" / NOTEBOOK
    papermill.execute_notebook(source, folder / NOTEBOOK, parameters, prepare_only=True, progress_bar=False)


@contextmanager
def jupyter_lab(folder: Path) -> Iterator[str]:
    """Runs JupyterLab on a folder, with nothing of the user's settings, and yields the notebook's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, own = secrets.token_hex(16), folder / ".jupyter"
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment = os.environ | {name: str(own / name.lower()) for name in (*places, "JUPYTERLAB_SETTINGS_DIR")}
    environment["PYTHONPATH"] = str(runs.PROJECT)  # the package that is tested, whichever is installed
    news = own / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension"
    news.mkdir(parents=True)
    (news / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0",
        # where this process is killed, and ends nothing, they end by themselves
        "--ServerApp.shutdown_no_activity_timeout=300", "--MappingKernelManager.cull_idle_timeout=300",
        "--MappingKernelManager.cull_connected=True",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}",
    ]  # fmt: skip
    with open(folder / "jupyter.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, folder / "jupyter.log")
        yield f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK}?token={token}&reset"
    finally:
        _end(server)


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")


def _end(server: subprocess.Popen) -> None:
    """Ends the server, and its kernels, which are in sessions of their own."""
    if server.poll() is None:
        kernels = psutil.Process(server.pid).children(recursive=True)
        server.terminate()
        _, left = psutil.wait_procs([psutil.Process(server.pid), *kernels], timeout=10)
        for process in left:
            process.kill()
    server.wait()


@contextmanager
def browser_page(chromium: str, height: int = 1000) -> Iterator[Page]:
    """A page 1280 pixels wide of a Chromium that knows nothing yet."""
    with tempfile.TemporaryDirectory() as profile, sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            profile, executable_path=chromium, headless=True, args=list(FLAGS),
            viewport={"width": 1280, "height": height},
        )  # fmt: skip
        try:
            yield browser.pages[0]
        finally:
            browser.close()


def run_notebook(page: Page, url: str, timeout_s: float = 90) -> None:
    """Opens the notebook in JupyterLab, runs all its cells by the menu, and waits for the panel's first results."""
    page.set_default_timeout(1000 * timeout_s)
    page.goto(url)
    page.get_by_text("| Idle").wait_for()  # run before its kernel is there, it would ask for one
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
    page.get_by_text("Run All Cells", exact=True).click()
    failed = page.get_by_text("Traceback (most recent call last)")
    page.locator(".esr-panel [role=status]", has_text="Results").or_(failed).first.wait_for()
    if failed.count():
        raise RuntimeError("the notebook failed:\n" + "\n".join(page.locator(".jp-RenderedText").all_text_contents()))


def search(page: Page, sentence: str, n: int) -> float:
    """Types a sentence into the panel and presses Enter; seconds until n cards that answer it are in the page."""
    box = page.locator(".esr-panel input[type=text]").first
    box.fill(sentence)
    started = time.perf_counter()
    box.press("Enter")
    page.wait_for_function(  # the message comes after the cards
        """([sentence, n]) => {
            const panel = document.querySelector(".esr-panel");
            const said = panel.querySelector("[role=status]").textContent;
            return said.includes(sentence) && panel.querySelectorAll(".esr-card audio").length == n;
        }""",
        arg=[sentence, n],
    )
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--screenshot", type=Path, help="a PNG file to write")
    options = parser.parse_args()
    if (chromium := find_chromium()) is None:
        sys.exit("there is no Chromium: install it (apt install chromium)")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), k=20)
        with jupyter_lab(Path(folder)) as url, browser_page(chromium) as page:
            run_notebook(page, url, timeout_s=600)
            seconds = [search(page, sentence, 20) for sentence in SENTENCES]
    print(
        f"from Enter to the last of 20 results: {statistics.median(seconds):.2f} s, the median of {len(seconds)} "
        f"sentences; {min(seconds):.2f} to {max(seconds):.2f} s (limit 2, {'met' if max(seconds) <= 2 else 'MISSED'})"
    )
    if options.screenshot:
        screenshot(chromium, options.screenshot)


def screenshot(chromium: str, path: Path) -> None:
    """The panel with the first six results for a sentence, as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), k=6)
        with jupyter_lab(Path(folder)) as url, browser_page(chromium, height=1600) as page:
            run_notebook(page, url)
            page.keyboard.press("Control+b")  # the list of files makes room
            search(page, SENTENCES[0], 6)
            page.keyboard.press("Tab")
            page.locator(".esr-panel").screenshot(path=path, animations="disabled")
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
