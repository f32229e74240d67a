"""Evaluation of checkpoints, alone (`python -m mmcoconut.evaluation`) or in comparison with their controls."""
