"""A web page that asks a checkpoint about a picture and shows its thoughts: `python -m mmcoconut.demo --model …`.

mmcoconut/demo/one_question.py computes the content, mmcoconut/demo/panels.py shows it, and mmcoconut/demo/links.py
keeps a question in the page's address. This module has the layout, the command line, and, for `--push_space`, the
upload to a Space (mmcoconut/demo/spaces.py). It needs `pip install mmcoconut[demo]`.
"""

import json
import sys
import tempfile
from abc import ABCMeta
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from mmcoconut.addresses import check_can_listen
from mmcoconut.audit.step_reader import StepReader
from mmcoconut.audit.thoughts import load_extra
from mmcoconut.data.images import open_images
from mmcoconut.demo.conversation import Conversation, holds_conversations
from mmcoconut.demo.links import KEYS, Limits, Settings, example_name, read_query, write_query
from mmcoconut.demo.one_question import Asker, read_examples, write_examples
from mmcoconut.demo.panels import Responder, panels
from mmcoconut.demo.spaces import push_demo
from mmcoconut.errors import RecipeError, UsageError
from mmcoconut.evaluation.answering import load_checkpoint
from mmcoconut.evaluation.asking import complete_from_recipe, join_processes, read_asked, read_rows
from mmcoconut.passes_mmcoconut import position_limit


gr = load_extra("gradio", "demo")

STYLE = Path(__file__).with_name("page.css")
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # of the visitor's machine
# The theme's own colors have contrasts below 4.5, which WCAG 2.2 asks for: white on orange, and light grey on white.
COLORS = {
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "body_text_color_subdued": "*neutral_600",
    "input_placeholder_color": "*neutral_600",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_800",
    "body_text_color_subdued_dark": "*neutral_300",
    "input_placeholder_color_dark": "*neutral_300",
}
SMALL_SIDE = 128  # pixels; smaller pictures are enlarged, with their pixels as squares
PICTURE_BOX = {"sources": ["upload", "clipboard"], "label": "Picture", "show_label": False, "height": 300}
NARROW = 320  # pixels; columns are at least so wide, so on a phone they stack
PHONE = 640  # pixels; narrower windows are a phone's, as in page.css
KEPT_SECONDS = 3600  # a conversation is kept so long after its last turn
KEPT_VISITORS = 100  # whose conversations are kept
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


# Write the settings into the page's address without a reload. On a phone, scroll to the answer, below the examples.
WRITE_ADDRESS = """
(query) => {
    const address = new URL(window.location.href);
    for (const key of KEYS) address.searchParams.delete(key);
    for (const [key, value] of new URLSearchParams(query)) address.searchParams.set(key, value);
    window.history.replaceState(window.history.state, "", address);
    const answer = document.getElementById("answer");
    if (window.innerWidth <= PHONE && answer) answer.scrollIntoView({behavior: "smooth"});
    return [query ? address.href : ""];
}
""".replace("KEYS", json.dumps(KEYS)).replace("PHONE", str(PHONE))


@dataclass
class Inputs:
    """The components of the page that a question is asked with."""

    picture: gr.Image
    question: gr.Textbox
    thoughts: gr.Slider
    max_new_tokens: gr.Slider
    others: gr.Checkbox
    more: gr.File
    ask: gr.Button
    link: gr.Textbox

    @property
    def numbers(self) -> list:
        return [self.thoughts, self.max_new_tokens, self.others]

    @property
    def first(self) -> list:
        """The inputs of the first question."""
        return [self.picture, self.question, *self.numbers, self.more]


