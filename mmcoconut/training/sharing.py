"""What cannot be trained where several processes, or several GPUs of one, share a model."""

from mmcoconut.errors import UsageError
from mmcoconut.objectives.attach import Objectives


def check_sharding(plugin, *, adapted: bool) -> None:
    """Refuse the ways of sharding that would hang, or leave no model behind.

    Raises:
        ValueError: FSDP of version 1; weights that are not gathered for saving; FSDP with LoRA.
    """
    if plugin.fsdp_version != 2:
        raise UsageError(f"fsdp_version is {plugin.fsdp_version}: set 2, or use DDP.")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise UsageError(
            f"fsdp_state_dict_type is {plugin.state_dict_type}, which leaves no model to load: set FULL_STATE_DICT."
        )
    if adapted:
        raise UsageError("`lora` is not merged from sharded weights: use DDP, or remove `lora`.")


def check_sharded_objectives(objectives: Objectives | None, *, compares_gradients: bool) -> None:
    """Refuse what objectives cannot do under FSDP.

    Raises:
        ValueError: objectives with weights of their own or further forwards of the model, in which shards are gathered
            and processes must agree; or gradients that are compared, of which each process would have a part.
    """
    for name, objective in (objectives or {}).items():
        if objective.forwards:
            raise UsageError(
                f"objectives.{name} takes further forwards of the model where its batch needs them, and processes "
                "that share its weights must take equally many: use DDP, or remove it."
            )
    weighty = [name for name, objective in (objectives or {}).items() if [*objective.parameters()]]
    if weighty:
        raise UsageError(
            f"objectives.{weighty[0]} has weights of its own, and checkpoints of sharded ones would lack them: use "
            "DDP, or remove it."
        )
    if objectives and compares_gradients:
        raise UsageError("`log_gradient_cosine` needs whole gradients, which FSDP shards: use DDP, or remove it.")


def check_not_replicated(objectives: Objectives | None, num_gpus: int) -> None:
    """Refuse objectives of a model that one process copies to several GPUs (DataParallel), as all copies would share
    what the hooks know of a call.

    Raises:
        ValueError: more than one GPU of this process.
    """
    if objectives is not None and num_gpus > 1:
        raise UsageError(
            f"objectives {', '.join(objectives)} need a process for each of the {num_gpus} GPUs: start the run by "
            "`accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
