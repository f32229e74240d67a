"""The curriculum, its batches and its Trainer."""
