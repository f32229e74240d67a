"""`python -m mmcoconut.audit` writes a whole report about a checkpoint, and refuses what it could not judge."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny import tiny_image, tiny_model, tiny_processor

from mmcoconut.audit import command as audit
from mmcoconut.audit import necessity
from mmcoconut.audit.report import card_of, probe_line
from mmcoconut.audit.verdict import CANNOT_TELL
from mmcoconut.data import load_examples
from mmcoconut.errors import RecipeError
from mmcoconut.evaluation import answering, evaluate


NUM_ROWS = 12
DATA = ["--dataset", "arrow_mazes", "--dataset_options.num_rows", str(NUM_ROWS), "--dataset_options.cell_size", "8"]
OPTIONS = [*DATA, "--max_new_tokens", "3", "--batch_size", "6", "--num_shown", "2"]


def save_checkpoint(folder, **config) -> str:
    model = tiny_model(**config)
    model.save_pretrained(folder)
    tiny_processor(model, markers="start", num_latents=2).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def audited(checkpoint, tmp_path_factory):
    """The folder and the record of one audit of random weights; all that they write counts as their answer."""
    folder = tmp_path_factory.mktemp("audits") / "audit"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering, "parse_answer", str.strip)
        return folder, audit.main(["--model", checkpoint, *OPTIONS, "--output_dir", str(folder)])


class Page(HTMLParser):
    """Collects what a page refers to, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.references, self.words, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.words.append(data)


def test_report_is_one_whole_page_that_needs_no_network(audited):
    folder, record = audited
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.references and all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not re.search(r"https?://|url\(|@import|<script", text)
    for reference in page.references:
        Image.open(io.BytesIO(base64.b64decode(reference.partition(",")[2]))).verify()
    words = " ".join(" ".join(page.words).split())
    findings = [record[part] for part in ("verdict", "necessity", "positions")] + [record["necessity"]["no_image"]]
    for said in [f["sentence"] for f in findings] + [o["description"] for o in record["interventions"].values()]:
        assert said in words


def test_pictures_of_the_report_are_saved_beside_it(audited):
    folder, record = audited
    names = {path.stem for path in (folder / "pictures").iterdir()}
    assert names == {"interventions", "geometry", "row_0", "row_1"}  # too few rows for a probe
    assert all("rows, fewer than 20" in reason for reason in record["probe"]["reasons"])


def test_record_holds_every_intervention_and_what_it_was_made_with(audited):
    folder, record = audited
    saved = json.loads((folder / "audit.json").read_text(encoding="utf-8"))
    assert saved == json.loads(json.dumps(record))
    asked, less = ["shuffled"], ["only_thoughts", "no_image", "own_embedding"]
    swaps, emptied = ["other_image", "other_question"], ["zero", "noise", "mean"]
    counts = ["count_0", "count_1", "count_3", "count_4"]
    alone, at_once = ["without_1", "without_2"], ["count_0_at_once", "count_1_at_once"]
    assert list(saved["interventions"]) == [*asked, *less, *swaps, *emptied, *alone, *counts, *at_once]
    assert saved["parts"] == list(audit.PARTS) and saved["not_run"] == []
    assert (saved["n"], saved["num_latents"], saved["metric"]) == (NUM_ROWS, 2, "exact_match")
    assert {"commit", "machine", "versions", "command", "date", "dtype", "seed"} <= saved.keys()
    assert len(saved["geometry"]["norm_mean"]) == 2


def test_every_answer_is_kept(audited):
    folder, record = audited
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == NUM_ROWS
    for name, outcome in record["interventions"].items():
        changed = sum(line[name] != line["untouched"] for line in lines) / NUM_ROWS
        assert outcome["changed"]["mean"] == changed


def test_random_weights_are_not_said_to_depend_on_their_thoughts(audited):
    """Whose accuracy is nothing cannot lose any."""
    _, record = audited
    assert record["accuracy"]["mean"] == 0
    assert record["verdict"]["label"] == CANNOT_TELL


def test_random_weights_are_not_said_to_carry_anything_in_their_thoughts(audited):
    _, record = audited
    findings = (record["necessity"], record["necessity"]["no_image"], record["positions"])
    assert [finding["label"] for finding in findings] == [CANNOT_TELL] * 3
    for finding, name in zip(findings, ("only_thoughts", "no_image", "own_embedding")):
        outcome = record["interventions"][name]
        assert (finding["accuracy"], finding["difference"]) == (outcome["accuracy"], outcome["difference"])
    assert record["positions"]["controls"] == []


