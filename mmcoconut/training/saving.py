"""What a run saves is an ordinary model, whatever it was trained inside of: adapters, or shards of several GPUs."""

import copy

import torch


def ordinary_model(model_class, model, weights: dict[str, torch.Tensor]):
    """A model of that class with these weights, which it shares, and with the configurations of `model`.

    weights may hold more than the class has.
    """
    with torch.device("meta"):
        ordinary = model_class(copy.deepcopy(model.config))
    ordinary.load_state_dict({name: weights[name] for name in ordinary.state_dict()}, assign=True)
    ordinary.tie_weights()
    ordinary.generation_config = copy.deepcopy(model.generation_config)
    return ordinary
