"""`python -m mmcoconut.demo`."""

from mmcoconut.arguments.recipe_files import run_command
from mmcoconut.demo.page import main


if __name__ == "__main__":
    run_command(main)
