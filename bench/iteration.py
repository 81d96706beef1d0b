"""Time PPO iterations of ppo.py on a random-weight model of any shape, phase by phase.

    python bench/iteration.py --shape M                          Qwen2.5-0.5B's shape, for one GPU
    python bench/iteration.py -- --microbatch-size 32 --dtype bf16     what follows -- is for ppo.py

Random weights take as long as trained ones; with the small learning rate used here nearly all
responses run to the full length. The times are those of metrics.jsonl; only checkpoints are not
written. The first iterations warm up and are not counted. The floor is what the matrix products
alone would take, at the rate of a large one, which is measured here.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import tokenizers
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import harness  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Shape:
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
    microbatch_size: int | None = 16  # None: the dry run chooses it
    ppo_epochs: int = 4


SHAPES = {  # T is L on summaries
    "cpu": Shape(),
    "S": Shape("gpt2", 768, 12, 12, 12, 3072, 50257, True, 512, 64, 64, 512, None),
    "M": Shape("qwen2", 896, 24, 14, 2, 4864, 151936, True, 256, 128, 128, 256, None),
    "L": Shape("llama", 2048, 16, 32, 8, 8192, 128256, True, 128, 256, 256, 128, None),
    "T": Shape("llama", 2048, 16, 32, 8, 8192, 128256, True, 512, 512, 53, 512, None),
}


# === The model and the prompts, as folders and files that ppo.py reads ============================
def model_config(shape):
    """Returns the transformers config of a shape, with pad 1, EOS 2, BOS 3."""
    # Qwen2 is a Llama with biases; under its own name this tokenizer would be read as Qwen2's.
    kind = transformers.GPT2Config if shape.family == "gpt2" else transformers.LlamaConfig
    config = kind(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, max_position_embeddings=1024, pad_token_id=1,
        eos_token_id=2, bos_token_id=3, tie_word_embeddings=shape.tied,
    )
    if shape.family == "gpt2":
        config.n_inner = shape.intermediate
    else:
        config.attention_bias = shape.family == "qwen2"
        config.intermediate_size = shape.intermediate
        config.num_key_value_heads = shape.kv_heads
        config.head_dim = shape.hidden // shape.heads
    return config


def write_inputs(shape, folder):
    """Writes policy/, reward_model/ and prompts.jsonl of a shape, random from seed 0."""
    special = {f"{name}_token": f"<{name}>" for name in ("unk", "pad", "eos", "bos")}
    names = [*special.values(), *(f"t{id}" for id in range(4, shape.vocabulary))]
    vocabulary = {name: id for id, name in enumerate(names)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = model_config(shape)
    policy = transformers.AutoModelForCausalLM.from_config(config)
    config.num_labels, config.reward_mean, config.reward_std = 1, 0.0, 1.0
    reward_model = transformers.AutoModelForSequenceClassification.from_config(config)
    for name, model in (("policy", policy), ("reward_model", reward_model)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts = torch.randint(4, shape.vocabulary, (shape.batch_size, shape.prompt_length)).tolist()
    lines = [json.dumps({"prompt": " ".join(names[id] for id in ids)}) for ids in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines))


PHASES = ("rollout", "score", "update")
PROGRAM = f"""
import sys
sys.argv[0] = "ppo.py"
sys.path.insert(0, {str(ROOT)!r})
import harness, ppo

def skip(run, *kept):
    run.stopping = 0

harness.Run.save_if_due = harness.Run.finish = skip
harness.run_stage(ppo.main, ppo.Config, "")
"""


def run_ppo(shape, folder, iterations, flags):
    """Returns (rows of metrics.jsonl, flags in force) of a run of ppo.py without checkpoints."""
    given = {
        "policy": folder / "policy", "reward": folder / "reward_model",
        "prompts": folder / "prompts.jsonl", "eval-prompts": folder / "prompts.jsonl",
        "output": folder / "run", "iterations": iterations, "eval-every": iterations,
        "batch-size": shape.batch_size, "minibatch-size": shape.minibatch_size,
        "max-prompt-length": shape.prompt_length,
        "response-length": shape.response_length, "ppo-epochs": shape.ppo_epochs,
        "lr": 1e-5, "critic-lr": 1e-5, "missing-eos-penalty": 0,
    }
    if shape.microbatch_size is not None:
        given["microbatch-size"] = shape.microbatch_size
    command = [sys.executable, "-c", PROGRAM, "--overwrite"]
    for name, value in given.items():
        command += [f"--{name}", str(value)]
    run = subprocess.run(command + flags, capture_output=True, text=True)  # a later flag counts
    if run.returncode:
        sys.exit(run.stderr)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "split" not in row]
    for row in rows:
        row["seconds_total"] = sum(row[f"seconds_{phase}"] for phase in PHASES)
    return rows, json.loads((folder / "run" / "args.json").read_text())


# === The floor ====================================================================================
def matrix_flops(shape, shared_critic=False):
    """Returns the FLOPs of an iteration's matrix products by phase, with causal attention."""
    num_mlp = 2 if shape.family == "gpt2" else 3
    widths = 2 * shape.hidden + num_mlp * shape.intermediate  # q and o; of the MLP
    widths += 2 * shape.hidden * shape.kv_heads // shape.heads  # k and v
    length = shape.prompt_length + shape.response_length
    attention = 2 * length**2  # QK and AV, half of each masked away
    layer = shape.hidden * (2 * widths * length + attention)
    trunk_pass = shape.batch_size * shape.layers * layer
    head = shape.response_length * 2 * shape.hidden * shape.vocabulary
    policy_pass = trunk_pass + shape.batch_size * head
    critic_pass = 0 if shared_critic else trunk_pass
    return {
        "rollout": policy_pass,
        "score": trunk_pass + 2 * policy_pass + critic_pass,  # reward; policy, reference; critic
        "update": shape.ppo_epochs * 3 * (policy_pass + critic_pass),  # backward is two forwards
    }


