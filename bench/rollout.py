"""Time ways to sample a batch of responses from the same random-weight model.

    python bench/rollout.py --shape cpu --dtype bf16
    python bench/rollout.py --shape M --end-probability 0.02

ours         common.generate_responses: rows that have finished leave the batch
generate     transformers' loop
continuous   transformers' continuous batching (generate_batch), in float32: it works in a thread of
             its own, which autocast does not reach

Engines take turns, so that what else the machine does slows all of them. With --end-probability p
every token is an EOS with about that probability; without it nearly all run to the full length.
"""

import copy
import sys
import time

import iteration
import torch
import transformers

import common
import harness


def run_engine(name, model, prompts, settings):
    """Returns (seconds, tokens sampled) of one batch; `settings` are of transformers' generate."""
    tokens, mask = common.pad(prompts, settings.pad_token_id, "left")
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    begin = time.perf_counter()
    with common.autocast(model):
        if name == "ours":
            rows, _ = common.generate_responses(model, tokens, mask, settings.max_new_tokens, 1.0)
            rows = rows.tolist()  # waits for a GPU
        elif name == "generate":
            rows = model.generate(tokens, attention_mask=mask, generation_config=settings)
            rows = rows[:, tokens.shape[1] :].tolist()
        else:
            outputs = model.generate_batch(prompts, generation_config=settings, progress_bar=False)
            rows = [output.generated_tokens for output in outputs.values()]
    seconds = time.perf_counter() - begin
    lengths = []
    for ids in rows:  # up to the first EOS
        ends = [t for t, id in enumerate(ids) if id in settings.eos_token_id]
        lengths.append(ends[0] + 1 if ends else len(ids))
    return seconds, sum(lengths)


def main(argv):
    parser = iteration.make_parser(__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("auto", "float32", "bf16"), default="auto")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto is a GPU if any")
    parser.add_argument("--end-probability", type=float, default=0.0, help="of each token")
    parser.add_argument("--engines", nargs="+", default=["ours", "generate", "continuous"])
    args, shape, _ = iteration.parse(parser, argv)
    device, size = harness.pick_device(args.device), (shape.batch_size, shape.prompt_length)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(iteration.model_config(shape)).eval()
    common.to_device(model.requires_grad_(False), device, args.dtype)
    num_ends = max(1, round(args.end_probability * shape.vocabulary))
    settings = model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=shape.response_length,
        eos_token_id=list(range(2, 2 + num_ends)), pad_token_id=1,
    )
    paged = copy.deepcopy(model)  # generate_batch changes its attention for good
    prompts = torch.randint(2 + num_ends, shape.vocabulary, size).tolist()
    runs, failed = {name: [] for name in args.engines}, {}
    for _ in range(args.warm_up + args.repeats):
        for name in [name for name in runs if name not in failed]:
            try:
                engine = paged if name == "continuous" else model
                runs[name].append(run_engine(name, engine, prompts, settings))
            except Exception as error:  # that an engine can't is a result, too
                failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
    engines = {}
    for name in [name for name in runs if name not in failed]:
        counted = runs[name][args.warm_up :]
        seconds = iteration.spread([seconds for seconds, _ in counted])
        rate = iteration.spread([number / seconds for seconds, number in counted])
        engines[name] = {"seconds": seconds, "tokens_per_second": rate}
        print(f"{name:<12}{seconds[0]:>9.3f} s {rate[0]:>9.0f} tokens/s (medians)")
    result = {"shape": vars(shape), "dtype": args.dtype, "engines": engines, "failed": failed}
    result["end_probability"] = args.end_probability
    iteration.save(result, device, args, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
