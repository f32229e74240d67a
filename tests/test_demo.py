"""The demo: what is computed for one question, the panels, the command line, the Space."""

import os
import runpy
import socket
import subprocess
import sys
from functools import partialmethod
from pathlib import Path

import pytest
from demo_parts import NEW_TOKENS, NUM_LATENTS, asker_of, by_name, path_of, tiny_examples
from hub import Hub
from tiny import max_difference, tiny_image, tiny_model, tiny_processor, tiny_seq2seq

from mmcoconut.audit.interventions import given, intervening, zero
from mmcoconut.audit.necessity import seeing
from mmcoconut.audit.thoughts import lens_text, load_extra, read_thoughts
from mmcoconut.data import load_examples
from mmcoconut.data.arrow_mazes import png_bytes
from mmcoconut.demo import one_question
from mmcoconut.demo.one_question import Asker, answer_with, read_examples, row_of, think, write_examples
from mmcoconut.demo.panels import Responder
from mmcoconut.errors import RecipeError, UsageError
from mmcoconut.evaluation import answering, asking
from mmcoconut.evaluation.answering import Answerer


pytest.importorskip("gradio", reason="gradio is not installed: pip install mmcoconut[demo]")

import gradio as gr  # noqa: E402
from huggingface_hub import HfApi, SpaceCard  # noqa: E402

from mmcoconut.demo import page as demo  # noqa: E402
from mmcoconut.demo import spaces


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mmcoconut @ git+https://example.org/someone/mmcoconut"


@pytest.fixture(autouse=True)
def no_marker_needed(monkeypatch):
    """What random weights write counts as their answer."""
    monkeypatch.setattr(answering, "parse_answer", str.strip)


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[dict]:
    return tiny_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def asker(examples) -> Asker:
    return asker_of(tiny_model(seed=1), examples)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder, model = tmp_path_factory.mktemp("checkpoint"), tiny_model(seed=1)
    model.save_pretrained(folder)
    tiny_processor(model, markers="start", num_latents=NUM_LATENTS).save_pretrained(folder)
    return str(folder)


def test_examples_are_the_rows_they_were_written_from(examples):
    rows = list(load_examples("arrow_mazes", split="test", num_rows=4, cell_size=8))
    for example, row in zip(examples, rows, strict=True):
        assert [example[name] for name in ("question", "steps", "answers")] == [
            row[name] for name in ("question", "steps", "answers")
        ]


def test_text_alone_and_rows_of_several_pictures(tmp_path):
    row = {"images": [], "question": "Which?", "choices": ["a", "b"], "steps": [], "answers": ["a"], "row_id": "x"}
    pictures = [{"bytes": png_bytes(tiny_image(seed)), "path": None} for seed in (0, 1)]
    write_examples(tmp_path, [row, {**row, "images": pictures}])
    [example] = read_examples(tmp_path)
    assert (example["question"], example["images"]) == ("Which?\nChoices: a, b", [])


@pytest.mark.parametrize("num_latents", [0, NUM_LATENTS])
def test_the_answer_is_the_answerers(asker, examples, num_latents):
    asked = asker.ask(examples[0], num_latents)
    answerer = Answerer(asker.model, asker.processor, num_latents=num_latents, max_new_tokens=NEW_TOKENS)
    [expected] = answerer.answer([examples[0]])
    assert {name: getattr(asked, name) for name in expected} == expected
    assert asked.seconds > 0


def test_an_example_is_known_again_by_its_picture_and_question(asker, examples):
    path = path_of(examples[0])
    assert asker.gold_of(row_of(examples[0]["question"], path)) == examples[0]["answers"]
    assert asker.gold_of(row_of("Another question?", path)) == []
    assert asker.gold_of(row_of(examples[0]["question"], None)) == []


def test_a_look_is_the_reading_of_thoughts(asker, examples):
    asked = asker.ask(examples[0], NUM_LATENTS)
    look = asker.look(asked, top_k=3)
    readings = read_thoughts(asker.model, asked.answerer.inputs([examples[0]]), top_k=3)
    first = [f"{t} {100 * p:.0f} %" for t, p in (state.tokens[0] for state in [*look.thoughts, look.writes])]
    assert first == lens_text(readings, asker.processor.tokenizer, 0)
    assert [thought.image_share for thought in look.thoughts] == readings.image_share(0).tolist()
    assert look.no_map is None and all(thought.heat_map is not None for thought in look.thoughts)


