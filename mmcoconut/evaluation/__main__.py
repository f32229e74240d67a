"""`python -m mmcoconut.evaluation`."""

from accelerate import PartialState

from mmcoconut.errors import run_command
from mmcoconut.evaluation.evaluate import main


if __name__ == "__main__":
    run_command(main, name="eval")
    PartialState().destroy_process_group()
