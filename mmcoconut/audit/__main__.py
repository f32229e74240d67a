"""`python -m mmcoconut.audit`."""

from mmcoconut.arguments.recipe_files import run_command
from mmcoconut.audit.command import main


if __name__ == "__main__":
    run_command(main)