def test_interventions_are_what_they_say(asker, examples):
    asked = asker.ask(examples[0], NUM_LATENTS)
    variants = by_name(asker.intervene(asked))
    _, thoughts = think(asked.answerer, [examples[0], *examples])
    with intervening(asker.model, zero):
        assert variants["zero"].output == asked.answerer.answer([examples[0]])[0]["output"]
    mean = given(thoughts.mean(dim=0, keepdim=True))
    assert variants["mean"].output == answer_with(asked.answerer, examples[0], mean)["output"]
    assert variants["count_1"].output == asker.ask(examples[0], 1).output
    with seeing(asker.model, "thoughts"):
        assert variants["only_thoughts"].output == asked.answerer.answer([examples[0]])[0]["output"]
    assert all(v.changed == ((v.answer or v.output.strip()) != asked.said) for v in variants.values())
    assert sum(variant.changed for variant in variants.values()) > 3
    names = {f"count_{count}" for count in (0, 1, 2, 4, 5, 6)} | {f"count_{count}_at_once" for count in range(3)}
    assert names | {f"without_{j}" for j in (1, 2, 3)} | {"zero", "noise", "mean", "only_thoughts"} <= variants.keys()


def test_a_model_that_cannot_hide_the_question_says_so(asker, examples, monkeypatch):
    def refuse(model, sees):
        raise ValueError(f"answer_sees={sees!r} needs keys.")

    monkeypatch.setattr(one_question, "seeing", refuse)
    variants = asker.intervene(asker.ask(examples[0], NUM_LATENTS))
    assert "only_thoughts" not in by_name(variants)
    assert "the answer sees only the thoughts: answer_sees='thoughts' needs keys" in variants.not_run


def test_thoughts_of_an_example_come_from_one_with_another_answer(asker, examples):
    asked = asker.ask(examples[0], NUM_LATENTS)
    donor = next(donor for donor in asker.donors(asked) if not isinstance(donor, str))
    lines, thoughts = think(asked.answerer, examples)
    index = next(i for i, line in enumerate(lines) if line["answer"] != asked.said)
    assert donor.answer == lines[index]["answer"]
    assert max_difference(donor.thoughts, thoughts[index : index + 1]) < 1e-6
    variant = by_name(asker.intervene(asked))["shuffled"]
    assert (variant.donor_answer, variant.name) == (donor.answer, donor.name)
    assert variant.output == answer_with(asked.answerer, examples[0], given(donor.thoughts))["output"]


def test_nothing_stays_behind_in_the_model(asker, examples):
    before = asker.ask(examples[1], NUM_LATENTS)
    asker.look(before)
    asker.intervene(before)
    assert asker.ask(examples[1], NUM_LATENTS).output == before.output
    assert not asker.model.base_model.thought_feed._forward_hooks


def test_without_examples_there_are_no_thoughts_of_others_and_no_mean(asker, examples):
    alone = asker_of(asker.model)
    variants = alone.intervene(alone.ask(row_of("Which?", None), NUM_LATENTS))
    assert [variant.name for variant in variants.replaced] == ["zero", "noise", "only_thoughts"]
    assert variants.one_replaced == [] and len(variants.not_run) == 3


