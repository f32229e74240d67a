"""What a run uploads while it trains and what the command publishes, through a server and back into a new process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub import WRONG_TOKEN, Hub
from huggingface_hub import ModelCard
from test_train import TINY, losses
from tiny import tiny_image, tiny_model, tiny_processor

from mmcoconut import publish
from mmcoconut.errors import RecipeError
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.processing_mmcoconut import MMCoconutProcessor


ROOT = Path(__file__).resolve().parent.parent
MAZES = ROOT / "benchmarks" / "results" / "mazes"
TOKEN = "hf_secret"
QUESTION = "Which color?"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

TRAIN = """
import os, sys
from pathlib import Path

import train_hf
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from mmcoconut import publish
from mmcoconut.audit import command
from mmcoconut.evaluation import evaluate
from mmcoconut.hub import uploads
from mmcoconut.hub.uploads import Repository, Uploads
from mmcoconut.modeling_mmcoconut import MMCoconutForConditionalGeneration
from mmcoconut.processing_mmcoconut import MMCoconutProcessor


def run(name, *options):
    start = ["tiny.yaml", "--output_dir", name, "--push_to_hub", "true", "--hub_model_id", f"user/{name}"]
    return train_hf.main([*start, "--lr_scheduler_type", "constant", *options])


def fill(text):
    def write(folder):
        folder.mkdir(parents=True)
        (folder / "notes.json").write_text(text)
    return write


# A run that uploads every save, and what is measured and published of it afterwards.
run("every", "--hub_private_repo", "true", "--hub_token", os.environ["TOKEN"], "--license", "mit")
data = ["--split", "validation"]
evaluate.main(["--model", "every", *data, "--output_dir", "evaluated"])
command.main(["--model", "every", *data, "--output_dir", "audited", "--max_samples", "6", "--num_shown", "1"])
measured = ["--evaluation", "evaluated", "--audit", "audited"]
published = ["--model", "every", "--repo_id", "user/published", "--private", "true"]
publish.main([*published, "--max_shard_size", "30KB", "--message", "In pieces"])
publish.main([*published, *measured, "--message", "Whole"])

# As the library's own methods do it.
MMCoconutForConditionalGeneration.from_pretrained("every").push_to_hub("user/plain", max_shard_size="30KB")
MMCoconutProcessor.from_pretrained("every").push_to_hub("user/plain")

# Hubs that fail.
run("checkpoint", "--hub_strategy", "checkpoint", "--num_train_epochs", "2")  # its repository cannot be made at first
resumed = ["--output_dir", "checkpoint", "--resume_from_checkpoint", "true"]
run("resumed", *resumed, "--num_train_epochs", "2")  # it was finished, but not in this repository
run("end", "--hub_strategy", "end", "--num_train_epochs", "1")
try:
    run("refused", "--hub_token", sys.argv[1])
except HfHubHTTPError as error:
    print("refused:", error.response.status_code)
try:
    Repository("user/checkpoint", private=True).make()
except ValueError as error:
    print(error)

retried = Uploads(Repository("user/retried"), Path("copies"))
retried.start()
retried.add("main", fill("first"), "first")
retried.add("stage-0", fill("best"), "best")
retried.begin().result()
print("failed:", *retried.errors)
retried.add("main", fill("second"), "second")
retried.begin().result()
print("failed:", *retried.errors)
retried.finish(Path("run"))

uploads.PATIENCE = 1
silent = Uploads(Repository("user/silent"), Path("copies"))
silent.start()
silent.add("main", fill("first"), "first")
silent.begin().result()
print("silent:", silent.errors["main"])

constants.ENDPOINT = "http://127.0.0.1:9"  # where nothing listens
run("away", "--num_train_epochs", "1")
"""

LOAD = """
import json, sys
sys.modules["mmcoconut"] = None  # importing the repository's package is an error from here on

import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel, AutoProcessor

