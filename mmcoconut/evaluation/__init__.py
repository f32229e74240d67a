"""A checkpoint answers rows, alone (`python -m mmcoconut.evaluation`) or beside its controls."""
