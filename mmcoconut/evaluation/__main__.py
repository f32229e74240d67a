"""`python -m mmcoconut.evaluation`."""

from accelerate import PartialState

from mmcoconut.errors import run_command
from mmcoconut.evaluation.evaluate import RESUME, main


if __name__ == "__main__":
    run_command(main, resume=RESUME)
    PartialState().destroy_process_group()
