"""Refuse configurations that cannot train with several processes, or several GPUs per process."""

from mmcoconut.errors import UsageError
from mmcoconut.objectives.attach import Objectives


def check_sharding(plugin, *, adapted: bool) -> None:
    """Refuse sharding configurations that would hang, or save no model.

    Raises:
        ValueError: FSDP version 1; weights that are not gathered for saving; FSDP with LoRA.
    """
    if plugin.fsdp_version != 2:
        raise UsageError(f"fsdp_version is {plugin.fsdp_version}: set 2, or use DDP.")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise UsageError(
            f"fsdp_state_dict_type is {plugin.state_dict_type}, which saves no loadable model: set FULL_STATE_DICT."
        )
    if adapted:
        raise UsageError("`lora` is not merged from sharded weights: use DDP, or remove `lora`.")


def check_sharded_objectives(objectives: Objectives | None, *, compares_gradients: bool) -> None:
    """Refuse objectives that do not work under FSDP.

    Raises:
        ValueError: objectives with weights of their own or further forward passes of the model, in which shards are
            gathered and processes must agree; or compared gradients, of which each process has only a part.
    """
    for name, objective in (objectives or {}).items():
        if objective.forwards:
            raise UsageError(
                f"objectives.{name} runs further forward passes where its batch needs them, and processes that shard "
                "the model must run equally many: use DDP, or remove it."
            )
    weighty = [name for name, objective in (objectives or {}).items() if [*objective.parameters()]]
    if weighty:
        raise UsageError(
            f"objectives.{weighty[0]} has weights of its own, and sharded checkpoints would lack them: use "
            "DDP, or remove it."
        )
    if objectives and compares_gradients:
        raise UsageError("`log_gradient_cosine` needs whole gradients, which FSDP shards: use DDP, or remove it.")


def check_not_replicated(objectives: Objectives | None, num_gpus: int) -> None:
    """Refuse objectives if one process copies the model to several GPUs (DataParallel): all copies would share the
    state that the hooks keep per call.

    Raises:
        ValueError: this process uses more than one GPU.
    """
    if objectives is not None and num_gpus > 1:
        raise UsageError(
            f"objectives {', '.join(objectives)} need one process for each of the {num_gpus} GPUs: start the run with "
            "`accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
