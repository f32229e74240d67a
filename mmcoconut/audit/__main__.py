"""`python -m mmcoconut.audit`."""

from mmcoconut.audit.command import main
from mmcoconut.errors import run_command


if __name__ == "__main__":
    run_command(main, name="audit")
