"""Time PPO iterations of ppo.py on a random-weight model of any shape, phase by phase.

    python bench/iteration.py --shape cpu                  the 5 M-parameter shape, for laptops
    python bench/iteration.py --shape M                    Qwen2.5-0.5B's shape, for one GPU
    python bench/iteration.py --shape cpu --batch-size 32 --hidden 512 -- --dtype bf16 --compile

What stands behind `--` goes to ppo.py as it is. Random weights take as long as trained ones; all
prompts are of one length, and with the small learning rate used here nearly all responses run to
the full length. What is timed is the real script, from its own metrics.jsonl, and only the writing
of checkpoints is left out. The first iterations warm up and are not counted.

The floor is what this algorithm's matrix products alone would take at the rate of a large one, and
in the rollout besides, one after the other, what decoding reads, the matrices once a step and the
key-value cache, at the rate of a large copy. Both rates are measured here.
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
sys.path.insert(0, str(HERE.parent))
from plumbing import cli  # noqa: E402


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
    # Qwen2 is a Llama with biases; under its own name this tokenizer would be read as Qwen2's.
    return transformers.LlamaConfig(
        attention_bias=shape.family == "qwen2", hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, max_position_embeddings=length, **common,
    )


def write_inputs(shape, folder):
    """policy/, reward_model/, prompts.jsonl and eval.jsonl of a shape, random and from seed 0."""
    special = {f"{name}_token": f"<{name}>" for name in ("unk", "pad", "eos", "bos")}
    names = [*special.values(), *(f"t{id}" for id in range(4, shape.vocabulary))]
    vocabulary = {name: id for id, name in enumerate(names)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    transformers.logging.disable_progress_bar()
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


def run_ppo(shape, folder, iterations, flags=()):
    """The metrics rows of ppo.py over some iterations, without checkpoints."""
    command = [
        "--policy", folder / "policy", "--reward", folder / "reward_model",
        "--prompts", folder / "prompts.jsonl", "--eval-prompts", folder / "eval.jsonl",
        "--output", folder / "run", "--overwrite", "--iterations", iterations,
        "--eval-every", iterations, "--batch-size", shape.batch_size,
        "--minibatch-size", shape.minibatch_size, "--microbatch-size", shape.microbatch_size,
        "--max-prompt-length", shape.prompt_length, "--response-length", shape.response_length,
        "--ppo-epochs", shape.ppo_epochs, "--lr", 1e-5, "--critic-lr", 1e-5,
        "--missing-eos-penalty", 0, *flags,
    ]
    program = (
        "import sys\n"
        f"sys.path.insert(0, {str(HERE.parent)!r})\n"
        "sys.argv[0] = 'ppo.py'\n"
        "import ppo\n"
        "from plumbing import cli, folders\n"
        "folders.write_checkpoint = folders.finish = lambda *args, **kwargs: None\n"
        "with cli.command_line():\n"
        "    ppo.main(cli.parse_args(ppo.Config, ''))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, *map(str, command)], capture_output=True, text=True
    )
    if run.returncode:
        print(run.stderr, file=sys.stderr)
        sys.exit(run.returncode)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    return [row for row in rows if "split" not in row]


# === The floor ====================================================================================
def matrix_flops(shape, shared_critic=False):
    """FLOPs of an iteration's matrix products by phase, causal attention included; trunk's size."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(model_config(shape))
    trunk = sum(
        module.weight.numel() for module in model.base_model.modules()
        if getattr(module, "weight", None) is not None and module.weight.ndim == 2
        and not isinstance(module, torch.nn.Embedding)
    )
    length, num_tokens = shape.prompt_length + shape.response_length, shape.response_length
    attention = shape.layers * 2 * length**2 * shape.hidden  # QK and AV, half of each masked away
    trunk_pass = shape.batch_size * (2 * trunk * length + attention)
    head_pass = shape.batch_size * num_tokens * 2 * shape.hidden * shape.vocabulary
    policy_pass = trunk_pass + head_pass
    critic_pass = 0 if shared_critic else trunk_pass
    return {
        "rollout": policy_pass,
        "score": trunk_pass + 2 * policy_pass + critic_pass,  # reward; policy, reference; critic
        "update": shape.ppo_epochs * 3 * (policy_pass + critic_pass),  # backward is two forwards
    }, trunk