def test_card_section_states_verdict_and_figures(audited):
    folder, record = audited
    card = (folder / "card.md").read_text(encoding="utf-8")
    assert card == card_of(record)
    assert record["verdict"]["sentence"] in card
    assert record["necessity"]["sentence"] in card and record["positions"]["sentence"] in card
    assert card.count("\n| ") == 11  # head, untouched, three swaps, two that see less, positions, three replacements
    assert "`exact_match` on 12 rows of `arrow_mazes` (test)" in card


def test_probe_line_names_the_best_thought_of_each_target():
    probe = {
        "targets": ["step 1", "step 2"],
        "reasons": [None, "3 held-out rows, fewer than 20"],
        "accuracy": [[0.5, None], [0.9, None]],
        "majority": [0.25, None],
    }
    assert (
        probe_line(probe)
        == "step 1: 90.0 % in thought 2 (majority 25.0 %). Not probed: step 2 (3 held-out rows, fewer than 20)"
    )
    assert probe_line({**probe, "reasons": ["few", "few"]}) is None


def test_second_audit_into_the_same_folder_needs_overwrite(audited, checkpoint, tmp_path):
    folder, _ = audited
    with pytest.raises(ValueError, match="is not empty: give --overwrite true"):
        audit.main(["--model", checkpoint, *OPTIONS, "--output_dir", str(folder)])
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds thesis.tex, which is not of an audit"):
        audit.main(["--model", checkpoint, *OPTIONS, "--output_dir", str(tmp_path), "--overwrite", "true"])


def test_overwriting_waits_for_the_new_audit_and_keeps_what_is_not_its_own(audited, checkpoint, tmp_path):
    folder = tmp_path / "audit"
    shutil.copytree(audited[0], folder)
    (folder / "notes.txt").write_text("mine")
    options = ["--model", checkpoint, *OPTIONS, "--output_dir", str(folder), "--overwrite", "true"]
    before = (folder / "audit.json").read_text()
    with pytest.raises(ValueError, match="num_latents 0"):
        audit.main([*options, "--num_latents", "0"])
    assert (folder / "audit.json").read_text() == before
    audit.main([*options, "--num_shown", "1", "--seed", "5"])
    assert json.loads((folder / "audit.json").read_text())["seed"] == 5
    assert {path.stem for path in (folder / "pictures").iterdir()} == {"interventions", "geometry", "row_0"}
    assert (folder / "notes.txt").read_text() == "mine"


def test_rows_are_drawn_at_random_and_kept_in_order():
    rows = load_examples("arrow_mazes", split="test", num_rows=30, cell_size=8)
    drawn = [row["row_id"] for row in audit.draw_rows(rows, 10, seed=1)]
    numbers = [int(row_id.split()[-1]) for row_id in drawn]
    assert numbers == sorted(set(numbers)) and numbers != list(range(10))
    assert drawn == [row["row_id"] for row in audit.draw_rows(rows, 10, seed=1)]
    assert len(audit.draw_rows(rows, None, seed=1)) == 30


def test_several_processes_are_refused():
    with pytest.raises(ValueError, match="in one process, but 2 were started"):
        audit.check_start(audit.AuditArguments(), SimpleNamespace(num_processes=2))


@pytest.mark.parametrize("images", ["none", "several"])
def test_text_only_and_several_images_can_be_audited(checkpoint, tmp_path, images):
    rows = [
        {"question": f"What is {index}?", "steps": [], "answer": "red" if index % 2 else "blue", "image": []}
        for index in range(6)
    ]
    for index, row in enumerate(rows if images == "several" else []):
        row["image"] = [f"{index}.png", f"{index}b.png"]
        for seed, name in enumerate(row["image"]):
            tiny_image(10 * index + seed).save(tmp_path / name)
    (tmp_path / "test.json").write_text(json.dumps(rows))
    data = ["--dataset", "json_steps", "--dataset_options.file", str(tmp_path / "{split}.json"), "--split", "test"]
    data += (
        ["--dataset_options.image_root", str(tmp_path)]
        if images == "several"
        else ["--dataset_options.images_required", "false"]
    )
    folder = tmp_path / "audit"
    record = audit.main(["--model", checkpoint, *data, "--max_new_tokens", "3", "--output_dir", str(folder)])
    assert record["n"] == 6
    assert ("other_image" in record["interventions"]) == (images == "several")
    assert (folder / "pictures" / "row_0.png").exists() == (images == "several")


def test_thoughts_that_are_updated_together_are_audited(tmp_path):
    model = save_checkpoint(tmp_path / "jacobi", thought_schedule="jacobi", jacobi_iterations=1)
    record = audit_parts(model, tmp_path / "audit", "verdict,interventions,geometry")
    assert {"zero", "without_2", "count_4"} <= record["interventions"].keys()
    assert len(record["geometry"]["norm_mean"]) == 2


