"""Write a run's results.json, and print its results."""

from pathlib import Path

from mmcoconut.objectives.attach import attached_to, own_weights
from mmcoconut.provenance import peak_memory_mb, provenance
from mmcoconut.records import RESULTS_FILE, write_json
from mmcoconut.statistics import percent
from mmcoconut.tables import SPEED, stage_rows, stage_table


# Keys of an evaluation; other keys are figures of the metric and of the objective.
COMMON_FIGURES = ("accuracy", "generated_tokens", "loss", "n", "num_latents", "stage")


def count_parameters(model) -> dict[str, int]:
    """Return the number of parameters of a model, of trained parameters, and of its objectives' own parameters."""
    weights, attached = own_weights(model), attached_to(model)
    counts = {"parameters": sum(weight.numel() for weight in weights)}
    counts["trainable_parameters"] = sum(weight.numel() for weight in weights if weight.requires_grad)
    if attached is not None:
        counts["objective_parameters"] = sum(weight.numel() for weight in attached.parameters())
    return counts


def save_results(trainer, *, arguments, test: dict, train_seconds: float, skipped: list[str], cut: dict) -> dict:
    """Write results.json to the output folder: accuracy by stage, and the settings that produced it."""
    _, data_args, curriculum_args, run_args = arguments
    results = {
        "mode": curriculum_args.mode,
        "split": data_args.eval_split,
        "stages": stage_rows(trainer.state.log_history),
        "test": test,
        "seed": run_args.seed,
        "metric": trainer.metric,
        "dtype": str(trainer.model.dtype).removeprefix("torch."),
        "train_seconds": round(train_seconds, 1),
        "train_steps": trainer.state.global_step,
        "seconds_per_update": trainer.seconds_per_update(train_seconds),
        "peak_memory_mb": round(peak_memory_mb(trainer.args.device), 1),
        "unreadable_images": skipped,
        "long_rows": cut,
        **count_parameters(trainer.model),
        "processes": trainer.args.world_size,
        **provenance(trainer.args.device),
    }
    if trainer.is_world_process_zero():
        write_json(Path(trainer.args.output_dir, RESULTS_FILE), results)
    return results


def report(results: dict) -> None:
    print(stage_table(results["stages"]))
    if results["test"]:
        test = {name.removeprefix("test_"): value for name, value in results["test"].items()}
        print(f"test split, last stage: {percent(test['accuracy'])} of {test['n']} by {results['metric']}")
        others = [name for name in test if name not in (*COMMON_FIGURES, *SPEED, results["metric"])]
        print("\n".join(f"  {name}: {test[name]:.4g}" for name in others if isinstance(test[name], (int, float))))
    for message in results["unreadable_images"]:
        print(f"left out: {message}")
