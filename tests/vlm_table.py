"""The table of vision-language models in docs/backbones.md: written by the tests that prove it, and held to them.

    python -m pytest tests/test_{vlms,vlm_training,vlm_audit,answer_sees}.py -m "" -n 0 --write-vlm-table

writes what passed; every other run fails where the page says something else than what the run found.
"""

import re
from pathlib import Path

import transformers


PAGE = Path(__file__).resolve().parent.parent / "docs" / "backbones.md"
COLUMNS = ("matches the definition", "batches", "beams", "saved, resized", "LoRA", "GRPO", "audit", "answer sees")
BEGIN, END = "<!-- written by tests/test_vlms.py: begin -->", "<!-- written by tests/test_vlms.py: end -->"
LONGEST = 160  # of a reason
RELEASE = re.compile(r"transformers (\d+\.\d+)\.")


def shortened(reason: str) -> str:
    """Return what a cell of a table says of a reason: no advice, no tokens."""
    text = re.sub(r"^from_vlm cannot take over a [^:]+: ", "", reason).partition("; take another")[0]
    text = re.sub(r"[<|>]+", "", text.partition(" Give the processor")[0].partition(" Take another")[0])
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rsplit(' ', 1)[0]} …"


class Table:
    """What each model type does, {type: {column: "yes" or why not}}, and why the others are not in it."""

    def __init__(self, writes: bool):
        self.writes, self.rows, self.reasons = writes, {}, {}
        text = PAGE.read_text(encoding="utf-8")
        self.before, _, rest = text.partition(BEGIN)
        table, _, self.behind = rest.partition(END)
        lines = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in table.splitlines()]
        self.known = {cells[0].strip("`"): cells[1:] for cells in lines if len(cells) == len(COLUMNS) + 1}
        written_for = RELEASE.search(table)
        self.is_of_this_release = bool(written_for) and transformers.__version__.startswith(f"{written_for[1]}.")

    def found(self, model_type: str, column: str, value: str = "yes") -> None:
        """Note what a test found of a type; fail if the page says otherwise for this release of transformers."""
        self.rows.setdefault(model_type, {})[column] = value
        if not self.writes and self.is_of_this_release:
            said = dict(zip(COLUMNS, self.known.get(model_type, ()))).get(column)
            assert said == value, f"docs/backbones.md says {said!r} of {column} of {model_type}, and it is {value!r}"

    def left_out(self, model_type: str, reason: str) -> None:
        self.reasons[model_type] = reason

    def write(self) -> None:
        """Put the table into the page."""
        head = ["", "| model type | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        body = []
        for model_type in sorted(self.rows):
            cells = (self.rows[model_type].get(column, "not run") for column in COLUMNS)
            body.append(f"| `{model_type}` | " + " | ".join(cells) + " |")
        release = ".".join(transformers.__version__.split(".")[:2])
        others = [
            "",
            f"Of the types of transformers {release}.x these are left out. `not built here` is what transformers says",
            "when a tiny one is made of the type's defaults; whether such a model can think is not known.",
            "",
            "| model type | reason |",
            "|---|---|",
        ]
        others += [f"| `{name}` | {shortened(reason)} |" for name, reason in sorted(self.reasons.items())]
        table = "\n".join([*head, *body, *others, ""])
        PAGE.write_text(f"{self.before}{BEGIN}\n{table}\n{END}{self.behind}", encoding="utf-8")
