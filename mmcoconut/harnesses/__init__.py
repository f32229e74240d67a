"""Task files for lm-eval and lmms-eval, and a model class for lmms-eval: evaluate the same rows in other programs."""

from pathlib import Path


# The folder of task files for the `--include_path` of each program.
TASK_FOLDERS = {name: Path(__file__).parent / f"{name}_tasks" for name in ("lm_eval", "lmms_eval")}
