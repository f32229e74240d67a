"""Whether a checkpoint's thoughts matter, and what they hold: `python -m mmcoconut.audit`."""
