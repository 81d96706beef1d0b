"""What the user sees at the start and at the end of a run."""

import json
import math
import textwrap

import torch

import common
from plumbing import cli
from plumbing.metrics import peak_memory, piece, summarize


# === The start ====================================================================================
def describe(role, model, is_trained):
    """One line about a model: its role, class, size, data type, and whether it is trained, or how
    much of it.
    """
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    num_trained = sum(weight.numel() for weight in cli.trainable(model)) / 1e6
    name, state = type(model).__name__, "trained" if is_trained else "frozen"
    state = f"{num_trained:.3f} M trained" if is_trained and num_trained < size else state
    return f"  {role:<14}{name:<34}{size:>10.3f} M  {'+'.join(sorted(dtypes)):<18}{state}"


def print_tokens(tokenizer, model, prompt, response=()):
    """The special tokens, and one row token by token: a doubled BOS or a lost EOS is seen here."""
    ids = common.eos_token_ids(tokenizer, model)
    eos = ", ".join(f"{id} {tokenizer.convert_ids_to_tokens(id)}" for id in ids)
    texts = [
        "|".join(piece(tokenizer, id).replace("\n", "\\n") for id in ids)
        for ids in (prompt, response) if len(ids)
    ]
    line = "  =>  ".join(texts)
    line = line if len(line) <= 240 else f"{line[:150]} ... {line[-80:]}"
    pad_token = f"{tokenizer.pad_token_id} {tokenizer.pad_token}"
    print(f"  EOS {eos}; pad {pad_token}; a row:\n{_wrapped(f'    {line}')}")


def _wrapped(text):
    """A text of two or more lines where it is longer than a screen is wide."""
    fill = lambda line: textwrap.fill(line, 100, subsequent_indent="      ")
    return "\n".join(map(fill, text.splitlines()))


def supervised_start(cfg, role, model, what, num_examples, num_held_out, optimizer):
    """The model, the batch arithmetic and the learning rate of the first two stages."""
    num_batches = math.ceil(num_examples / cfg.batch_size)
    print(
        f"{describe(role, model, True)}\n  {num_examples} {what}, {num_held_out} held out; "
        f"{cfg.epochs} epochs x {num_batches} batches of {cfg.batch_size} = "
        f"{cfg.epochs * num_batches} optimizer steps\n"
        f"  peak lr {optimizer.defaults['lr']:g} (by model size, unless --lr is given)"
    )


def ppo_start(cfg, policy, ref_policy, critic, scorers, lrs, tokenizer, rows, eval_rows):
    """What will run: the models, the batch arithmetic, the learning rates, the special tokens."""
    print(describe("policy", policy, True))
    print(describe("ref policy", ref_policy, False))
    if critic is not None:
        print(describe("critic", critic, True))
    for scorer in scorers:
        model = scorer.model
        of_function = f"  {'reward':<14}{scorer.spec}"
        print(of_function if model is None else describe("reward", model, False))
        if model is not None and not scorer.reads_tokens:
            print(f"  {'':<14}{scorer.spec} reads texts: responses are decoded and encoded for it")
    from_policy = cfg.critic == "separate" and not any(scorer.reads_tokens for scorer in scorers)
    if critic is not None and from_policy:
        print(f"  {'':<14}the critic starts from the policy, with a head of zeros")
    models = [policy, critic, ref_policy, *(scorer.model for scorer in scorers)]
    weights = {p for model in models if model is not None for p in model.parameters()}  # each once
    memory = sum(p.nbytes * (4 if p.requires_grad else 1) for p in weights)
    num_minibatches = cfg.batch_size // cfg.minibatch_size
    num_micro = math.ceil(cfg.minibatch_size / cfg.microbatch_size)
    print(
        f"  weights, gradients and Adam's moments take {memory / 1e9:.3g} GB\n"
        f"  {cfg.iterations} iterations x {cfg.batch_size} prompts = "
        f"{cfg.iterations * cfg.batch_size} episodes, from {len(rows)} prompts; "
        f"{len(eval_rows)} held out\n  judge: {cfg.judge or 'none'}\n"
        f"  {cfg.ppo_epochs} epochs x {num_minibatches} minibatches of {cfg.minibatch_size} = "
        f"{cfg.ppo_epochs * num_minibatches} optimizer steps per iteration,\n"
        f"    each in {num_micro} micro-batches of up to {cfg.microbatch_size}\n"
        f"  lr {', critic lr '.join(f'{lr:g}' for lr in lrs)} (by model size, unless given)"
    )
    print_tokens(tokenizer, policy, rows[0].prompt_ids)