def build_page(asker: Asker, *, name: str, num_latents: int | None = None):
    """Build the page of a checkpoint, a `gradio.Blocks`; num_latents: initial number of thoughts."""
    count = asker.processor.num_latents if num_latents is None else num_latents
    limits = Limits(count, asker.max_new_tokens)
    heading = panels().heading(name, asker.processor.num_latents, asker.model.config.thought_mode)
    with gr.Blocks(title=f"mmcoconut: {name}", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(heading)
        with gr.Row():
            with gr.Column(scale=2, min_width=NARROW):
                inputs = question_column(asker.examples, limits)
            with gr.Column(scale=5, min_width=NARROW):
                outputs, further, ask_further = answer_column(holds_conversations(asker.processor))
        connect(asker, inputs, outputs, further, ask_further)
        share(page, asker.examples, inputs, outputs[1], limits)
    return page


def answer_column(with_further: bool) -> tuple[list, gr.Textbox, gr.Button]:
    """Return the panels with the conversation, and the input and button of a further question."""
    earlier, answer = gr.HTML(elem_id="earlier"), gr.HTML(elem_id="answer")
    with gr.Row(visible=with_further, equal_height=True):
        further = gr.Textbox(
            label="Further question about the same picture", lines=1, scale=4, min_width=240, elem_id="further"
        )
        ask_further = gr.Button("Ask further", scale=1, min_width=120, elem_id="ask_further")
    thoughts, others = gr.HTML(elem_id="thoughts"), gr.HTML(elem_id="others")
    return [earlier, answer, thoughts, others, gr.State(None, time_to_live=KEPT_SECONDS)], further, ask_further


def connect(asker: Asker, inputs: Inputs, outputs: list, further: gr.Textbox, ask_further: gr.Button) -> None:
    """Answer questions when they are asked: one at a time, because hooks on the one model replace the thoughts."""
    responder = Responder(asker)
    options = {
        "outputs": outputs,
        "show_progress": "minimal",
        "concurrency_limit": 1,
        "concurrency_id": "model",
    }
    gr.on([inputs.ask.click, inputs.question.submit], responder.ask, inputs=inputs.first, api_name="ask", **options)
    gr.on(
        [ask_further.click, further.submit],
        responder.ask_further,
        inputs=[outputs[-1], further, *inputs.numbers],
        api_visibility="private",
        **options,
    ).then(left_to_ask, inputs=[outputs[-1], further], outputs=further, api_visibility="private")


def left_to_ask(conversation: Conversation | None, question: str) -> str:
    """Return what stays in the box of further questions: nothing if the last turn answers it."""
    is_answered = conversation is not None and conversation.turns[-1].question == question
    return "" if is_answered else question


def share(page, examples: list[dict], inputs: Inputs, message: gr.HTML, limits: Limits) -> None:
    """Fill the page from its address when it is opened, and write the settings there when a question is asked."""
    html, pictures = panels(), {row["row_id"]: row["images"][0]["path"] for row in examples if row["images"]}

    def fill(request: gr.Request):
        read = read_query(request.query_params, examples, limits)
        if read is None:
            return [gr.skip()] * (len(inputs.first) + 1)
        asked, problems = read
        values = [asked.question, asked.thoughts, asked.max_new_tokens, asked.others]
        return [pictures.get(asked.example), *values, None, html.from_link(problems)]

    def query_of(picture, question, thoughts, max_new_tokens, others, more) -> str:
        example = example_name(examples, picture, question)
        if more or (picture is not None and example is None):
            return ""
        return write_query(Settings(question, example, int(thoughts), int(max_new_tokens), others))

    private = {"show_progress": "hidden", "api_visibility": "private"}
    page.load(fill, outputs=[*inputs.first, message], **private)
    gr.on(
        [inputs.ask.click, inputs.question.submit], query_of, inputs=inputs.first, outputs=inputs.link, **private
    ).then(None, inputs=inputs.link, outputs=inputs.link, js=WRITE_ADDRESS)


def question_column(examples: list[dict], limits: Limits) -> Inputs:
    """Return the inputs of a question, above the examples.

    If no example has a picture, the checkpoint is for text, and the page has no input for a picture.
    """
    pictures = [picture for row in examples for picture in open_images(row)]
    small = bool(pictures) and max(side for picture in pictures for side in picture.size) <= SMALL_SIDE
    crisp = {"elem_classes": ["mmc-crisp"]} if small else {}
    reads_pictures = bool(pictures) or not examples
    picture = Picture(visible=reads_pictures, elem_id="picture", **PICTURE_BOX, **crisp)
    with gr.Accordion("More pictures", open=False, visible=reads_pictures):
        more = gr.File(file_count="multiple", file_types=["image"], label="Read after the first", elem_id="more")
    question = gr.Textbox(label="Question", lines=2, elem_id="question")
    inputs = Inputs(
        picture,
        question,
        gr.Slider(0, limits.most_thoughts, value=limits.thoughts, step=1, label="Thoughts", elem_id="num_thoughts"),
        gr.Slider(
            1,
            limits.most_new_tokens,
            value=limits.max_new_tokens,
            step=1,
            label="Maximum tokens per answer",
            elem_id="max_new_tokens",
        ),
        gr.Checkbox(value=True, label="Ask again with other thoughts", elem_id="with_others"),
        more,
        gr.Button("Ask", variant="primary", elem_id="ask"),
        gr.Textbox(
            label="Link to this question",
            placeholder="Ask about an example to get one.",
            interactive=False,
            max_lines=1,
            buttons=["copy"],
            elem_id="link",
        ),
    )
    with gr.Column(**crisp):
        show_examples(examples, [picture, question])
    return inputs


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
    theme = gr.themes.Default(**FONTS).set(**COLORS)
    return page.launch(
        theme=theme,
        css_paths=STYLE,
        footer_links=[],
        ssr_mode=False,
        max_file_size="20mb",
        state_session_capacity=KEPT_VISITORS,
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
    arguments = read_asked(argv, DemoArguments, "demo")
    if arguments.push_space is None and arguments.package is not None:
        problem = ("package", arguments.package, "only a Space installs one: set `push_space` too")
        raise RecipeError("command line", [problem])
    complete_from_recipe(arguments)
    return arguments


def check_thoughts_fit(model, num_latents: int) -> None:
    """Raise UsageError if the thoughts alone fill the positions of the language model."""
    limit = position_limit(model.get_decoder())
    if limit is not None and num_latents >= limit:
        raise UsageError(
            f"num_latents is {num_latents}, and the language model has {limit} positions: ask with fewer thoughts"
        )


def serve(arguments: DemoArguments, rows: list[dict]) -> None:
    """Load the checkpoint and serve the page until it is stopped.

    Raises:
        ValueError: the address or the port is not available.
    """
    host = arguments.server_name or "127.0.0.1"
    if arguments.port is not None:
        check_can_listen(host, arguments.port, options="--port or --server_name")
    device = join_processes().device
    model, processor = load_checkpoint(
        arguments.model, revision=arguments.revision, dtype=arguments.dtype, device=device
    )
    check_thoughts_fit(model, processor.num_latents if arguments.num_latents is None else arguments.num_latents)
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
            port = arguments.port or "7860 and those after it"
            raise UsageError(f"No page at {host}, port {port}. Set another --port or --server_name.") from error


def main(argv: list[str] | None = None) -> None:
    arguments = parse_demo_arguments(sys.argv[1:] if argv is None else argv)
    rows = read_example_rows(arguments)
    if arguments.push_space is None:
        serve(arguments, rows)
        return
    print(f"The demo is at {push_demo(arguments, rows)}")