def matrix_rate(device, dtype):
    """Returns the FLOP/s of a large matrix product, the best of ten."""
    size = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for a GPU
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)


# === Results ======================================================================================
def spread(values):
    """Returns (median, lowest, highest)."""
    return statistics.median(values), min(values), max(values)


def summarize(shape, rows, args):
    """Returns seconds by phase, beside the floor, of a run with the flags `args` of args.json."""
    device = harness.pick_device(args["device"])
    shape = dataclasses.replace(shape, **{name: args[name] for name in vars(shape).keys() & args})
    is_bf16 = args["dtype"] == "bf16" or args["dtype"] == "auto" and device.type == "cuda"
    rate = matrix_rate(device, torch.bfloat16 if is_bf16 else torch.float32)
    flops = matrix_flops(shape, args["critic"] == "shared")
    flops["total"] = sum(flops.values())
    floor = {phase: number / rate for phase, number in flops.items()}
    seconds = {phase: spread([row[f"seconds_{phase}"] for row in rows]) for phase in floor}
    return {
        "shape": vars(shape), "repeats": len(rows), "seconds": seconds, "floor_seconds": floor,
        "floor_share": {phase: floor[phase] / seconds[phase][0] for phase in seconds},
        "matrix_tflops_per_second": rate / 1e12, "matrix_dtype": "bf16" if is_bf16 else "float32",
        "tokens_per_second": spread([row["tokens_per_second"] for row in rows]),
        "peak_memory_gb": rows[-1]["peak_memory_gb"],
    }


def save(result, device, args, argv):
    """Writes a result to --output, with the command, the device, the versions and the commit."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    threads = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    result = {"command": " ".join(["python", *sys.argv[:1], *argv])} | result | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


# === Command line =================================================================================
def make_parser(description):
    """Returns a parser with --shape, --repeats, --warm-up and --output."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", choices=SHAPES, default="cpu", help="model and batch")
    parser.add_argument("--repeats", type=int, default=5, help="iterations that count")
    parser.add_argument("--warm-up", type=int, default=2, help="iterations before them")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file for the result")
    return parser


def parse(parser, argv):
    """Returns (arguments, shape, the flags for ppo.py)."""
    end = argv.index("--") if "--" in argv else len(argv)
    args, flags = parser.parse_args(argv[:end]), argv[end + 1 :]
    if args.repeats < 1 or args.warm_up < 0:
        parser.error("--repeats must be at least 1, and --warm-up at least 0")
    if args.output and not args.output.parent.is_dir():
        parser.error(f"there is no folder {args.output.parent} for --output")
    return args, SHAPES[args.shape], flags


def main(argv):
    args, shape, flags = parse(make_parser(__doc__.splitlines()[0]), argv)
    with tempfile.TemporaryDirectory() as name:
        write_inputs(shape, pathlib.Path(name))
        rows, in_force = run_ppo(shape, pathlib.Path(name), args.warm_up + args.repeats, flags)
    result = summarize(shape, rows[args.warm_up :], in_force) | {"warm_up": args.warm_up}
    print(f"\n{'seconds':<10}{'median':>9}{'lowest':>9}{'highest':>9}{'floor':>9}{'share':>9}")
    for phase, numbers in result["seconds"].items():
        numbers = *numbers, result["floor_seconds"][phase], result["floor_share"][phase]
        print(f"{phase:<10}" + "".join(f"{number:>9.3f}" for number in numbers))
    speed, memory = result["tokens_per_second"][0], result["peak_memory_gb"]
    print(f"{speed:.0f} response tokens per second; peak memory {memory:.2f} GB")
    save(result | {"flags": flags}, harness.pick_device(in_force["device"]), args, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
