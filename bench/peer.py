"""Time ppo.py beside TRL's PPO trainer, on the same sizes, in turn, pair by pair.

    pip install trl==1.12.0        the last release with PPO; needed for this file only
    python bench/peer.py --shape cpu -- --dtype bf16 --attention eager --compile
    python bench/peer.py --shape S --pairs 3

TRL gets bf16 autocast, switched on through accelerate's environment variable, since its own flag
does nothing on transformers 5 (accelerate applies it to the update; --peer-dtype float32 leaves it
off); the whole batch in one rollout, unless --peer-rollout-size is given; the same number of
optimizer steps; and, if --peer-microbatch-sizes names several, the fastest of them, tried first.
On a CPU memory is that of the process, imports included.
"""

import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import iteration


# === The peer, in a process of its own ============================================================
def run_trl(shape, folder, num_updates, device, dtype, microbatch_size, rollout_size):
    """(seconds of each update but the first, which warms up; peak GB) of TRL's trainer."""
    environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    if dtype == "bf16":
        environment["ACCELERATE_MIXED_PRECISION"] = "bf16"
    if device.type == "cuda":  # it takes all GPUs that it sees
        seen = environment.get("CUDA_VISIBLE_DEVICES")
        index = seen.split(",")[device.index] if seen else str(device.index)
        environment["CUDA_VISIBLE_DEVICES"] = index
    job = vars(shape) | {"cuda": device.type == "cuda"} | {
        "num_updates": num_updates, "microbatch_size": microbatch_size, "rollout_size": rollout_size
    }
    command = [sys.executable, __file__, "--trl", str(folder), json.dumps(job)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"TRL failed:\n{run.stderr[-3000:]}")
    result = json.loads((folder / "trl.json").read_text())
    return result["seconds"], result["peak_memory_gb"]


def trl_process(folder, job):
    """Run TRL on the folders that `iteration.write_inputs` wrote; the result goes into trl.json."""
    import datasets
    import torch
    import transformers
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    load = lambda auto_class, name: auto_class.from_pretrained(folder / name, dtype=torch.float32)
    causal_lm = transformers.AutoModelForCausalLM
    classifier = transformers.AutoModelForSequenceClassification
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    ids = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    prompts = datasets.Dataset.from_dict({"input_ids": ids * (job["num_updates"] + 1)})
    cuda = job["cuda"]
    config = PPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=job["microbatch_size"],
        gradient_accumulation_steps=job["batch_size"] // job["microbatch_size"],
        num_mini_batches=job["batch_size"] // job["minibatch_size"],
        num_ppo_epochs=job["ppo_epochs"], response_length=job["response_length"],
        total_episodes=job["batch_size"] * job["num_updates"], temperature=1.0,
        local_rollout_forward_batch_size=job["rollout_size"], num_sample_generations=0,
        gradient_checkpointing=False, save_strategy="no", report_to=[], use_cpu=not cuda,
        disable_tqdm=True, learning_rate=1e-5,
    )
    times = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            iteration.synchronize(torch.device("cuda:0" if cuda else "cpu"))
            times.append(time.perf_counter())

    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=load(causal_lm, "policy"),
        ref_model=load(causal_lm, "policy"), reward_model=load(classifier, "reward_model"),
        value_model=load(classifier, "reward_model"), train_dataset=prompts,
        eval_dataset=prompts.select(range(2)), callbacks=[Clock()],
    )
    trainer.train()
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = [end - begin for begin, end in zip(times, times[1:])]
    (folder / "trl.json").write_text(json.dumps({"seconds": seconds, "peak_memory_gb": peak / 1e9}))


# === Pairs ========================================================================================
def main(argv):
    parser = iteration.parser(__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="of runs, ours and TRL's in turn")
    parser.add_argument("--peer-dtype", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--peer-microbatch-sizes", type=int, nargs="+", help="if not ours")
    parser.add_argument("--peer-rollout-size", type=int, help="the batch, if not given")
    args, shape, flags = iteration.parse(parser, argv)
    if not importlib.util.find_spec("trl"):
        parser.error("the peer is not installed; pip install trl==1.12.0")
    sizes_differ = shape.minibatch_size != shape.batch_size
    if sizes_differ or any(shape.batch_size % n for n in args.peer_microbatch_sizes or ()):
        parser.error("TRL takes one step an epoch: one minibatch, in micro-batches of equal size")
    device = iteration.device_of(flags)
    peer = args.peer_dtype, args.peer_rollout_size or shape.batch_size
    sizes = args.peer_microbatch_sizes or [shape.microbatch_size]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        iteration.write_inputs(shape, folder)
        tried = {}
        for size in sizes if len(sizes) > 1 else ():
            seconds, peak = run_trl(shape, folder, 3, device, peer[0], size, peer[1])
            tried[size] = statistics.median(seconds)
            print(f"TRL, micro-batch {size}: {tried[size]:.2f} s, {peak:.2f} GB", flush=True)
        size = min(tried, key=tried.get) if tried else sizes[0]
        pairs = []
        for number in range(args.pairs):
            rows = iteration.run_ppo(shape, folder, args.warm_up + args.repeats, flags)
            rows = rows[args.warm_up :]
            ours = statistics.median(map(iteration.total_seconds, rows))
            job = args.repeats + 1, device, peer[0], size, peer[1]
            seconds, peak = run_trl(shape, folder, *job)
            theirs = statistics.median(seconds)
            pairs.append({
                "seconds": ours, "trl_seconds": theirs, "ratio": theirs / ours,
                "peak_memory_gb": rows[-1]["peak_memory_gb"], "trl_peak_memory_gb": peak,
            })
            print(
                f"pair {number + 1}: ours {ours:.2f} s, {rows[-1]['peak_memory_gb']:.2f} GB; "
                f"TRL {theirs:.2f} s, {peak:.2f} GB; {theirs / ours:.2f} times as fast", flush=True
            )
    ratio = iteration.spread([pair["ratio"] for pair in pairs])
    memory = iteration.spread([p["peak_memory_gb"] / p["trl_peak_memory_gb"] for p in pairs])
    print(f"TRL's time over ours: median {ratio[0]:.2f} (from {ratio[1]:.2f} to {ratio[2]:.2f})")
    print(f"our memory over TRL's: {memory[0]:.2f} (from {memory[1]:.2f} to {memory[2]:.2f})")
    result = {
        "shape": vars(shape), "flags": flags, "trl_dtype": peer[0], "trl_rollout_size": peer[1],
        "trl_microbatch_size": size, "trl_microbatch_sizes_tried": tried, "pairs": pairs,
        "ratio": ratio, "memory_ratio": memory,
    }
    iteration.save(result | iteration.machine(device), args.output, argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trl"]:
        trl_process(pathlib.Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        main(sys.argv[1:])