def decoding_bytes(shape, trunk, bytes_per_number):
    """Bytes that sampling must read: each step all matrices and the keys and values so far."""
    per_token = 2 * shape.layers * shape.kv_heads * shape.hidden // shape.heads * bytes_per_number
    matrices = (trunk + shape.hidden * shape.vocabulary) * bytes_per_number
    mean_length = shape.prompt_length + shape.response_length / 2
    return shape.response_length * (matrices + shape.batch_size * mean_length * per_token)


def best_seconds(device, function, repeats=10):
    """The shortest of some runs."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine_rates(device, dtype):
    """(FLOP/s of a large matrix product, bytes/s of a large copy, read and written), the best."""
    is_cuda = device.type == "cuda"
    size = 8192 if is_cuda else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    flops = 2 * size**3 / best_seconds(device, lambda: a @ b)
    source = torch.ones(2**30 if is_cuda else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return flops, 2 * source.numel() / best_seconds(device, lambda: target.copy_(source))


# === Results ======================================================================================
PHASES = ("rollout", "score", "update")


def machine(device):
    """What a result has to say besides its numbers."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or f"{processor()}, {torch.get_num_threads()} threads", "commit": commit,
        "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def processor():
    """The processor's name, where Linux tells it."""
    try:
        names = re.findall(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def spread(values):
    """(median, lowest, highest)."""
    return statistics.median(values), min(values), max(values)


def total_seconds(row):
    return sum(row[f"seconds_{phase}"] for phase in PHASES)


def seconds_of(rows):
    """(median, lowest, highest) of each phase and of them together."""
    seconds = {phase: spread([row[f"seconds_{phase}"] for row in rows]) for phase in PHASES}
    return seconds | {"total": spread([total_seconds(row) for row in rows])}


def summarize(shape, rows, warm_up, args):
    """Seconds by phase beside the floor, tokens per second and memory, of the rows that count.

    `args` are the flags in force, from args.json.
    """
    rows = rows[warm_up:]
    device = cli.pick_device(args["device"])  # ppo.py's own
    given = {field.name: args.get(field.name) for field in dataclasses.fields(Shape)}
    given = {name: value for name, value in given.items() if value is not None}
    shape = dataclasses.replace(shape, **given)
    is_bf16 = args["dtype"] == "bf16" or args["dtype"] == "auto" and device.type == "cuda"
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    flops, trunk = matrix_flops(shape, args["critic"] == "shared")
    flops_per_second, bytes_per_second = machine_rates(device, dtype)
    floor = {phase: number / flops_per_second for phase, number in flops.items()}
    floor["rollout"] += decoding_bytes(shape, trunk, dtype.itemsize) / bytes_per_second
    floor["total"] = sum(floor.values())
    seconds = seconds_of(rows)
    return {
        "shape": dataclasses.asdict(shape), "repeats": len(rows), "warm_up": warm_up,
        "seconds": seconds, "floor_seconds": floor,
        "floor_share": {phase: floor[phase] / seconds[phase][0] for phase in seconds},
        "matrix_tflops_per_second": flops_per_second / 1e12, "matrix_dtype": str(dtype),
        "copy_gb_per_second": bytes_per_second / 1e9,
        "tokens_per_second": spread([row["tokens_per_second"] for row in rows]),
        "response_length": statistics.mean(row["response_length"] for row in rows),
        "peak_memory_gb": rows[-1]["peak_memory_gb"],
    } | machine(device)


def show(result):
    """A result as a table."""
    heads = ("median", "lowest", "highest", "floor", "share")
    print(f"\n{'seconds':<10}" + "".join(f"{head:>9}" for head in heads))
    for phase, (median, low, high) in result["seconds"].items():
        floor, share = result["floor_seconds"][phase], result["floor_share"][phase]
        print(f"{phase:<10}{median:>9.3f}{low:>9.3f}{high:>9.3f}{floor:>9.3f}{share:>9.2f}")
    print(
        f"{result['tokens_per_second'][0]:.0f} response tokens per second; peak memory "
        f"{result['peak_memory_gb']:.2f} GB; {result['matrix_tflops_per_second']:.3f} TFLOP/s in "
        f"{result['matrix_dtype'].removeprefix('torch.')}, copies at "
        f"{result['copy_gb_per_second']:.0f} GB/s; {result['device']}"
    )


# === Command line =================================================================================
def parser(description):
    """--shape, the fields of Shape as flags, --output; what follows `--` is for ppo.py."""
    parser = argparse.ArgumentParser(
        description=description, epilog="what follows -- goes to ppo.py, such as: -- --dtype bf16"
    )
    parser.add_argument("--shape", choices=SHAPES, default="cpu", help="where to start from")
    for field in dataclasses.fields(Shape):
        if field.type is not bool:
            families = ("llama", "gpt2", "qwen2") if field.name == "family" else None
            flag = f"--{field.name.replace('_', '-')}"
            parser.add_argument(flag, type=field.type, choices=families)
    parser.add_argument("--repeats", type=int, default=5, help="iterations that count")
    parser.add_argument("--warm-up", type=int, default=2, help="iterations before them")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file for the result")
    return parser


def parse(parser, argv):
    """(arguments, shape, the flags for ppo.py)."""
    end = argv.index("--") if "--" in argv else len(argv)
    args, flags = parser.parse_args(argv[:end]), argv[end + 1 :]
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(Shape)}
    given = {name: value for name, value in given.items() if value is not None}
    if "batch_size" in given:  # one optimizer step an epoch, unless told otherwise
        given.setdefault("minibatch_size", given["batch_size"])
    shape = dataclasses.replace(SHAPES[args.shape], **given)
    counts = {**given, "repeats": args.repeats, "pairs": getattr(args, "pairs", 1)}
    for name, value in counts.items():
        if name != "family" and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if args.warm_up < 0 or shape.hidden % shape.heads or shape.heads % shape.kv_heads:
        parser.error("--warm-up must not be negative, and heads must divide widths, KV heads heads")
    if args.output and not args.output.parent.is_dir():
        parser.error(f"there is no folder {args.output.parent} for --output")
    taken = {"--output", "--iterations", "--policy", "--reward", "--prompts", "--eval-prompts"}
    if taken & {flag.split("=")[0].replace("_", "-") for flag in flags}:
        parser.error(f"behind -- none of {', '.join(sorted(taken))} can stand: they are set here")
    return args, shape, flags


def device_of(flags):
    """The torch.device that --device among flags of ppo.py means."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", default="auto")
    try:
        return cli.pick_device(parser.parse_known_args(flags)[0].device)
    except cli.UserError as error:
        parser.error(str(error))


def save(result, path, argv):
    """Write a result with the command that made it."""
    script = pathlib.Path(sys.argv[0]).name
    result = {"command": " ".join(["python", f"bench/{script}", *argv])} | result
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")


def main(argv):
    args, shape, flags = parse(parser(__doc__.splitlines()[0]), argv)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_inputs(shape, folder)
        rows = run_ppo(shape, folder, args.warm_up + args.repeats, flags)
        in_force = json.loads((folder / "run" / "args.json").read_text())
    result = summarize(shape, rows, args.warm_up, in_force)
    show(result)
    save(result | {"flags": flags}, args.output, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
