"""A recipe, its bases and the command line become checked dataclasses; no model and no trainer is imported."""
