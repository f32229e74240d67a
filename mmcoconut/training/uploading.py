"""Upload saved models and their model cards to the Hub during training."""

from functools import partial
from pathlib import Path

from transformers.trainer_utils import HubStrategy

from mmcoconut.arguments.recipes import read_recipe
from mmcoconut.hub.card import Evidence, model_card, write_card
from mmcoconut.hub.uploads import LAST_CHECKPOINT, Repository, Uploads, copy_checkpoint, copy_model
from mmcoconut.records import RECIPE_FILE, read_json
from mmcoconut.tables import stage_row, stage_rows


STAGE_FILE = "stage.json"
UPLOADS = ".uploads"


class UploadsSaves:
    """Mixin before transformers' Trainer: upload saves in the background, and each stage's best model to a branch."""

    uploads: Uploads | None = None  # in the process that uploads, once the repository is known

    def save_model(self, output_dir: str | None = None, _internal_call: bool = True) -> None:
        """Save the model without uploading it."""
        super().save_model(output_dir, _internal_call=True)

    def init_hf_repo(self, *args, **kwargs) -> None:
        """Create the repository of `push_to_hub`; if that fails for now, log it (see Uploads.start)."""
        if not self.is_world_process_zero():
            return
        args = self.args
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        repository = Repository(name, private=args.hub_private_repo, token=args.hub_token)
        self.uploads = Uploads(repository, Path(args.output_dir, UPLOADS), main=args.hub_revision)
        self.uploads.start()

    @property
    def uploads_saves(self) -> bool:
        """True if saves are uploaded during training, in the process that uploads."""
        args = self.args
        return args.push_to_hub and args.hub_strategy != HubStrategy.END and self.is_world_process_zero()

    def create_model_card(self, folder: Path | None = None, *, results: dict | None = None, rows=None) -> None:
        """Write README.md from model_card.md, with results.json or, during training, with the stages so far.

        folder: where the model is saved; default output_dir. rows: of the stages; default: from the log.
        """
        folder = Path(folder or self.args.output_dir)
        recipe = Path(self.args.output_dir, RECIPE_FILE)
        recipe = read_recipe(recipe) if recipe.is_file() else {}
        rows = stage_rows(self.state.log_history) if rows is None else rows
        if results is None and rows:
            mode = self.curriculum_collator.curriculum.mode
            results = {"mode": mode, "metric": self.metric, "split": recipe.get("eval_split"), "stages": rows}
        evidence = Evidence(recipe=recipe, results=results)
        name, branches = self.args.output_dir, ()
        if self.uploads is not None:
            name, branches = self.uploads.repository.name, self.uploads.branches
        card = model_card(
            str(name),
            evidence,
            config=self.model.config,
            processor=type(self.processing_class).from_pretrained(folder, trust_remote_code=False),
            license=recipe.get("license"),
            branches=branches,
        )
        write_card(folder, card, evidence)

    def fill_revision(self, copy: Path, saved: Path, *, checkpoint: bool = False, **card) -> None:
        """Fill a folder for the Hub: the model, its card and, for `hub_strategy: checkpoint`, files to resume from."""
        copy_model(saved, copy)
        if checkpoint:
            copy_checkpoint(saved, copy / LAST_CHECKPOINT)
        self.create_model_card(copy, **card)

    def add_best_of_stage(self, folder: Path) -> None:
        """Queue the stage's branch for the next upload; its card ends with the evaluation that selected the model."""
        record = read_json(folder / STAGE_FILE)
        rows = [row for row in stage_rows(self.state.log_history) if row["stage"] < record["eval_stage"]]
        message = f"Best of stage {record['eval_stage']}, step {record['global_step']}"
        fill = partial(self.fill_revision, saved=folder, rows=[*rows, stage_row(record)])
        self.uploads.add(folder.name, fill, message)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: the checkpoint is uploaded when it is complete and in its place."""

    def upload_checkpoint(self, saved: Path) -> None:
        """Upload a checkpoint and the waiting best models of stages in the background."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        whole = self.args.hub_strategy == HubStrategy.CHECKPOINT
        message = f"Training in progress, step {self.state.global_step}"
        fill = partial(self.fill_revision, saved=saved, checkpoint=whole)
        self.uploads.add(self.uploads.main, fill, message)
        self.uploads.begin()

    def push_to_hub(self, commit_message: str = "End of training", *, results: dict | None = None) -> None:
        """Upload the current model and waiting revisions. Failures are reported, not raised: the run is on disk.

        results: in the format of results.json, for the card; default: the stages so far.
        """
        self.save_model()
        if not self.is_world_process_zero():
            return
        if self.uploads is None:
            self.init_hf_repo()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder = Path(self.args.output_dir)
        for record in folder.glob(f"stages/*/{STAGE_FILE}") if self.uploads_saves else ():
            if record.parent.name not in self.uploads.branches:  # of the run before it was resumed, too
                self.add_best_of_stage(record.parent)
        self.uploads.begin().result()  # so that the card knows the branches
        self.create_model_card(results=results)
        self.uploads.add(self.uploads.main, partial(self.fill_revision, saved=folder, results=results), commit_message)
        self.uploads.finish(folder)
