"""train_hf.py several times in the same processes: `several_runs.py '[["recipe.yaml", "--key", "value"], …]'`.

Starting a process takes longer than a tiny run. With FSDP's settings in the environment the runs are sharded as
accelerate and the Trainer do it on GPUs; accelerate shards on accelerators only and silently takes DDP on CPUs, so
here it is told that it may.
"""

import json
import sys

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

import train_hf


set_up = AcceleratorState.__init__


def set_up_with_sharding(self, *args, fsdp_plugin=None, **kwargs):
    set_up(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def run_all(runs: str) -> None:
    """train_hf.py with each of the lists of words in JSON; the processes stay together until the last has ended."""
    leave, PartialState.destroy_process_group = PartialState.destroy_process_group, lambda *args: None
    for words in json.loads(runs):
        train_hf.main(words)
    leave(PartialState())


if __name__ == "__main__":
    AcceleratorState.__init__ = set_up_with_sharding
    run_all(sys.argv[1])