FAMILIES = {
    "marian": (lambda: tiny_model("marian", "vit"), None),
    "seq2seq": (lambda: tiny_seq2seq("attention_prefix"), "which lie nowhere on it"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_read_pictures_by_cross_attention(family, examples):
    build, no_map = FAMILIES[family]
    asker = asker_of(build(), examples)
    asked = asker.ask(examples[0], NUM_LATENTS)
    look = asker.look(asked)
    assert (look.no_map is None) if no_map is None else (no_map in look.no_map)
    assert all((thought.heat_map is None) == (no_map is not None) for thought in look.thoughts)
    assert all(0 < thought.image_share <= 1 for thought in look.thoughts)
    assert {"zero", "mean", "without_1", "count_0"} <= by_name(asker.intervene(asked)).keys()


def test_a_question_without_a_picture_has_thoughts_and_no_map(asker):
    asked = asker.ask(row_of("What colour is the left square?", None), NUM_LATENTS)
    look = asker.look(asked)
    assert look.no_map == "the question has no picture"
    assert [thought.image_share for thought in look.thoughts] == [None] * NUM_LATENTS
    assert "zero" in by_name(asker.intervene(asked))


def said(asker, picture, question, num_latents=NUM_LATENTS, with_others=True) -> tuple[str, ...]:
    """The panels of answer, thoughts and other thoughts at the end."""
    return list(Responder(asker).ask(picture, question, num_latents, NEW_TOKENS, with_others))[-1][1:4]


def test_panels_fill_one_after_the_other(asker, examples):
    asked = (path_of(examples[0]), examples[0]["question"], NUM_LATENTS, NEW_TOKENS, True)
    steps = [shown[1:4] for shown in Responder(asker).ask(*asked)]
    assert [[bool(panel) for panel in step] for step in steps] == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
    assert len({step[0] for step in steps}) == 1  # the answer is there from the first
    assert "thought 3" in steps[1][1] and 'data-name="zero"' in steps[2][2]
    assert f"the data say {examples[0]['answers'][0]}" in steps[0][0]


def test_without_other_thoughts_the_last_panel_stays_empty(asker, examples):
    assert said(asker, None, "Which?", with_others=False)[2] == ""


def test_without_thoughts_the_answer_stands_and_the_panels_say_why_they_are_empty(asker):
    answer, thoughts, others = said(asker, None, "Which?", 0)
    assert 'id="mmc-thoughts">0<' in answer
    assert "Set their number to 1 or more" in thoughts and "Set their number to 1 or more" in others


def test_a_checkpoint_whose_thoughts_cannot_be_replaced_says_so():
    answer, thoughts, others = said(asker_of(tiny_model(thought_mode="pause")), None, "Which?")
    assert 'id="mmc-thoughts">3<' in answer and "thought 3" in thoughts
    assert "feeds no hidden state back" in others and "Traceback" not in others


def test_thoughts_that_are_updated_together_can_be_replaced():
    model = tiny_model(thought_schedule="jacobi", jacobi_iterations=2)
    answer, thoughts, others = said(asker_of(model), None, "Which?")
    assert 'id="mmc-thoughts">3<' in answer and "thought 3" in thoughts and 'data-name="zero"' in others


@pytest.mark.parametrize("content", [b"no picture", b""], ids=["text", "empty"])
def test_an_unreadable_picture_is_named_with_the_remedy(asker, tmp_path, content):
    file = tmp_path / "broken.png"
    file.write_bytes(content)
    answer, thoughts, others = said(asker, str(file), "Which?")
    assert "broken.png" in answer and "replace the file" in answer and (thoughts, others) == ("", "")


@pytest.mark.parametrize("question", ["", "  \n", None])
def test_no_question_is_a_message(asker, question):
    assert "The question is empty. Write one" in said(asker, None, question)[0]


def test_too_many_thoughts_are_a_message_with_the_remedy(asker):
    assert "Lower max_new_tokens or num_latents" in said(asker, None, "Which?", 500)[0]


def test_what_a_visitor_writes_is_shown_as_text(asker, tmp_path):
    file = tmp_path / "<img src=x onerror=alert(1)>.png"
    file.write_bytes(b"no picture")
    [answer, *_] = said(asker, str(file), "<script>alert(1)</script>")
    assert "<img" not in answer and "&lt;img" in answer


def test_placeholders_in_a_question_are_text(asker):
    answer, *_ = said(asker, None, "What is <image> and <|latent|>?", with_others=False)
    assert 'id="mmc-tokens"' in answer


@pytest.mark.parametrize("with_pictures", [True, False])
def test_examples_of_text_alone_leave_no_place_for_a_picture(asker, examples, with_pictures):
    rows = examples if with_pictures else [{**row, "images": []} for row in examples]
    page = demo.build_page(asker_of(asker.model, rows), name="tiny")
    [picture] = [block for block in page.blocks.values() if block.elem_id == "picture"]
    assert picture.visible == with_pictures


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model = None: name a checkpoint"),
        (["--model", "x", "--dtype", "int8"], "choose one of auto"),
        (["--model", "x", "--prot", "1"], "did you mean `port`"),
        (["--model", "x", "--port", "many"], "port = 'many'"),
        (["--model", "x", "--max_samples", "0"], "must lie between 1 and"),
        (["--model", "x", "--package", PACKAGE], "only a Space installs one"),
    ],
)
def test_mistakes_on_the_command_line_are_named(words, message):
    with pytest.raises(RecipeError, match=message):
        demo.parse_demo_arguments(words)


def test_the_recipe_beside_the_weights_names_the_examples(tmp_path):
    (tmp_path / "recipe.yaml").write_text("dataset: arrow_mazes\ndataset_options: {seed: 3}\nmax_new_tokens: 9\n")
    arguments = demo.parse_demo_arguments(["--model", str(tmp_path), "--dataset_options.num_rows", "5"])
    assert (arguments.max_new_tokens, arguments.num_beams) == (9, 1)
    expected = load_examples("arrow_mazes", split="test", seed=3, num_rows=5)
    assert demo.read_example_rows(arguments) == list(expected)
    other = demo.parse_demo_arguments(["--model", str(tmp_path), "--dataset", "graph_paths"])
    assert (other.dataset_options, other.max_new_tokens) == ({}, 64)


def test_examples_that_are_not_here_name_others():
    arguments = demo.parse_demo_arguments(
        ["--model", "x", "--dataset", "json_steps", "--dataset_options.file", "no/{split}"]
    )
    with pytest.raises(
        ValueError, match="there is no such file.*\n.*use other examples, such as --dataset arrow_mazes"
    ):
        demo.read_example_rows(arguments)


