"""The demo's page in a real browser: several visitors, links, dark mode, a phone."""

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import numpy as np
import pytest
from demo_parts import NEW_TOKENS, NUM_LATENTS, asker_of, tiny_examples
from PIL import Image
from tiny import tiny_image, tiny_model, tiny_processor

from mmcoconut.demo.one_question import row_of
from mmcoconut.demo.panels import panels
from mmcoconut.evaluation import answering


pytest.importorskip("gradio", reason="gradio is not installed: pip install mmcoconut[demo]")

from mmcoconut.demo import page as demo  # noqa: E402


ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium")
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PHONE = {"width": 360, "height": 740}
PATIENCE = 60_000  # ms; a busy machine is no fault of the page
READABLE = 4.5  # contrast of text to its background, WCAG 2.2 at level AA


@pytest.fixture(autouse=True)
def no_marker_needed(monkeypatch):
    """What random weights write counts as their answer."""
    monkeypatch.setattr(answering, "parse_answer", str.strip)


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[dict]:
    return tiny_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def asker(examples):
    return asker_of(tiny_model(seed=1), examples)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder, model = tmp_path_factory.mktemp("checkpoint"), tiny_model(seed=1)
    model.save_pretrained(folder)
    tiny_processor(model, markers="start", num_latents=NUM_LATENTS).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def served(asker):
    """The address of a page that this process serves, and the hosts that it looked up meanwhile."""
    hosts, look_up = set(), socket.getaddrinfo
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda host, *args, **kw: hosts.add(host) or look_up(host, *args, **kw))
        page = demo.build_page(asker, name="tiny")
        _, url, _ = demo.launch(page, prevent_thread_lock=True, quiet=True)
        yield url, hosts
        page.close()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


def fresh_page(browser, **options):
    """A window of a new visitor, with nothing in it yet."""
    page = browser.new_page(**options)
    page.set_default_timeout(PATIENCE)
    return page


@pytest.fixture
def visit(browser, served):
    """A fresh visitor on the page, and the hosts that the page asked for anything."""
    page, hosts = fresh_page(browser), set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.goto(served[0])
    yield page, hosts
    page.close()


def test_serving_the_page_looks_up_no_other_host(served):
    url, hosts = served
    assert urllib.request.urlopen(url).status == 200
    assert {host.decode() if isinstance(host, bytes) else host for host in hosts} <= {"127.0.0.1", "localhost"}
    assert hosts


def called(url: str, *values) -> str:
    """All that the function behind the button sends: picture, question, thoughts, tokens, with other thoughts.

    Without more pictures.
    """
    body = json.dumps({"data": [*values, None]}).encode()
    request = urllib.request.Request(f"{url}gradio_api/call/ask", body, {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request))["event_id"]
    return urllib.request.urlopen(f"{url}gradio_api/call/ask/{event}").read().decode()


def test_a_caller_cannot_name_a_file_of_the_machine(served, tmp_path):
    url, _ = served
    tiny_image().save(tmp_path / "private.png")
    picture = {"path": str(tmp_path / "private.png"), "meta": {"_type": "gradio.FileData"}}
    assert "event: error" in called(url, picture, "Which?", NUM_LATENTS, NEW_TOKENS, False)
    assert "mmc-tokens" in called(url, None, "Which?", NUM_LATENTS, NEW_TOKENS, False)  # so it was the file


def test_questions_of_several_visitors_do_not_mix(served, asker, examples):
    """Other thoughts are put in by hooks on the one model, so questions wait for each other."""
    url, _ = served
    with ThreadPoolExecutor(2) as pool:
        busy = pool.submit(called, url, None, examples[0]["question"], NUM_LATENTS, NEW_TOKENS, True)
        answers = [called(url, None, "Which?", NUM_LATENTS, NEW_TOKENS, False) for _ in range(3)]
    expected = json.dumps(panels().answer(asker.ask(row_of("Which?", None), NUM_LATENTS)))
    written = expected[expected.index("<code>") : expected.index("</code>")]
    assert all(written in answer for answer in answers) and "data-name" in busy.result()


def number(page, name: str) -> int:
    return int(page.inner_text(f"#mmc-{name}"))


