"""Time ppo.py beside TRL's PPO trainer, on the same sizes, in turn, pair by pair.

    pip install trl==1.12.0        the last release with PPO; needed for this file only
    python bench/peer.py --shape cpu -- --dtype bf16 --attention eager --compile
    python bench/peer.py --shape S --pairs 3 --peer-microbatch-size 64

TRL gets bf16 autocast, switched on through accelerate's environment variable, since its own flag
does nothing on transformers 5 (accelerate applies it to the update; --peer-dtype float32 leaves it
off), the whole batch in one rollout and the same number of optimizer steps. On a CPU memory is that
of the process, imports included.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import iteration

import harness


# === The peer, in a process of its own ============================================================
def run_trl(shape, folder, num_updates, device, args):
    """Returns (median seconds of an update of TRL's trainer but the first, peak memory in GB)."""
    environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    if args.peer_dtype == "bf16":
        environment["ACCELERATE_MIXED_PRECISION"] = "bf16"
    if device.type == "cuda" and "CUDA_VISIBLE_DEVICES" not in environment:
        environment["CUDA_VISIBLE_DEVICES"] = str(device.index)  # else it takes all GPUs
    job = vars(shape) | {"is_cuda": device.type == "cuda", "num_updates": num_updates}
    job["microbatch_size"] = args.peer_microbatch_size or shape.microbatch_size or 32
    command = [sys.executable, __file__, "--trl", str(folder), json.dumps(job)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"TRL failed:\n{run.stderr[-3000:]}")
    result = json.loads((folder / "trl.json").read_text())
    return statistics.median(result["seconds"]), result["peak_memory_gb"]


def trl_process(folder, job):
    """Runs TRL on the folders that `iteration.write_inputs` wrote; writes trl.json beside them."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers import AutoModelForSequenceClassification as Classifier
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    models = {}
    for name, kind, path in (
        ("model", AutoModelForCausalLM, "policy"), ("ref_model", AutoModelForCausalLM, "policy"),
        ("reward_model", Classifier, "reward_model"), ("value_model", Classifier, "reward_model"),
    ):
        models[name] = kind.from_pretrained(folder / path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    ids = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    prompts = datasets.Dataset.from_dict({"input_ids": ids * (job["num_updates"] + 1)})
    config = PPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=job["microbatch_size"],
        gradient_accumulation_steps=job["batch_size"] // job["microbatch_size"],
        num_mini_batches=job["batch_size"] // job["minibatch_size"],
        num_ppo_epochs=job["ppo_epochs"], response_length=job["response_length"],
        total_episodes=job["batch_size"] * job["num_updates"], temperature=1.0,
        local_rollout_forward_batch_size=job["batch_size"], num_sample_generations=0,
        gradient_checkpointing=False, save_strategy="no", report_to=[],
        use_cpu=not job["is_cuda"], disable_tqdm=True, learning_rate=1e-5,
    )
    device = torch.device("cuda:0" if job["is_cuda"] else "cpu")
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            torch.zeros(1, device=device).item()  # waits for a GPU
            times.append(time.perf_counter())

    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, train_dataset=prompts,
        eval_dataset=prompts.select(range(2)), callbacks=[Clock()], **models,
    )
    trainer.train()
    seconds = [end - begin for begin, end in zip(times, times[1:])]
    peak = harness.peak_memory(device) / 1e9
    (folder / "trl.json").write_text(json.dumps({"seconds": seconds, "peak_memory_gb": peak}))


# === Pairs ========================================================================================
def main(argv):
    parser = iteration.make_parser(__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="of runs, ours and TRL's in turn")
    parser.add_argument("--peer-dtype", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--peer-microbatch-size", type=int, help="TRL's, if not ours")
    args, shape, flags = iteration.parse(parser, argv)
    pairs = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        iteration.write_inputs(shape, folder)
        for number in range(1, args.pairs + 1):
            rows, in_force = iteration.run_ppo(shape, folder, args.warm_up + args.repeats, flags)
            device = harness.pick_device(in_force["device"])
            seconds = [row["seconds_total"] for row in rows[args.warm_up :]]
            ours, memory = statistics.median(seconds), rows[-1]["peak_memory_gb"]
            theirs, their_memory = run_trl(shape, folder, args.repeats + 1, device, args)
            pair = {"seconds": ours, "trl_seconds": theirs, "ratio": theirs / ours}
            pair |= {"peak_memory_gb": memory, "trl_peak_memory_gb": their_memory}
            pairs.append(pair)
            print(f"pair {number}: {pair}", flush=True)
    ratio = iteration.spread([pair["ratio"] for pair in pairs])
    print(f"TRL's time over ours: median {ratio[0]:.2f} (from {ratio[1]:.2f} to {ratio[2]:.2f})")
    result = {"shape": vars(shape), "flags": flags, "pairs": pairs, "ratio": ratio}
    iteration.save(result, device, args, argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trl"]:
        trl_process(pathlib.Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        main(sys.argv[1:])
