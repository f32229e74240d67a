"""What a model learns from: the alignment of images with texts, the rewards of answers."""
