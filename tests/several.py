"""Run stages one after the other in float64, alone or under torchrun, where rounding hides nothing.

    python tests/several.py COMMANDS.json      a list of [stage, flag, value, ...]

All run in one start of Python, as a start is what takes long; the processes join only once.
"""

import importlib
import json
import pathlib
import sys
import types

import torch
import torch.distributed as dist
from transformers.models.llama import modeling_llama

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import harness  # noqa: E402
import ppo  # noqa: E402

torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
for module in (common, ppo, modeling_llama):  # other libraries must go on to know what float32 is
    module.torch = types.ModuleType("torch")
    vars(module.torch).update(vars(torch), float32=torch.float64, float=torch.float64)


def join_once(cfg, device):
    if not dist.is_initialized():
        join(cfg, device)


def part_later():
    pass


join, harness.join_processes = harness.join_processes, join_once
part, dist.destroy_process_group = dist.destroy_process_group, part_later
for stage, *flags in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    sys.argv = [f"{stage}.py", *flags]
    module = importlib.import_module(stage)
    harness.run_stage(module.main, module.Config, "")
if dist.is_initialized():
    assert harness.greatest(harness.RANK) == dist.get_world_size() - 1
    part()
