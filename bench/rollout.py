"""Time common.generate_responses beside transformers' generate, on the same random-weight model.

    python bench/rollout.py --shape cpu --dtype bf16
    python bench/rollout.py --shape M --end-probability 0.02

In generate_responses ("ours") rows that have finished leave the batch. Engines take turns, so that
what else the machine does slows both. With --end-probability p every token is an EOS with about
that probability; without it nearly all run to the full length.
"""

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
        else:
            rows = model.generate(tokens, attention_mask=mask, generation_config=settings)
            rows = rows[:, tokens.shape[1] :]
    rows = rows.cpu()  # waits for a GPU
    seconds = time.perf_counter() - begin
    is_eos = torch.isin(rows, torch.tensor(settings.eos_token_id)).long()
    return seconds, (is_eos.cumsum(1) - is_eos == 0).sum().item()  # up to the first EOS


def main(argv):
    parser = iteration.make_parser(__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("auto", "float32", "bf16"), default="auto")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto is a GPU if any")
    parser.add_argument("--end-probability", type=float, default=0.0, help="of each token")
    args, shape, _ = iteration.parse(parser, argv)
    device = harness.pick_device(args.device)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(iteration.model_config(shape)).eval()
    common.to_device(model.requires_grad_(False), device, args.dtype)
    num_ends = max(1, round(args.end_probability * shape.vocabulary))
    settings = model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=shape.response_length,
        eos_token_id=list(range(2, 2 + num_ends)), pad_token_id=1,
    )
    size = (shape.batch_size, shape.prompt_length)
    prompts = torch.randint(2 + num_ends, shape.vocabulary, size).tolist()
    runs = {"ours": [], "generate": []}  # {engine: (seconds, tokens) of each batch}
    for _ in range(args.warm_up + args.repeats):
        for name in runs:
            runs[name].append(run_engine(name, model, prompts, settings))
    engines = {}
    for name in runs:
        counted = runs[name][args.warm_up :]
        seconds = iteration.spread([seconds for seconds, _ in counted])
        rate = iteration.spread([number / seconds for seconds, number in counted])
        engines[name] = {"seconds": seconds, "tokens_per_second": rate}
        print(f"{name:<12}{seconds[0]:>9.3f} s {rate[0]:>9.0f} tokens/s (medians)")
    result = {"shape": vars(shape), "dtype": args.dtype, "engines": engines}
    iteration.save(result | {"end_probability": args.end_probability}, device, args, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
