"""The Space of this metric: a table to type predictions and references into."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget


launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("pair_accuracy.py"))))
