"""The command `mmcoconut`: a separate package, so that help and `doctor` work without torch and transformers."""
