"""A web page that asks a checkpoint questions and shows its thoughts: `python -m mmcoconut.demo`."""
