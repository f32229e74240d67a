"""A web page that asks a checkpoint about a picture and shows its thoughts: `python -m mmcoconut.demo --model …`.

mmcoconut/demo/one_question.py computes the content; this module has the layout, the command line, and, for
`--push_space`, the upload to a Space (mmcoconut/demo/spaces.py). It needs `pip install mmcoconut[demo]`.
"""

import sys
import tempfile
from abc import ABCMeta
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from transformers.hf_argparser import HfArg

from mmcoconut.audit.report import data_uri
from mmcoconut.audit.step_reader import StepReader
from mmcoconut.audit.thoughts import load_extra
from mmcoconut.data.images import open_images
from mmcoconut.demo.one_question import Asker, read_examples, row_of, write_examples
from mmcoconut.demo.spaces import push_demo
from mmcoconut.errors import RecipeError
from mmcoconut.evaluation.answering import load_checkpoint
from mmcoconut.evaluation.asking import complete_from_recipe, join_processes, read_asked, read_rows


gr = load_extra("gradio", "demo")

PANELS = Path(__file__).with_name("panels.html")
STYLE = Path(__file__).with_name("page.css")
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # of the visitor's machine
SMALL_SIDE = 128  # pixels; smaller pictures are enlarged, with their pixels as squares
PICTURE_BOX = {"sources": ["upload", "clipboard"], "label": "Picture", "show_label": False, "height": 300}
TOP_K = 3  # tokens shown per thought
DEFAULT_DATASET = "arrow_mazes"


@dataclass
class DemoArguments:
    """Options of the page: checkpoint, examples, server."""

    model: str | None = HfArg(default=None, help="Folder or Hub id of a trained checkpoint.")
    revision: str | None = HfArg(default=None, help="Branch, tag or commit of a checkpoint on the Hub.")
    recipe: str | None = HfArg(default=None, help="Recipe that names the examples' data; default: the one in `model`.")
    dataset: str | None = HfArg(default=None, help="Data set of the examples; default: the recipe's, or arrow_mazes.")
    dataset_options: dict | None = HfArg(default=None, help="Options of the data set: --dataset_options.folder …")
    split: str = HfArg(default="test", help="Split whose first rows are the examples.")
    max_samples: int = HfArg(default=6, help="Number of examples; their thoughts can replace a question's own.")
    unreadable_images: str | None = HfArg(default=None, help="`error` or `skip`; default: the recipe's, or `error`.")
    num_latents: int | None = HfArg(default=None, help="Initial number of thoughts; default: the checkpoint's.")
    max_new_tokens: int | None = HfArg(default=None, help="Maximum tokens per answer; default: the recipe's, or 64.")
    num_beams: int | None = HfArg(default=None, help="Number of beams; default: the recipe's, or 1 (greedy).")
    dtype: str = HfArg(default="auto", help="Data type of the weights; `auto`: as they were saved.")
    seed: int = HfArg(default=0, help="Seed of the noise.")
    server_name: str | None = HfArg(default=None, help="Address to listen on; default: 127.0.0.1, this machine only.")
    port: int | None = HfArg(default=None, help="Port; default: the first free one from 7860.")
    share: bool = HfArg(default=False, help="Add a public address for a week, through gradio's server.")
    push_space: str | None = HfArg(default=None, help="Upload the page as the Space user/name; do not serve it.")
    package: str | None = HfArg(default=None, help="Requirement of the Space: 'mmcoconut @ git+https://…'.")
    private: bool = HfArg(default=False, help="Make the Space private.")


def file_of(self, payload) -> str | None:
    """Return the uploaded file unchanged: mmcoconut, which reads it, reports unreadable files, not gradio."""
    return None if payload is None else payload.path


# An ordinary `class` statement would make gradio's metaclass write a .pyi file next to this one.
Picture = ABCMeta.__new__(type(gr.Image), "Picture", (gr.Image,), {"preprocess": file_of, "is_template": True})