def measured_peak(device):
    """Print what the rehearsal took at most; what `peak_memory_gb` says is counted from here."""
    print(f"  measured in a trial of the longest batch: {peak_memory(device) / 1e9:.2f} GB")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


# === The end ======================================================================================
def sft_result(loss_before, loss, model, tokenizer, examples):
    """The loss before and after, and what the policy now answers to a few held-out prompts."""
    print(
        f"\nheld-out loss {loss_before:.3f} -> {loss:.3f} nats per token, perplexity "
        f"{math.exp(loss_before):.2f} -> {math.exp(loss):.2f}; samples:"
    )
    prompts = [prompt_ids for prompt_ids, _ in examples if prompt_ids][:4]
    if not prompts:  # plain text on a tokenizer without BOS: nothing to start from
        return
    tokens, mask = common.pad(prompts, tokenizer.pad_token_id, "left")
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    fits = max(len(x) + len(y) for x, y in examples)  # the model may have no positions beyond
    length = min(64, fits - tokens.shape[1])
    responses, _ = common.generate_responses(model, tokens, mask, length, temperature=1.0)
    for prompt_ids, response in zip(prompts, responses):
        print(f"\n  {tokenizer.decode(prompt_ids, skip_special_tokens=True)}")
        print(_wrapped(f"    ->{common.decode(tokenizer, prompt_ids, response.tolist())}"))


def reward_model_result(row, calibration, drift):
    """Accuracy beside its trivial rival, calibration, and the scale that PPO will use."""
    print(
        f"\nheld-out accuracy {row['accuracy']:.3f} +- {row['accuracy_two_sigma']:.3f} (2 sigma); "
        f"'the longer one wins' has {row['longer_wins']:.3f}\n"
        f"held-out loss {row['loss']:.3f} nats; knowing nothing has {math.log(2):.3f}\n"
        f"score mean {row['reward_mean']:.3f}, deviation {row['reward_std']:.3f}; "
        f"scores after reloading differ by at most {drift:.1g}\n"
        f"\n{'score difference':>18}{'promised accuracy':>20}{'accuracy':>11}"
    )
    for size, promised, right in calibration:
        print(f"{size:>18.2f}{promised:>20.2f}{right:>11.2f}")


def ppo_result(cfg, baseline, samples):
    """The table, samples side by side, and the lines that load the policy."""
    before, after = summarize(baseline, baseline), summarize(samples, baseline)
    print(f"\n{'held-out prompts':<18}{'SFT':>9}{'PPO':>9}")
    for key in before:
        if before[key] is not None:
            print(f"{key:<18}{before[key]:>9.3f}{after[key]:>9.3f}")
    shown = lambda prompt: prompt if isinstance(prompt, str) else prompt[-1]["content"]
    for old, new in list(zip(baseline, samples))[:3]:
        print(f"\n  {shown(new['prompt'])}")
        for name, sample in (("SFT", old), ("PPO", new)):
            truth = sample["true_reward"]
            truth = "" if truth is None else f", true {truth:.2f}"
            print(_wrapped(f"    {name} (score {sample['score']:.2f}{truth}):{sample['response']}"))
    prompt = samples[0]["prompt"]
    prompt = prompt[:66] if isinstance(prompt, str) else [prompt[-1]]
    print(f"\nthe curves: python plot.py {cfg.output}")
    if not isinstance(prompt, str):
        print(f"to talk: transformers serve {cfg.output}, then transformers chat {cfg.output}")
    print(f'''
wrote {cfg.output}, an ordinary Hugging Face folder; to load and try it:
    from transformers import pipeline
    generate = pipeline("text-generation", "{cfg.output}")
    print(generate({json.dumps(prompt, ensure_ascii=False)}, max_new_tokens=64))''')
