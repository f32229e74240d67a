"""The command `mmcoconut`: apart from the package, so that help and `doctor` work without torch and transformers."""