torch.set_num_threads(1)
image, found = Image.open("image.png"), {}
for name, revision in json.loads(sys.argv[1]):
    remote = {"trust_remote_code": True, "revision": revision}
    model = AutoModel.from_pretrained(name, **remote).eval()
    processor = AutoProcessor.from_pretrained(name, backend="pil", **remote)
    inputs = processor(images=image, text=sys.argv[2], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    found[f"{name}@{revision}"] = (processor.num_latents, logits, type(model).__module__)
ModelCard.load("user/published").validate()
torch.save(found, "found.pt")
"""


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


def start(code: str, folder: Path, hub: Hub, *arguments: str, **variables: str) -> str:
    """What a new process prints; for it the server is the Hub, and its cache is empty."""
    environment = {**os.environ, **hub.environment(folder / "hf"), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(hub, tmp_path_factory) -> tuple[Path, str]:
    """The folder of all runs, and what they printed."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(TINY)
    hub.fail("create", "user/checkpoint", times=1)
    hub.fail("commit", "user/end", times=99)
    hub.fail("commit", "user/retried", times=2)
    hub.fall_silent("commit", "user/silent")
    printed = start(TRAIN, folder, hub, WRONG_TOKEN, PYTHONPATH=str(ROOT), TOKEN=TOKEN)
    return folder, printed


def revisions(hub: Hub, name: str) -> dict[str, str]:
    """Commits by their titles, without the Hub's own first one."""
    commits = hub.repositories["model", name].commits.items()
    return {commit.title: oid for oid, commit in commits if commit.title != "initial commit"}


@pytest.fixture(scope="module")
def loaded(hub, trained, tmp_path_factory) -> dict:
    """What a process that has never seen this repository gets out of every revision and branch."""
    folder = tmp_path_factory.mktemp("elsewhere")
    tiny_image().save(folder / "image.png")
    asked = [(name, oid) for name in ("user/every", "user/published") for oid in revisions(hub, name).values()]
    asked += [("user/every", f"stage-{stage}") for stage in range(3)]
    asked += [("user/checkpoint", "main"), ("user/plain", "main")]
    start(LOAD, folder, hub, json.dumps(asked), QUESTION, PYTHONPATH="")
    return torch.load(folder / "found.pt", weights_only=True)


def expected(folder: Path) -> torch.Tensor:
    """Logits of a checkpoint on disk."""
    model = MMCoconutForConditionalGeneration.from_pretrained(folder).eval()
    processor = MMCoconutProcessor.from_pretrained(folder, trust_remote_code=False)
    with torch.no_grad():
        return model(**processor(images=tiny_image(), text=QUESTION, return_tensors="pt")).logits


@pytest.mark.slow
def test_every_pushed_revision_loads_where_the_package_is_not(hub, loaded):
    every = revisions(hub, "user/every")
    assert {"Best of stage 0, step 6", "Best of stage 2, step 18", "End of training"} < every.keys()
    assert {f"user/every@{oid}" for oid in every.values()} < loaded.keys()
    assert all(module.startswith("transformers_modules.") for _, _, module in loaded.values())
    assert [loaded[f"user/every@stage-{stage}"][0] for stage in range(3)] == [0, 1, 2]


def test_a_pinned_revision_is_the_model_of_its_step(hub, trained, loaded):
    folder, _ = trained
    places = {f"Training in progress, step {step}": f"checkpoint-{step}" for step in (6, 12, 18)}
    places |= {"End of training": "", "Best of stage 1, step 12": "stages/stage-1"}
    every = revisions(hub, "user/every")
    found = {title: place for title, place in places.items() if title in every}
    assert {"Best of stage 1, step 12", "Training in progress, step 18", "End of training"} <= found.keys()
    for title, place in found.items():
        torch.testing.assert_close(loaded[f"user/every@{every[title]}"][1], expected(folder / "every" / place))


@pytest.mark.parametrize("name", ["user/plain@main", "In pieces", "Whole"])
def test_weights_in_pieces_and_whole_are_the_same_model(hub, trained, loaded, name):
    folder, _ = trained
    key = name if "@" in name else f"user/published@{revisions(hub, 'user/published')[name]}"
    torch.testing.assert_close(loaded[key][1], expected(folder / "every"))


def test_weights_are_cut_where_told_and_pieces_do_not_stay(hub, trained):
    published = revisions(hub, "user/published")
    pieces, whole = (sorted(hub.files("user/published", published[title])) for title in ("In pieces", "Whole"))
    assert len([file for file in pieces if file.endswith(".safetensors")]) > 2
    assert "model.safetensors.index.json" in pieces and "model.safetensors" not in pieces
    assert [file for file in whole if "safetensors" in file] == ["model.safetensors"]
    assert len([file for file in hub.files("user/plain") if file.endswith(".safetensors")]) > 2


def test_no_pickle_and_no_token_is_uploaded(hub, trained):
    for (_, name), repository in hub.repositories.items():
        for commit in repository.commits.values():
            for file, content in commit.files.items():
                resumed_from = file.startswith("last-checkpoint/") and name == "user/checkpoint"
                assert resumed_from or not file.endswith(PICKLES), file
                assert TOKEN.encode() not in content, file


def test_a_repository_is_as_private_as_was_said(hub, trained):
    _, printed = trained
    private = {name: repository.private for (_, name), repository in hub.repositories.items()}
    assert private["user/every"] and private["user/published"] and not private["user/checkpoint"]
    assert "user/checkpoint exists and is public. Make it private" in printed


def test_a_failed_upload_is_retried_at_the_next_save(hub, trained):
    _, printed = trained
    lines = [line for line in printed.splitlines() if line.startswith("failed:")]
    assert lines == ["failed: main stage-0", "failed:"]
    assert "main is not uploaded (HfHubHTTPError: Server error '503" in printed
    assert hub.titles("user/retried") == ["initial commit", "second", "best"]  # `first` gave way to what was newer
    assert hub.files("user/retried", "stage-0")["notes.json"] == b"best"
    assert hub.files("user/retried")["notes.json"] == b"second"


def test_a_hub_that_falls_silent_is_a_failure_and_not_a_hang(trained):
    _, printed = trained
    assert "silent: ReadTimeout" in printed


def test_uploads_and_their_failures_change_nothing_in_training(trained):
    folder, _ = trained
    every = losses(folder / "every")
    assert list(every) == list(range(1, 19))
    for name, updates in (("checkpoint", 12), ("end", 6), ("away", 6)):
        assert losses(folder / name) == {step: every[step] for step in range(1, updates + 1)}
    assert (folder / "away" / "results.json").exists() and not list(folder.glob("*/.uploads"))


def test_what_was_never_uploaded_is_said_at_the_end_with_the_remedy(hub, trained):
    _, printed = trained
    assert "user/away cannot be created on the Hub now" in printed
    for name in ("end", "away"):
        report = next(line for line in printed.splitlines() if line.startswith(f"not uploaded to user/{name}: main ("))
        remedy = f"Upload them with: python -m mmcoconut.publish --model {name} --repo_id user/{name}"
        assert report.endswith(f"All files are in {name}. {remedy}")
    assert hub.titles("user/end") == ["initial commit"]


def test_a_wrong_token_ends_the_run_before_it_trains(trained):
    folder, printed = trained
    assert "refused: 401" in printed
    assert not list((folder / "refused").glob("*.safetensors"))


def test_a_repository_that_could_not_be_made_is_made_by_the_next_save(hub, trained):
    _, printed = trained
    assert "user/checkpoint cannot be created on the Hub now" in printed
    assert "uploaded to user/checkpoint: main, stage-0, stage-1" in printed


def test_a_resumed_run_uploads_the_stages_that_are_not_there(hub, trained):
    for branch, latents in (("stage-0", 0), ("stage-1", 1)):
        files = hub.files("user/resumed", branch)
        assert files["model.safetensors"] == hub.files("user/checkpoint", branch)["model.safetensors"]
        assert json.loads(files["processor_config.json"])["num_latents"] == latents
    assert 'revision="stage-0"`, `revision="stage-1"`' in card_of(hub, "user/resumed").text


def test_the_last_checkpoint_on_the_hub_is_what_a_run_resumes_from(hub, trained):
    folder, _ = trained
    local = {file.name: file.read_bytes() for file in (folder / "checkpoint" / "checkpoint-12").iterdir()}
    local.pop("training_args.bin")
    files = hub.files("user/checkpoint").items()
    assert {file.rpartition("/")[2]: text for file, text in files if file.startswith("last-checkpoint/")} == local
    assert not any(file.startswith("last-checkpoint/") for file in hub.files("user/every"))


def card_of(hub: Hub, name: str, revision: str = "main") -> ModelCard:
    return ModelCard(hub.files(name, revision)["README.md"].decode())


def test_the_final_card_is_not_overwritten_and_names_the_stages(hub, trained):
    folder, _ = trained
    card, results = card_of(hub, "user/every"), json.loads((folder / "every" / "results.json").read_text())
    assert str(card) == (folder / "every" / "README.md").read_text()
    assert card.data.license == "mit" and card.data.eval_results[0].metric_value == results["stages"][-1]["accuracy"]
    assert 'revision="stage-0"`, `revision="stage-1"`, `revision="stage-2"' in card.text
    assert f"{results['parameters']:,} parameters" in card.text and "generated_from_trainer" not in str(card)
    assert "| 0 | 0 |" in card_of(hub, "user/every", "stage-1").text
    assert "| 2 | 2 |" not in card_of(hub, "user/every", "stage-1").text


def test_the_published_card_shows_evaluation_and_verdict(hub, trained):
    folder, _ = trained
    card = card_of(hub, "user/published")
    audit = json.loads((folder / "audited" / "audit.json").read_text())
    evaluation = json.loads((folder / "evaluated" / "evaluation.json").read_text())
    assert f"**{audit['verdict']['sentence']}**" in card.text
    assert card.data.eval_results[0].metric_value == evaluation["accuracy"]["mean"]
    line = json.loads((folder / "audited" / "answers.jsonl").read_text().splitlines()[0])
    assert f"Asked: *{line['question']}*" in card.text
    picture = (folder / "audited" / "pictures" / "row_0.png").read_bytes()
    assert hub.files("user/published")["thoughts.png"] == picture


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = tiny_model("gpt2")
    model.save_pretrained(folder)
    tiny_processor(model, num_latents=7).save_pretrained(folder)
    return folder


def problems(*argv: str) -> list[tuple]:
    with pytest.raises(RecipeError) as caught:
        publish.main([*argv])
    return caught.value.problems


def test_everything_that_is_missing_is_listed_at_once_with_the_remedy(checkpoint, tmp_path):
    (tmp_path / "there").mkdir()
    found = problems("--model", str(tmp_path), "--audit", str(tmp_path), "--dry_run", str(tmp_path / "there"))
    assert [(field, remedy.partition(":")[0]) for field, _, remedy in found] == [
        ("model", "it has no config.json"),
        ("repo_id", "name the repository"),
        ("audit", "it has no audit.json"),
        ("dry_run", "it exists already"),
    ]
    [(field, _, remedy)] = problems("--model", str(checkpoint), "--repo_id", "user/name", "--shown_row", "2")
    assert (field, remedy) == ("shown_row", "the rows belong to an audit: set --audit too")


@pytest.mark.parametrize("left_out", ["model.safetensors", "thinking_mmcoconut.py", "modeling_mmcoconut.py"])
def test_a_folder_that_would_not_load_is_refused(checkpoint, tmp_path, left_out):
    folder = tmp_path / "part"
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name != left_out:
            (folder / file.name).write_bytes(file.read_bytes())
    [(field, _, remedy)] = problems("--model", str(folder), "--repo_id", "user/name")
    assert field == "model" and remedy.startswith(f"it has no {left_out}")


def test_measurements_of_another_model_are_refused(checkpoint, tmp_path):
    recipe = json.loads((MAZES / "compare.json").read_text())["recipe"]
    (checkpoint / "recipe.yaml").write_text(json.dumps({**recipe, "output_dir": "x"}))
    results = {"mode": "coconut", "seed": 1, "train_steps": 2000, "train_seconds": 1.0, "command": "train_hf.py"}
    results |= {"commit": None, "versions": {}, "machine": "m", "stages": [], "metric": "exact_match", "split": "test"}
    (checkpoint / "results.json").write_text(json.dumps({**results, "date": "2026-01-01", "parameters": 1}))
    given = ["--model", str(checkpoint), "--repo_id", "user/name", "--dry_run", str(tmp_path / "dry")]
    both = problems(*given, "--audit", str(MAZES), "--compare", str(MAZES))
    found = {field: remedy for field, _, remedy in both}
    assert found["audit"].startswith("it belongs to another run, train_steps is 3000 there and 2000 here")
    assert found["compare"].startswith("its runs made 3000 updates, the model 2000")
    changed = {**recipe, "c_thought": 2, "output_dir": "x"}
    (checkpoint / "recipe.yaml").write_text(json.dumps(changed))
    [(_, _, remedy)] = problems(*given, "--compare", str(MAZES))
    assert remedy == "its runs have c_thought = 1, the model 2: give the comparison of its own recipe"
    assert not (tmp_path / "dry").exists()


def test_comparison_of_variants_is_of_a_model_that_is_one_of_them():
    compare = json.loads((MAZES / "compare.json").read_text())
    schedules = {"thought_schedule": "sequential", "jacobi_iterations": None, "objectives": None}
    updated = {"thought_schedule": "jacobi", "jacobi_iterations": 3, "objectives": None}
    for record, own in zip(compare["modes"], (schedules, updated, *[schedules] * 3), strict=True):
        record["settings"] = {"mode": record["mode"], **own}
    compare["recipe"] = {key: value for key, value in compare["recipe"].items() if key not in schedules}
    for own in (schedules, updated):
        evidence = publish.Evidence(recipe={**compare["recipe"], **own})
        assert publish.of_another_recipe(compare, evidence) is None
    evidence = publish.Evidence(recipe={**compare["recipe"], **updated, "jacobi_iterations": 4})
    assert publish.of_another_recipe(compare, evidence).startswith("none of its variants has {'jacobi_iterations': 4")


@pytest.mark.parametrize("name", ["bad name!!", "a/b/c", "-x/y"])
def test_a_name_that_the_hub_would_refuse_is_refused_before_anything_is_written(checkpoint, name, tmp_path):
    found = problems("--model", str(checkpoint), "--repo_id", name, "--dry_run", str(tmp_path / "dry"))
    assert [(field, value) for field, value, _ in found] == [("repo_id", name)]
    assert not (tmp_path / "dry").exists()
