"""Task files for lm-eval and lmms-eval, and a model class for lmms-eval: other programs ask the same rows."""

from pathlib import Path


# The folder of task files that each program is given as `--include_path`.
TASK_FOLDERS = {name: Path(__file__).parent / f"{name}_tasks" for name in ("lm_eval", "lmms_eval")}