def test_a_visitor_picks_an_example_asks_and_changes_the_number_of_thoughts(visit, asker, examples):
    page, hosts = visit
    page.locator("#examples tbody tr").nth(1).click()
    page.wait_for_selector("#picture img")
    page.click("#ask")
    page.wait_for_selector("#others [data-name=zero]")
    asked = asker.ask(examples[1], NUM_LATENTS)
    assert page.input_value("#question textarea") == examples[1]["question"]
    assert page.inner_text("#answer .mmc-small code").split() == asked.output.split()
    assert (number(page, "thoughts"), number(page, "tokens")) == (NUM_LATENTS, asked.generated_tokens)
    assert page.locator("#thoughts .mmc-card").count() == NUM_LATENTS + 1
    assert page.locator("#thoughts .mmc-card img").count() == NUM_LATENTS

    page.fill("#num_thoughts input[type=number]", "1")
    page.click("#ask")
    page.wait_for_selector("#answer [data-thoughts='1']")
    page.wait_for_selector("#others [data-name=count_2]")
    assert page.inner_text("#answer .mmc-small code").split() == asker.ask(examples[1], 1).output.split()
    assert page.locator("#thoughts .mmc-card").count() == 2
    assert hosts == {"127.0.0.1"}


def test_a_visitors_own_picture_is_read_as_it_was_uploaded(visit, asker, tmp_path):
    page, hosts = visit
    file, question = tmp_path / "mine.png", "What colour is the left square?"
    tiny_image(5).save(file)
    page.set_input_files("#picture input[type=file]", file)
    page.wait_for_selector("#picture img")
    page.fill("#question textarea", question)
    page.click("#ask")
    page.wait_for_selector("#others [data-name=zero]")
    expected = asker.ask(row_of(question, str(file)), NUM_LATENTS)
    assert page.inner_text("#answer .mmc-small code").split() == expected.output.split()
    assert expected.output != asker.ask(row_of(question, None), NUM_LATENTS).output
    assert hosts == {"127.0.0.1"}


def test_a_visitor_is_told_what_is_wrong(visit, tmp_path):
    page, _ = visit
    page.click("#ask")
    page.wait_for_selector("#answer .mmc-message")
    assert "The question is empty" in page.inner_text("#answer")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.set_input_files("#picture input[type=file]", tmp_path / "broken.png")
    page.fill("#question textarea", "Which?")
    page.wait_for_timeout(1000)  # the upload
    page.click("#ask")
    page.wait_for_selector("#answer :text('broken.png')")
    assert "replace the file" in page.inner_text("#answer")


# --- conversations and links -----------------------------------------------------------------------------------------
def test_a_visitor_asks_further_and_begins_anew(visit, asker, examples):
    page, hosts = visit
    ask_example(page, 0)
    first = asker.ask(examples[0], NUM_LATENTS)
    page.fill("#further textarea, #further input", "Why?")
    page.click("#ask_further")
    page.wait_for_selector("#answer [data-turn='2']")
    page.wait_for_selector("#others :text('before answer 2')")
    history = [{"question": examples[0]["question"], "answer": first.said}]
    expected = asker.ask({**examples[0], "question": "Why?", "history": history}, NUM_LATENTS)
    assert page.inner_text("#answer .mmc-small code").split() == expected.output.split()
    assert page.locator("#earlier details").count() == 1
    page.click("#earlier summary")
    assert page.locator("#earlier .mmc-card img").first.is_visible()
    assert page.input_value("#further textarea, #further input") == ""
    page.click("#ask")
    page.wait_for_selector("#answer [data-turn='1']")
    assert page.locator("#earlier details").count() == 0
    assert hosts == {"127.0.0.1"}


def test_a_question_is_shared_by_its_link(visit, browser, served, examples):
    """One visitor asks, with settings of their own; another opens the link and asks the same."""
    page, _ = visit
    page.locator("#examples tbody tr").nth(2).click()
    page.wait_for_selector("#picture img")
    page.fill("#num_thoughts input[type=number]", "1")
    page.fill("#max_new_tokens input[type=number]", "3")
    page.locator("#with_others input").uncheck()
    page.click("#ask")
    page.wait_for_selector("#answer [data-thoughts='1']")
    page.wait_for_function("document.querySelector('#link textarea, #link input').value !== ''")
    link, written = page.input_value("#link textarea, #link input"), page.inner_text("#answer .mmc-small code")
    assert page.url == link and urlsplit(link).hostname == "127.0.0.1" and "example=arrow_mazes+test+row+2" in link

    other = fresh_page(browser)
    other.goto(link)
    other.wait_for_selector("#answer :text('Press Ask')")
    other.wait_for_selector("#picture img")
    assert other.input_value("#question textarea") == examples[2]["question"]
    assert not other.locator("#with_others input").is_checked()
    other.click("#ask")
    other.wait_for_selector("#answer [data-thoughts='1']")
    assert other.inner_text("#answer .mmc-small code") == written
    assert "the data say" in other.inner_text("#answer")  # so the picture is the example's, byte by byte
    assert other.url == link
    other.close()