def panels():
    """Return the macros of demo_panels.html by name: functions that return HTML, with all texts escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "uri": data_uri,
        "percent": lambda share: f"{100 * share:.0f} %",
        "milliseconds": lambda seconds: f"{1000 * seconds:.0f}",
    }
    return environment.from_string(PANELS.read_text(encoding="utf-8")).module


def panel_of(html, name: str, compute: Callable[[], object]) -> str:
    """Return a result as a panel; in case of an error its message with the remedy."""
    try:
        return getattr(html, name)(compute())
    except ValueError as error:
        return html.message(str(error))


def responder(asker: Asker) -> Callable[..., Iterator[tuple[str, str, str]]]:
    """Return the function of the button, which yields the three panels again whenever more is known."""
    html = panels()

    def respond(picture: str | None, question: str, num_latents: float, with_others: bool):
        try:
            asked = asker.ask(row_of(question, picture), int(num_latents))
        except ValueError as error:
            yield html.message(str(error)), "", ""
            return
        answer = html.answer(asked)
        yield answer, html.waiting("reading its thoughts"), ""
        thoughts = panel_of(html, "thoughts", lambda: asker.look(asked, top_k=TOP_K))
        if not with_others:
            yield answer, thoughts, ""
            return
        yield answer, thoughts, html.waiting("asking again with other thoughts")
        yield answer, thoughts, panel_of(html, "variants", lambda: asker.intervene(asked))

    return respond


def build_page(asker: Asker, *, name: str, num_latents: int | None = None):
    """Build the page of a checkpoint, a `gradio.Blocks`; num_latents: initial number of thoughts."""
    count = asker.processor.num_latents if num_latents is None else num_latents
    heading = panels().heading(name, asker.processor.num_latents, asker.model.config.thought_mode)
    with gr.Blocks(title=f"mmcoconut: {name}", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(heading)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                inputs, ask = question_column(asker.examples, count)
            with gr.Column(scale=5, min_width=480):
                outputs = [gr.HTML(elem_id=panel) for panel in ("answer", "thoughts", "others")]
        # One question at a time: hooks on the one model replace the thoughts.
        events = {"triggers": [ask.click, inputs[1].submit], "concurrency_limit": 1, "api_name": "ask"}
        gr.on(fn=responder(asker), inputs=inputs, outputs=outputs, show_progress="minimal", **events)
    return page


def question_column(examples: list[dict], count: int) -> tuple[list, gr.Button]:
    """Return picture, question, number of thoughts and the choice of other thoughts; the button; the examples.

    If no example has a picture, the checkpoint is for text, and the page has no input for a picture.
    """
    pictures = [picture for row in examples for picture in open_images(row)]
    small = bool(pictures) and max(side for picture in pictures for side in picture.size) <= SMALL_SIDE
    crisp = {"elem_classes": ["mmc-crisp"]} if small else {}
    inputs = [
        Picture(visible=bool(pictures) or not examples, elem_id="picture", **PICTURE_BOX, **crisp),
        gr.Textbox(label="Question", lines=2, elem_id="question"),
        gr.Slider(0, max(8, 2 * count), value=count, step=1, label="Thoughts", elem_id="num_thoughts"),
        gr.Checkbox(value=True, label="ask again with other thoughts", elem_id="with_others"),
    ]
    ask = gr.Button("Ask", variant="primary", elem_id="ask")
    with gr.Column(**crisp):
        show_examples(examples, inputs[:2])
    return inputs, ask


def show_examples(rows: list[dict], inputs: list) -> None:
    """Show examples that fill picture and question when chosen."""
    if not rows:
        return
    if any(row["images"] for row in rows):
        values = [[row["images"][0]["path"] if row["images"] else None, row["question"]] for row in rows]
    else:
        values, inputs = [[row["question"]] for row in rows], inputs[1:]
    gr.Examples(values, inputs, elem_id="examples", examples_per_page=len(values), cache_examples=False)


def launch(page, **options):
    """Serve a page of `build_page`, without analytics or external fonts and scripts; options: of `Blocks.launch`."""
    theme = gr.themes.Default(**FONTS)
    return page.launch(
        theme=theme,
        css_paths=STYLE,
        footer_links=[],
        ssr_mode=False,
        max_file_size="20mb",
        **{"share": False} | options,
    )


def read_example_rows(arguments) -> list[dict]:
    """Return the first rows of the named data set, or of mazes.

    Raises:
        ValueError: the data cannot be read here.
    """
    arguments.dataset = arguments.dataset or DEFAULT_DATASET
    try:
        return list(read_rows(arguments))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{error}\nThe page takes its examples from {arguments.dataset!r}: put its files where "
            f"--dataset_options says, or use other examples, such as --dataset {DEFAULT_DATASET}."
        ) from error


def parse_demo_arguments(argv: list[str]) -> DemoArguments:
    """Parse the command line, completed from the checkpoint's recipe.

    Raises:
        RecipeError: all problems of the command line.
    """
    arguments = read_asked(argv, DemoArguments, "mmcoconut.demo", data="")
    if arguments.push_space is None and arguments.package is not None:
        problem = ("package", arguments.package, "only a Space installs one: set `push_space` too")
        raise RecipeError("command line", [problem])
    complete_from_recipe(arguments)
    return arguments


def serve(arguments: DemoArguments, rows: list[dict]) -> None:
    """Load the checkpoint and serve the page until it is stopped.

    Raises:
        ValueError: the address or the port is not available.
    """
    device = join_processes().device
    model, processor = load_checkpoint(
        arguments.model, revision=arguments.revision, dtype=arguments.dtype, device=device
    )
    with tempfile.TemporaryDirectory() as folder:
        write_examples(Path(folder), rows)
        asker = Asker(
            model,
            processor,
            read_examples(Path(folder)),
            max_new_tokens=arguments.max_new_tokens,
            num_beams=arguments.num_beams,
            seed=arguments.seed,
            reader=StepReader.beside(arguments.model),
        )
        page = build_page(asker, name=arguments.model.rstrip("/"), num_latents=arguments.num_latents)
        try:
            launch(page, server_name=arguments.server_name, server_port=arguments.port, share=arguments.share)
        except OSError as error:
            where = f"{arguments.server_name or '127.0.0.1'}, port {arguments.port or 'from 7860'}"
            raise ValueError(f"No page at {where} ({error}). Set another --port or --server_name.") from error


def main(argv: list[str] | None = None) -> None:
    arguments = parse_demo_arguments(sys.argv[1:] if argv is None else argv)
    rows = read_example_rows(arguments)
    if arguments.push_space is None:
        serve(arguments, rows)
        return
    print(f"The demo is at {push_demo(arguments, rows)}")
