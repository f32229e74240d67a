"""Print the folder of task files of a program: `lm_eval --include_path "$(python -m mmcoconut.harnesses lm_eval)"`."""

import sys

from mmcoconut.data import nearest
from mmcoconut.errors import UsageError, run_command
from mmcoconut.harnesses import TASK_FOLDERS


def main(argv: list[str] | None = None) -> None:
    """Print one folder; raise UsageError unless given the name of one program."""
    words = sys.argv[1:] if argv is None else argv
    if len(words) != 1 or words[0] not in TASK_FOLDERS:
        usage = "python -m mmcoconut.harnesses lm_eval"
        raise UsageError(
            f"{' '.join(words) or 'no name'} was given, as in `{usage}`; {nearest(' '.join(words), TASK_FOLDERS)}"
        )
    print(TASK_FOLDERS[words[0]])


if __name__ == "__main__":
    run_command(main)
