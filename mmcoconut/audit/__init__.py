"""Audit a checkpoint's thoughts: do they matter, and what do they encode? `python -m mmcoconut.audit`."""
