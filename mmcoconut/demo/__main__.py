"""`python -m mmcoconut.demo`."""

from mmcoconut.demo.page import main
from mmcoconut.errors import run_command


if __name__ == "__main__":
    run_command(main)
