"""The latent audit as a picture, as one HTML page that opens offline, and as a section for a model card."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from PIL import Image

from mmcoconut.audit.interventions import Outcome
from mmcoconut.audit.thought_pictures import BLUE, GREY, ORANGE, new_figure, rendered
from mmcoconut.statistics import Estimate, percent, points


TEMPLATE = Path(__file__).with_name("report.html")
# Interventions in a model card, in this order.
IN_THE_CARD = ("shuffled", "only_thoughts", "no_image", "own_embedding", "other_image", "other_question")
IN_THE_CARD += ("mean", "zero", "noise")


def interventions_figure(outcomes: Mapping[str, Outcome], accuracy: Mapping, *, num_rows: int) -> Image.Image:
    """Plot accuracy and interval under every intervention, and the untouched run's as a band; 800 pixels wide."""
    figure = new_figure(1.2 + 0.28 * len(outcomes))
    axes = figure.add_subplot()
    places = range(len(outcomes))
    means = [100 * outcome.accuracy.mean for outcome in outcomes.values()]
    below = [100 * (outcome.accuracy.mean - outcome.accuracy.low) for outcome in outcomes.values()]
    above = [100 * (outcome.accuracy.high - outcome.accuracy.mean) for outcome in outcomes.values()]
    colours = [ORANGE if outcome.difference.high < 0 else BLUE for outcome in outcomes.values()]
    axes.barh(places, means, color=colours, height=0.7, xerr=[below, above], ecolor="black", capsize=2)
    axes.axvspan(100 * accuracy["low"], 100 * accuracy["high"], color=GREY, alpha=0.3)
    axes.axvline(100 * accuracy["mean"], color=GREY, label="untouched")
    axes.set_yticks(places, [outcome.description for outcome in outcomes.values()], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 102)
    axes.set_xlabel(f"accuracy, % (95 % intervals, {num_rows} rows)\norange: lower than untouched")
    axes.legend(fontsize=8)
    return rendered(figure)


def data_uri(picture: Image.Image) -> str:
    """Return a picture as a data URI, to embed it in a page."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def report_of(record: Mapping, pictures: Mapping[str, Image.Image], shown: Sequence) -> str:
    """Return the HTML page: verdict, interventions, geometry, probe, and the decoded thoughts of single rows."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "percent": percent,
        "quoted": lambda token: json.dumps(token, ensure_ascii=False),
        "estimate": lambda values: str(Estimate.of(values)),
        "points": lambda values: points(Estimate.of(values)),
    }
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    images = {name: data_uri(picture) for name, picture in pictures.items()}
    return template.render(record=record, pictures=images, shown=shown)


def probe_line(probe: Mapping) -> str | None:
    """Return in one line which thought predicts each target best, and what was not probed; None if nothing was."""
    found, refused = [], []
    for k, name in enumerate(probe["targets"]):
        if probe["reasons"][k] is None:
            column, majority = [row[k] for row in probe["accuracy"]], percent(probe["majority"][k])
            best = max(column)
            found.append(f"{name}: {percent(best)} in thought {column.index(best) + 1} (majority {majority})")
        else:
            refused.append(f"{name} ({probe['reasons'][k]})")
    if not found:
        return None
    return "; ".join(found) + (f". Not probed: {', '.join(refused)}" if refused else "")


def said_of(record: Mapping) -> list[dict]:
    """Return the findings other than the verdict, in order; findings whose run was refused are left out."""
    necessity, positions = record.get("necessity"), record.get("positions")
    found = [necessity, necessity["no_image"]] if necessity else []
    return [finding for finding in [*found, *([positions] if positions else [])] if finding["accuracy"]]


def card_of(record: Mapping) -> str:
    """Return a model-card section: the verdict, and the accuracy under each kind of intervention."""
    verdict, accuracy = record.get("verdict"), Estimate.of(record["accuracy"])
    lines = ["## Do the thoughts matter?", ""]
    if verdict:
        lines += [f"**{verdict['sentence']}**", ""]
    found = [f"- {said}" for said in (*(v["sentence"] for v in said_of(record)), *(verdict or {"notes": []})["notes"])]
    lines += found + [""] * bool(found)
    lines += ["| thoughts | accuracy | difference | answers changed |", "|---|---|---|---|"]
    lines.append(f"| untouched: {record['num_latents']} | {accuracy} | | |")
    for name in IN_THE_CARD:
        if name in record["interventions"]:
            outcome = record["interventions"][name]
            difference = points(Estimate.of(outcome["difference"]))
            changed = percent(outcome["changed"]["mean"])
            share = Estimate.of(outcome["accuracy"])
            lines.append(f"| {outcome['description']} | {share} | {difference} | {changed} |")
    lines += [
        "",
        f"`{record['metric']}` on {record['n']} rows of `{record['dataset']}` ({record['split']}), in brackets",
    ]
    lines[-1] += " 95 % bootstrap intervals, paired for the differences."
    held = probe_line(record["probe"]) if "probe" in record else None
    if held is not None:
        lines += ["", f"A linear probe reads, on held-out rows, at best: {held}."]
    return "\n".join(lines) + "\n"
