"""Make the docs' screenshots of the demo: an example's answer, thoughts and interventions; light, dark, on a phone.

    python examples/screenshot_demo.py outputs/quickstart docs/demo.png [--example 3]

writes demo.png, demo-dark.png and demo-phone.png. Other options are those of `mmcoconut demo`. It needs
`pip install mmcoconut[demo]`, Playwright for Python, and Debian's chromium or another that --chromium names.
"""

import argparse
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright


ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
DESKTOP, PHONE = {"width": 1440, "height": 1000}, {"width": 360, "height": 740}
# By the end of the file's name: options of the browser's page.
WINDOWS = {
    "": {"viewport": DESKTOP, "color_scheme": "light"},
    "-dark": {"viewport": DESKTOP, "color_scheme": "dark"},
    "-phone": {"viewport": PHONE, "color_scheme": "light", "device_scale_factor": 2},
}
PATIENCE = 600  # seconds for the server to start and for each step in the browser, also on a busy machine


def wait_for(url: str, server: subprocess.Popen, seconds: int = PATIENCE) -> None:
    """Wait until the page answers.

    Raises:
        RuntimeError: the demo ended.
        TimeoutError: it does not answer in time.
    """
    for _ in range(seconds):
        if server.poll() is not None:
            raise RuntimeError(f"The demo ended with {server.returncode}: its message is above.")
        try:
            urllib.request.urlopen(url)
            return
        except urllib.error.URLError:
            time.sleep(1)
    raise TimeoutError(f"The demo did not answer at {url} within {seconds} s.")


def ask(page: Page, example: int) -> None:
    """Ask an example's question twice: the first answer's time includes the start of the model.

    Raises:
        RuntimeError: the page shows a message instead of an answer.
    """
    page.locator("#examples tbody tr").nth(example).click()
    page.wait_for_selector("#picture img")
    for _ in range(2):
        page.click("#ask")
        page.wait_for_selector("#others table", state="detached")
        page.wait_for_selector("#others table, .mmc-message")
        if page.locator(".mmc-message").count():
            raise RuntimeError(f"The page says: {page.inner_text('.mmc-message')}")


def take(browser: Browser, url: str, file: Path, *, example: int, window: dict) -> None:
    """Ask an example's question, and save a screenshot: of the whole page, or of the answer that fills a phone."""
    page = browser.new_page(**window)
    page.set_default_timeout(1000 * PATIENCE)
    page.goto(url)
    ask(page, example)
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    page.screenshot(path=file, full_page=window["viewport"] is not PHONE)
    page.close()
    Image.open(file).convert("RGB").quantize(256).save(file, optimize=True)  # a fraction of the size
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("file", type=Path, help="the light screenshot; the others are written next to it")
    parser.add_argument("--example", type=int, default=0, help="which example, from 0")
    parser.add_argument("--port", type=int, default=7861)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    arguments, others = parser.parse_known_args()

    url = f"http://127.0.0.1:{arguments.port}"
    command = [sys.executable, "-m", "mmcoconut.demo", "--model", arguments.checkpoint, "--port", str(arguments.port)]
    server = subprocess.Popen([*command, *others])
    try:
        wait_for(url, server)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=arguments.chromium, args=ARGUMENTS)
            for end, window in WINDOWS.items():
                file = arguments.file.with_stem(arguments.file.stem + end)
                take(browser, url, file, example=arguments.example, window=window)
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