def test_a_link_with_wrong_values_is_explained_and_opens_no_file(visit, served):
    page, _ = visit
    secret = Path(demo.__file__).resolve()
    page.goto(f"{served[0]}?{urlencode({'example': secret, 'thoughts': 99, 'question': 'Which?'})}")
    page.wait_for_selector("#answer .mmc-message")
    told = page.inner_text("#answer")
    assert "this page has no such example" in told and "write a whole number from 0 to 8" in told
    assert page.input_value("#question textarea") == "Which?"
    assert page.input_value("#num_thoughts input[type=number]") == str(NUM_LATENTS)
    assert page.locator("#picture img").count() == 0


def test_a_picture_of_ones_own_is_in_no_link(visit, tmp_path):
    page, _ = visit
    tiny_image(5).save(tmp_path / "mine.png")
    page.set_input_files("#picture input[type=file]", tmp_path / "mine.png")
    page.wait_for_selector("#picture img")
    page.fill("#question textarea", "Which?")
    page.click("#ask")
    page.wait_for_selector("#others [data-name=zero]")
    assert urlsplit(page.url).query == "" and page.input_value("#link textarea, #link input") == ""


# --- dark mode and phones --------------------------------------------------------------------------------------------
# Every text that can be seen, with its contrast to what is behind it: [text, ratio] where that is too low.
TOO_FAINT = """
(least) => {
    const parts = (color) => {
        const numbers = color.match(/[0-9.]+/g).map(Number);
        return [...numbers.slice(0, 3), numbers.length > 3 ? numbers[3] : 1];
    };
    const over = (top, share, below) => below.map((value, i) => share * top[i] + (1 - share) * value);
    const light = (color) => {
        const linear = color.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    };
    const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const contrast = (element, part) => {
        const line = [];
        for (let node = element; node; node = node.parentElement) line.unshift(node);
        let ground = [255, 255, 255], opacity = 1;
        for (const node of line) {
            const style = getComputedStyle(node), [r, g, b, alpha] = parts(style.backgroundColor);
            ground = over([r, g, b], alpha, ground);
            opacity *= Number(style.opacity);
            const bar = [...node.children].find((child) => child.className === "mmc-bar");
            if (bar) {
                const behind = getComputedStyle(bar);
                ground = over(parts(behind.backgroundColor), Number(behind.opacity), ground);
            }
        }
        const [r, g, b, alpha] = parts(getComputedStyle(element, part).color);
        return ratio(light(over([r, g, b], alpha * opacity, ground)), light(ground));
    };
    const found = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const element = texts.currentNode.parentElement;
        const text = texts.currentNode.data.trim();
        if (!text || element.closest("script, style, svg, [disabled]") || !element.getClientRects().length) continue;
        found.push([text, contrast(element)]);
    }
    for (const input of document.querySelectorAll("input[type=number], input[type=text], textarea")) {
        if (!input.getClientRects().length) continue;
        if (input.value) found.push([input.value, contrast(input)]);
        else if (input.placeholder) found.push([input.placeholder, contrast(input, "::placeholder")]);
    }
    return [found.length, found.filter(([, value]) => value < least)];
}
"""


def ask_example(page, number: int) -> None:
    """Ask an example's question, and wait for all panels."""
    page.locator("#examples tbody tr").nth(number).click()
    page.wait_for_selector("#picture img")
    page.click("#ask")
    page.wait_for_selector("#others [data-name=zero]")


@pytest.fixture(params=["light", "dark"])
def coloured(browser, served, request):
    """A page of a visitor whose system is light or dark, and which."""
    page = fresh_page(browser, color_scheme=request.param)
    page.goto(served[0])
    yield page, request.param
    page.close()


