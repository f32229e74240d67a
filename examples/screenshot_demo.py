"""Take a picture of the demo in use: the page of a checkpoint, its example, the answer, thoughts and interventions.

    python examples/screenshot_demo.py outputs/quickstart docs/demo.png [--example 2]

The demo's own options may follow. Needs `pip install mmcoconut[demo]`, Playwright for Python, and Debian's chromium or
another that --chromium names.
"""

import argparse
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright


ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SIZE = {"width": 1440, "height": 1000}


def wait_for(url: str, server: subprocess.Popen, seconds: int = 120) -> None:
    """Until the page answers."""
    for _ in range(seconds):
        if server.poll() is not None:
            raise RuntimeError(f"The demo ended with {server.returncode}: its message is above.")
        try:
            urllib.request.urlopen(url)
            return
        except urllib.error.URLError:
            time.sleep(1)
    raise TimeoutError(f"The demo did not answer at {url} within {seconds} s.")


def take(url: str, file: Path, *, example: int, chromium: str) -> None:
    """Choose an example, ask, and photograph the whole page."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(url)
        page.locator("#examples tbody tr").nth(example).click()
        page.wait_for_selector("#picture img")
        for _ in range(2):  # the first answer's time is not the model's alone
            page.click("#ask")
            page.wait_for_selector("#others table", state="detached")
            page.wait_for_selector("#others table", timeout=120_000)
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)
        page.screenshot(path=file, full_page=True)
        browser.close()
    Image.open(file).convert("RGB").quantize(256).save(file, optimize=True)  # a fraction of the size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("file", type=Path)
    parser.add_argument("--example", type=int, default=0, help="which example, from 0")
    parser.add_argument("--port", type=int, default=7861)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    arguments, others = parser.parse_known_args()

    url = f"http://127.0.0.1:{arguments.port}"
    command = [sys.executable, "-m", "mmcoconut.demo", "--model", arguments.checkpoint, "--port", str(arguments.port)]
    server = subprocess.Popen([*command, *others])
    try:
        wait_for(url, server)
        take(url, arguments.file, example=arguments.example, chromium=arguments.chromium)
    finally:
        server.terminate()
    print(f"{arguments.file}: {arguments.file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
