"""train_hf.py under FSDP2 as accelerate and the Trainer set it up on GPUs, but on CPUs; test_processes.py starts it.

accelerate shards on accelerators only and silently takes DDP on CPUs; here it is told that it may.
"""

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


if __name__ == "__main__":
    AcceleratorState.__init__ = set_up_with_sharding
    train_hf.main(sys.argv[1:])
