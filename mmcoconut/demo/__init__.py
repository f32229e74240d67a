"""A page that asks a checkpoint and shows its thoughts: `python -m mmcoconut.demo`."""