def test_the_page_is_light_or_dark_as_the_system_is_and_can_be_read(coloured):
    page, scheme = coloured
    page.click("#ask")
    page.wait_for_selector("#answer .mmc-message")  # with the box for a picture empty
    assert page.evaluate(TOO_FAINT, READABLE)[1] == []
    ask_example(page, 0)
    page.fill("#further textarea, #further input", "Why?")
    page.click("#ask_further")
    page.wait_for_selector("#others :text('before answer 2')")
    page.click("#earlier summary")
    page.wait_for_timeout(500)  # colours fade in
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).map(Number)")
    assert (sum(ground[:3]) < 3 * 64) == (scheme == "dark") and page.locator(".mmc-changed").count() > 0
    number, too_faint = page.evaluate(TOO_FAINT, READABLE)
    assert number > 50 and too_faint == []


def test_the_page_follows_a_system_that_turns_dark(coloured):
    page, scheme = coloured
    other = {"light": "dark", "dark": "light"}[scheme]
    page.emulate_media(color_scheme=other)
    page.wait_for_function(f"document.body.classList.contains('dark') === {str(other == 'dark').lower()}")


# What reaches beyond the right edge of the window, unless it lies in a box that scrolls by itself.
TOO_WIDE = """
() => [...document.querySelectorAll(".gradio-container *")].filter((element) => {
    const box = element.getBoundingClientRect();
    if (!box.width || box.right <= innerWidth + 1) return false;
    for (let node = element.parentElement; node; node = node.parentElement)
        if (["auto", "scroll", "hidden", "clip"].includes(getComputedStyle(node).overflowX)) return false;
    return true;
}).map((element) => element.outerHTML.slice(0, 200))
"""

# Words of headers and descriptions in the tables that continue on the next line.
BROKEN_WORDS = """
() => [...document.querySelectorAll("#others th, #others td:first-child")].flatMap((cell) => {
    const text = cell.firstChild, range = document.createRange();
    return [...text.data.matchAll(/\\S+/g)].filter(({0: word, index}) => {
        range.setStart(text, index);
        range.setEnd(text, index + word.length);
        return range.getClientRects().length > 1;
    }).map(([word]) => word);
})
"""


def test_on_a_phone_the_panels_stack_and_nothing_scrolls_sideways(browser, served):
    page = fresh_page(browser, viewport=PHONE)
    page.goto(served[0])
    ask_example(page, 0)
    page.fill("#further textarea, #further input", "Why?")
    page.click("#ask_further")
    page.wait_for_selector("#others :text('before answer 2')")
    page.click("#earlier summary")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= PHONE["width"]
    assert page.evaluate(TOO_WIDE) == [] and page.evaluate(BROKEN_WORDS) == []
    for panel in ("#earlier", "#answer", "#thoughts", "#others"):
        wide = f"[...document.querySelectorAll('{panel} *')].filter((e) => e.tagName !== 'CODE' && "
        wide += "e.scrollWidth > e.clientWidth + 1 && e.clientWidth).length"
        assert page.evaluate(wide) == 0, panel
    boxes = [page.locator(name).bounding_box() for name in ("#question", "#ask", "#answer", "#thoughts", "#others")]
    tops = [box["y"] for box in boxes]
    assert tops == sorted(tops) and all(box["width"] > 0.8 * PHONE["width"] for box in boxes[2:])
    page.close()


def test_screenshots_of_the_docs_are_made(browser, checkpoint, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "screenshot_demo.py"), checkpoint, str(tmp_path / "demo.png")]
    command += ["--chromium", CHROMIUM, "--dataset_options.num_rows", "2", "--max_samples", "2"]
    command += ["--max_new_tokens", str(NEW_TOKENS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    pictures = [Image.open(tmp_path / name).convert("L") for name in ("demo.png", "demo-dark.png", "demo-phone.png")]
    light, dark, phone = (np.asarray(picture).mean() for picture in pictures)
    assert [picture.width for picture in pictures] == [1440, 1440, 720]
    assert dark < 100 < min(light, phone) and all(picture.height > picture.width / 2 for picture in pictures)


def test_the_page_leaves_no_file_beside_the_code():
    """gradio's metaclass writes one beside every component that is made by a class statement."""
    assert not list(Path(demo.__file__).parent.glob("*.pyi"))
