"""Run stages one after the other in float64, alone or under torchrun, where rounding hides nothing.

    python tests/several.py COMMANDS.json      a list of [stage, flag, value, ...]

All in one start of Python, as a start is what takes long. `part` and `meet` are left out between.
"""

import importlib
import json
import pathlib
import sys
import types

import torch
from transformers.models.llama import modeling_llama

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import ppo  # noqa: E402
from plumbing import cli, processes  # noqa: E402

torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
for module in (common, ppo, modeling_llama):  # where it is named; other libraries must go on to know what it is
    module.torch = types.ModuleType("torch")
    vars(module.torch).update(vars(torch), float32=torch.float64, float=torch.float64)

meet, part = processes.meet, processes.part
processes.part = lambda: None
for number, (stage, *flags) in enumerate(json.loads(pathlib.Path(sys.argv[1]).read_text())):
    sys.argv = [f"{stage}.py", *flags]
    module = importlib.import_module(stage)
    with cli.command_line():
        module.main(cli.parse_args(module.Config, ""))
    processes.meet = lambda cfg, device: None
assert processes.agree(processes.RANK) == processes.COUNT - 1  # the greatest
part()
