"""Parse a recipe, its bases and the command line into checked dataclasses; imports no model and no trainer."""
