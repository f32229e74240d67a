"""Save a run as an ordinary model, whether it was trained with adapters or sharded over several GPUs."""

import copy

import torch


def ordinary_model(model_class, model, weights: dict[str, torch.Tensor]):
    """Return a model of model_class with these weights (shared) and with the configurations of `model`.

    weights may have entries that the class does not.
    """
    with torch.device("meta"):
        ordinary = model_class(copy.deepcopy(model.config))
    ordinary.load_state_dict({name: weights[name] for name in ordinary.state_dict()}, assign=True)
    ordinary.tie_weights()
    ordinary.generation_config = copy.deepcopy(model.generation_config)
    return ordinary
