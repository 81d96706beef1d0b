"""Time PPO iterations of ppo.py on a random-weight model of any shape, phase by phase.

    python bench/iteration.py --shape cpu                  the 5 M-parameter shape, for laptops
    python bench/iteration.py --shape M                    Qwen2.5-0.5B's shape, for one GPU
    python bench/iteration.py --shape cpu --batch-size 32 --hidden 512 -- --dtype bf16 --compile

What stands behind `--` goes to ppo.py as it is. Weights do not change the speed, so none are
needed; what is timed is the real script, from its own metrics.jsonl, and only the writing of
checkpoints is left out. The first iterations warm up and are not counted.

The floor is the time below which no implementation can go on this machine in this arithmetic: the
FLOPs of all matrix products over the matrix rate, plus the bytes that decoding has to read, the
weights once a step and the key-value cache, over the copy bandwidth. Both are measured here.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time

import tokenizers
import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent
QWEN, LLAMA_1B = "Qwen2.5-0.5B", "Llama-3.2-1B"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and a batch."""

    family: str = "llama"
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    intermediate: int = 688
    vocabulary: int = 4096
    tied: bool = False
    batch_size: int = 64
    prompt_length: int = 32
    response_length: int = 64
    minibatch_size: int = 64
    microbatch_size: int = 16
    ppo_epochs: int = 4


GPT2_124M = Shape("gpt2", 768, 12, 12, 12, 3072, 50257, True, 512, 64, 64, 512, 32)
QWEN_500M = Shape("qwen2", 896, 24, 14, 2, 4864, 151936, True, 256, 128, 128, 256, 16)
LLAMA_1B = Shape("llama", 2048, 16, 32, 8, 8192, 128256, True, 128, 256, 256, 128, 8)
TLDR_1B = dataclasses.replace(
    LLAMA_1B, batch_size=512, minibatch_size=512, prompt_length=512, response_length=53
)
SHAPES = {"cpu": Shape(), "S": GPT2_124M, "M": QWEN_500M, "L": LLAMA_1B, "T": TLDR_1B}


# === The model and the prompts, as folders and files that ppo.py reads ============================
def model_config(shape):
    """The transformers config of a shape, with pad 1, EOS 2, BOS 3."""
    length = shape.prompt_length + shape.response_length
    common = {
        "vocab_size": shape.vocabulary, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 3,
        "tie_word_embeddings": shape.tied, "architectures": None,
    }
    if shape.family == "gpt2":
        return transformers.GPT2Config(
            n_embd=shape.hidden, n_layer=shape.layers, n_head=shape.heads,
            n_inner=shape.intermediate, n_positions=length, **common,
        )
    config_class = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
    return config_class[shape.family](
        hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=length, **common,
    )


def write_inputs(shape, folder):
    """policy/, reward_model/, prompts.jsonl and eval.jsonl of a shape, random and from seed 0."""
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    names = [*special.values(), *(f"t{id}" for id in range(4, shape.vocabulary))]
    vocabulary = {name: id for id, name in enumerate(names)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    torch.manual_seed(0)
    policy = transformers.AutoModelForCausalLM.from_config(model_config(shape))
    config = model_config(shape)
    config.num_labels, config.reward_mean, config.reward_std = 1, 0.0, 1.0
    reward_model = transformers.AutoModelForSequenceClassification.from_config(config)
    for name, model in (("policy", policy), ("reward_model", reward_model)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    size = (shape.batch_size + 2, shape.prompt_length)
    prompts = torch.randint(4, shape.vocabulary, size).tolist()
    lines = [json.dumps({"prompt": " ".join(f"t{id}" for id in ids)}) + "\n" for ids in prompts]
    (folder / "prompts.jsonl").write_text("".join(lines[2:]))
    (folder / "eval.jsonl").write_text("".join(lines[:2]))


def run_ppo(shape, folder, iterations, flags=(), root=HERE.parent):
    """The metrics rows of ppo.py over some iterations, without checkpoints.

    Args:
        root: the folder of the ppo.py to time; another checkout is another version.
    """
    command = [
        "--policy", folder / "policy", "--reward", folder / "reward_model",
        "--prompts", folder / "prompts.jsonl", "--eval-prompts", folder / "eval.jsonl",
        "--output", folder / "run", "--overwrite", "--iterations", iterations,
        "--eval-every", iterations, "--batch-size", shape.batch_size,
        "--minibatch-size", shape.minibatch_size, "--microbatch-size", shape.microbatch_size,
        "--max-prompt-length", shape.prompt_length, "--response-length", shape.response_length,
        "--ppo-epochs", shape.ppo_epochs, *flags,
    ]
    program = (
        f"import sys; sys.path.insert(0, {str(root)!r}); sys.argv = ['ppo.py', *sys.argv[1:]]\n"
        "import common, ppo\n"
        "ppo.save_checkpoint = lambda *args, **kwargs: None\n"
        "with common.command_line(ppo.MEMORY_FLAGS):\n"
        "    ppo.main(common.parse_args(ppo.Config, ''))\n"
        "import resource; print('MAXRSS', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, *map(str, command)], capture_output=True, text=True
    )
    if run.returncode:
        sys.exit(run.stderr)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    rows = [row for row in rows if "split" not in row]
    if not torch.cuda.is_available():
        for row in rows:
            row["peak_memory_gb"] = int(re.search(r"MAXRSS (\d+)", run.stdout)[1]) / 1e6
    return rows


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        shape = SHAPES["cpu"]
        write_inputs(shape, folder)
        root = sys.argv[1]
        rows = run_ppo(shape, folder, 4, sys.argv[2:], root)
        for row in rows:
            print({k: round(row[k], 3) for k in row if "seconds" in k or "peak" in k}, round(sum(row[k] for k in row if "seconds" in k),2))