def test_pause_checkpoint_is_refused(tmp_path):
    model = save_checkpoint(tmp_path / "pause", thought_mode="pause")
    with pytest.raises(ValueError, match="feeds no hidden state back"):
        audit.main(["--model", model, *OPTIONS, "--output_dir", str(tmp_path / "audit")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_latents", "0"], "num_latents 0"),
        (["--max_samples", "1"], "1 rows"),
        (["--score_by", "likelihood"], "reads what is written"),
        (["--margins", "0.1"], "did you mean `margin`"),
        (["--parts", "verdict,neccessity"], "parts = 'neccessity'.*did you mean `necessity`"),
        (["--parts", "verdict", "--controls", "there"], "the part positions"),
        (["--controls", "there"], "there holds no evaluation.json"),
    ],
)
def test_what_could_not_be_judged_is_refused(checkpoint, tmp_path, words, message):
    with pytest.raises((ValueError, RecipeError), match=message):
        audit.main(["--model", checkpoint, *OPTIONS, "--output_dir", str(tmp_path / "audit"), *words])


def audit_parts(checkpoint: str, folder, parts: str) -> dict:
    return audit.main(["--model", checkpoint, *OPTIONS, "--output_dir", str(folder), "--parts", parts])


def test_parts_are_all_that_is_asked_and_written(audited, checkpoint, tmp_path, monkeypatch):
    """And the figures are those of a whole audit."""
    monkeypatch.setattr(answering, "parse_answer", str.strip)
    record, whole = audit_parts(checkpoint, tmp_path, "verdict,necessity,probe"), audited[1]
    assert {path.name for path in tmp_path.iterdir()} == {"audit.json", "answers.jsonl", "card.md"}
    assert list(record["interventions"]) == ["shuffled", "only_thoughts", "no_image"]
    assert record["parts"] == ["verdict", "necessity", "probe"]
    assert not record.keys() & {"positions", "geometry"}
    for key in ("accuracy", "necessity", "probe"):
        assert record[key] == whole[key]
    assert record["verdict"]["sentence"] == whole["verdict"]["sentence"]
    assert record["necessity"]["sentence"] in (tmp_path / "card.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("parts", ["geometry,report", "report"])
def test_a_report_of_few_parts_is_whole(checkpoint, tmp_path, parts):
    audit_parts(checkpoint, tmp_path, parts)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert Page(text).open == []
    assert ("<h2>Geometry" in text) == ("geometry" in parts) and "<h2>Interventions" not in text
    assert "Do the thoughts carry" not in text and "thought by thought" in text


def refusing(message: str):
    """A stand-in for `seeing` in a model that cannot hide, or that fails otherwise."""

    def seeing(model, sees):
        raise ValueError(message)

    return seeing


def test_a_model_that_cannot_hide_says_why(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(necessity, "seeing", refusing("answer_sees='x' needs keys: this model has recurrent layers."))
    record = audit_parts(checkpoint, tmp_path, "necessity,report")
    refusals = [
        f"{name} was not run: answer_sees='x' needs keys: this model has recurrent layers"
        for name in ("only_thoughts", "no_image")
    ]
    assert record["not_run"] == refusals and record["interventions"] == {}
    assert record["necessity"]["label"] == CANNOT_TELL and record["necessity"]["accuracy"] is None
    text = (tmp_path / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")
    assert text.count(refusals[0]) == 2 and text.count(refusals[1]) == 2  # the finding, and the list


def test_other_errors_are_not_taken_for_a_refusal(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(necessity, "seeing", refusing("sizes do not fit"))
    with pytest.raises(ValueError, match="sizes do not fit"):
        audit_parts(checkpoint, tmp_path, "necessity")


def test_controls_stand_beside_the_checkpoint(audited, checkpoint, tmp_path):
    """The evaluation of the same checkpoint, said to be a control's, differs from it in nothing."""
    control = tmp_path / "pause-seed1"
    evaluate.main(["--model", checkpoint, *DATA, "--max_new_tokens", "3", "--output_dir", str(control)])
    record = json.loads((control / "evaluation.json").read_text())
    record["trained_with"] = {"mode": "pause", "seed": 1, "train_steps": 10}
    (control / "evaluation.json").write_text(json.dumps(record))
    options = ["--model", checkpoint, *OPTIONS, "--parts", "positions,report", "--controls", str(control)]
    positions = audit.main([*options, "--output_dir", str(tmp_path / "audit")])["positions"]
    assert [(c["mode"], c["seed"], c["difference"]["mean"]) for c in positions["controls"]] == [("pause", 1, 0)]
    text = (tmp_path / "audit" / "report.html").read_text(encoding="utf-8")
    assert "<td>pause, seed 1</td>" in text and "a run of mode pause, seed 1, has 0.0 %" in text
