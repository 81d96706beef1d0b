"""Time ways to sample a batch of responses from the same random-weight model.

    python bench/rollout.py --shape cpu --dtype bf16
    python bench/rollout.py --shape M --end-probability 0.02

ours              common.generate_responses: rows that have ended leave the batch
generate          transformers' loop on a cache that grows
generate, fixed   the same on a cache of fixed size; on CUDA its step is captured in a graph, which
                  is what ppo.py --compile does
continuous        transformers' continuous batching (generate_batch), in float32: it works in a
                  thread of its own, which autocast does not reach

Engines take turns, so that what else the machine does falls on all of them. With --end-probability
p every token is an EOS with about that probability, as texts that end differ in length; without it
nearly all run to the full length.
"""

import copy
import sys
import time

import iteration
import torch
import transformers

sys.path.insert(0, str(iteration.HERE.parent))
import common  # noqa: E402


def engines(model, prompts, shape):
    """{name: function() -> list of the responses' ids}, each plain sampling at temperature 1."""
    paged = copy.deepcopy(model)  # generate_batch changes its attention for good
    tokens, mask = (x.to(model.device) for x in common.pad(prompts, 1, "left"))
    settings = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=shape.response_length,
        eos_token_id=model.generation_config.eos_token_id, pad_token_id=1,
    )
    is_end = set(settings.eos_token_id)

    def cut(response):
        rows = response.tolist()
        ends = [next((t for t, id in enumerate(ids) if id in is_end), len(ids)) for ids in rows]
        return [ids[: end + 1] for ids, end in zip(rows, ends)]

    def ours(sample=common.generate_responses):
        return cut(sample(model, tokens, mask, shape.response_length, 1.0)[0])

    def generate():
        output = model.generate(tokens, attention_mask=mask, generation_config=settings)
        return cut(output[:, tokens.shape[1] :])

    def continuous():
        outputs = paged.generate_batch(prompts, generation_config=settings, progress_bar=False)
        return [output.generated_tokens for output in outputs.values()]

    return {
        "ours": ours, "generate": generate, "generate, fixed": lambda: ours(common.generate_compiled),
        "continuous": continuous,
    }


def main(argv):
    parser = iteration.parser(__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("auto", "float32", "bf16"), default="auto")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto is a GPU if any")
    parser.add_argument("--end-probability", type=float, default=0.0, help="of each token")
    args, shape, flags = iteration.parse(parser, argv)
    if not 0 <= args.end_probability <= 0.9:
        parser.error(f"--end-probability is {args.end_probability}; it must be from 0 to 0.9")
    if flags:
        parser.error("this runs no ppo.py, so nothing can stand behind --")
    device = iteration.device_of(["--device", args.device])
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = iteration.model_config(shape)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    common.place(model, device, args.dtype)
    num_ends = max(1, round(args.end_probability * shape.vocabulary))
    model.generation_config.eos_token_id = list(range(2, 2 + num_ends))
    model.generation_config.pad_token_id = 1
    size = (shape.batch_size, shape.prompt_length)
    prompts = torch.randint(2 + num_ends, shape.vocabulary, size).tolist()
    functions = engines(model, prompts, shape)
    runs, failed = {name: [] for name in functions}, {}
    for turn in range(args.warm_up + args.repeats):
        for name, function in functions.items():
            if name in failed:
                continue
            try:
                with common.autocast(model):
                    begin = time.perf_counter()
                    responses = function()
                    iteration.synchronize(device)
                    seconds = time.perf_counter() - begin
            except Exception as error:  # an engine that can't is a result too
                failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            if turn >= args.warm_up:
                runs[name].append((seconds, sum(map(len, responses))))
    results = {}
    for name, values in runs.items():
        if name in failed:
            print(f"{name:<18}{failed[name]}")
            continue
        seconds, rate = (
            iteration.spread(x) for x in zip(*((took, number / took) for took, number in values))
        )
        results[name] = {"seconds": seconds, "tokens_per_second": rate}
        low, high = seconds[1:]
        print(f"{name:<18}{seconds[0]:>9.3f} s ({low:.3f} to {high:.3f}) {rate[0]:>10.0f} tokens/s")
    result = {
        "shape": vars(shape), "dtype": args.dtype, "end_probability": args.end_probability,
        "engines": results, "failed": failed,
    }
    iteration.save(result | iteration.machine(device), args.output, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