def test_more_thoughts_than_the_language_model_has_positions_are_refused():
    demo.check_thoughts_fit(tiny_model("llama"), 10_000)  # rotary positions have no limit
    demo.check_thoughts_fit(tiny_model("gpt2"), 127)
    with pytest.raises(UsageError, match="num_latents is 128, and the language model has 128 positions: .* fewer"):
        demo.check_thoughts_fit(tiny_model("gpt2"), 128)


def test_a_port_that_is_taken_is_named_with_the_remedy(checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        words = ["--model", checkpoint, "--dataset_options.num_rows", "2", "--max_samples", "2", "--port", port]
        with pytest.raises(ValueError, match=f"No server at 127.0.0.1, port {port} .*. Set another --port"):
            demo.main(words)


def test_missing_gradio_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"The demo needs gradio: pip install mmcoconut\[demo\]"):
        load_extra("gradio", "demo")


def test_evaluation_and_audit_read_their_command_line_as_before(tmp_path):
    (tmp_path / "recipe.yaml").write_text("dataset: arrow_mazes\nmax_new_tokens: 9\n")
    arguments = asking.parse_arguments(["--model", str(tmp_path), "--num_beams", "2"])
    assert (arguments.dataset, arguments.max_new_tokens, arguments.num_beams) == ("arrow_mazes", 9, 2)


@pytest.fixture(scope="module")
def space(tmp_path_factory, checkpoint, examples) -> Path:
    folder = tmp_path_factory.mktemp("space")
    options = {"num_latents": 2, "max_new_tokens": NEW_TOKENS}
    spaces.build_space(folder, examples, model=checkpoint, package=PACKAGE, **options)
    return folder


def test_the_metadata_of_a_space_are_what_the_hub_reads(space, checkpoint):
    data = SpaceCard.load(space / "README.md").data
    assert (data.sdk, data.app_file, data.models, data.license) == ("gradio", "app.py", [checkpoint], "mit")
    assert data.sdk_version == gr.__version__
    assert (space / data.app_file).is_file() and data.title
    assert (space / "requirements.txt").read_text().splitlines()[0] == PACKAGE
    assert {path.name for path in space.iterdir()} == {"app.py", "requirements.txt", "README.md", "examples"}


def test_the_app_of_a_space_answers(space, checkpoint, asker, examples, monkeypatch):
    monkeypatch.setattr(gr.Blocks, "launch", partialmethod(gr.Blocks.launch, prevent_thread_lock=True, quiet=True))
    app = runpy.run_path(str(space / "app.py"), run_name="__main__")
    try:
        assert type(app["model"]).__module__.startswith("mmcoconut.")  # which the Space installs
        assert [row["question"] for row in app["examples"]] == [row["question"] for row in examples]
        assert app["page"].local_url.startswith("http://127.0.0.1:")
        asked = app["asker"].ask(app["examples"][0], 2)
        assert asked.output == asker.ask(examples[0], 2).output
        assert "zero" in by_name(app["asker"].intervene(asked))
    finally:
        app["page"].close()


@pytest.mark.parametrize(
    ("package", "message"),
    [(None, "package is None"), ("numpy", "installs numpy"), ("git+https://example.org/x", "not a valid requirement")],
)
def test_a_space_needs_to_know_where_the_package_is(tmp_path, package, message):
    with pytest.raises(ValueError, match=f"{message}.*--package 'mmcoconut @ git"):
        spaces.build_space(tmp_path, [], model="someone/model", package=package)
    assert not list(tmp_path.iterdir())


def pushing(*words: str) -> list[str]:
    return ["--dataset_options.num_rows", "2", "--max_samples", "2", "--push_space", "someone/demo", *words]


@pytest.mark.slow
def test_a_pushed_space_is_on_the_hub(tmp_path):
    with Hub() as hub:
        words = pushing("--model", "someone/model", "--revision", "v2", "--package", PACKAGE, "--private", "true")
        environment = {
            **os.environ,
            **hub.environment(tmp_path / "hf"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-P", "-m", "mmcoconut.demo", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
        files = hub.files("someone/demo", kind="space")
        assert hub.repositories["space", "someone/demo"].private
    assert b"MODEL, REVISION = 'someone/model', 'v2'" in files["app.py"]
    assert {"README.md", "requirements.txt", "examples/examples.json", "examples/0.png", "examples/1.png"} < {*files}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "MODEL", "--package", PACKAGE], "a Space loads from the Hub. Push the checkpoint"),
        (["--model", "someone/model"], "package is None"),
        (["--model", "a b", "--package", PACKAGE], "a b"),
    ],
)
def test_what_no_space_could_load_is_not_uploaded(checkpoint, monkeypatch, words, message):
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: pytest.fail("a Space was made"))
    with pytest.raises(ValueError, match=message):
        demo.main(pushing(*(checkpoint if word == "MODEL" else word for word in words)))
