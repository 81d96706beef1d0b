"""Account for the memory that an update of ppo.py will hold, before a GPU is at hand.

    python bench/fits.py --shape M                                   Qwen2.5-0.5B's shape
    python bench/fits.py --shape L -- --critic shared --gradient-checkpointing --dtype bf16

What stands behind `--` are flags of ppo.py. Random-weight models of the shape are made on the CPU,
and what autograd keeps is counted there on two and on three rows of full length. It is an account
and not a trial: the allocator's own overhead and the rollout's key-value cache are not in it.
"""

import pathlib
import sys
import tempfile

import iteration
import torch

sys.path.insert(0, str(iteration.HERE.parent))
import common  # noqa: E402
import ppo  # noqa: E402
from plumbing import cli  # noqa: E402
from plumbing.rows import load_prompts  # noqa: E402


def tensor_bytes(tensors):
    """Bytes of memory behind some tensors, each counted once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def kept_bytes(function, weights):
    """Bytes that autograd keeps for the backward pass of what `function()` gives, weights aside."""
    kept = []
    keep = lambda tensor: kept.append(tensor.detach())  # itself it would hold its graph for ever
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        _held = function()
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    return tensor_bytes(x for x in kept if x.untyped_storage().data_ptr() not in own)


def estimate_memory(policy, critic, ref_policy, scorers, rows, cfg, device):
    """What an update will hold where it holds most, in its backward pass: {part: bytes}.

    Weights, gradients and Adam's two moments are counted. What autograd keeps of a micro-batch is
    measured on two rows of full length and on three, as each row adds the same. To it come, after
    a separate critic's share is gone, the logits' gradient and the float32 pieces; or, with
    --gradient-checkpointing, one layer whole while it is computed again.
    """
    models = [policy, critic, ref_policy, *(s.model for s in scorers if s.model is not None)]
    trained = [*policy.parameters(), *critic.parameters()]
    is_shared = isinstance(critic, ppo.ValueHead)
    checkpointed = [policy] if is_shared else [policy, critic]
    width = max(len(row.prompt_ids) for row in rows) + cfg.response_length
    num_rows = min(cfg.microbatch_size, cfg.minibatch_size)

    def kept(number, critic):
        tokens = torch.zeros(number, width, dtype=torch.int64, device=device)
        mask = torch.ones_like(tokens).bool()
        mask[0, 0] = False  # so that attention needs a mask, as in most micro-batches
        return kept_bytes(lambda: ppo.forward_responses(
            policy, critic, tokens, mask, cfg.response_length, cfg.temperature,
            with_entropy=cfg.entropy_coef > 0,
        ), trained)

    def kept_of_microbatch(critic):
        two, three = kept(2, critic), kept(3, critic)
        return two + (three - two) * (num_rows - 2)

    activations = kept_of_microbatch(critic)
    row_of_logits = cfg.response_length * policy.get_output_embeddings().out_features
    gradient = num_rows * row_of_logits * (2 if getattr(policy, "in_bf16", False) else 4)
    pieces = 4 * 2 * row_of_logits * 4  # four tensors of two rows
    of_policy = activations if is_shared else kept_of_microbatch(None)
    backward = max(0, of_policy + gradient + pieces - activations)
    if cfg.gradient_checkpointing:
        num_layers = sum(m.config.get_text_config().num_hidden_layers for m in checkpointed)
        for model in checkpointed:
            model.eval()  # transformers checkpoints only in train mode
        backward = max(backward, (kept_of_microbatch(critic) - activations) // num_layers)
        for model in checkpointed:
            model.train()
    return {
        "weights": tensor_bytes(p for model in models for p in model.parameters()),
        "gradients": tensor_bytes(trained), "Adam": 2 * tensor_bytes(trained),
        "activations": activations, "backward": backward,
    }


def main(argv):
    args, shape, flags = iteration.parse(iteration.parser(__doc__.splitlines()[0]), argv)
    with tempfile.TemporaryDirectory() as name, cli.command_line():
        folder = pathlib.Path(name)
        iteration.write_inputs(shape, folder)
        given = [
            "--policy", folder / "policy", "--reward", folder / "reward_model",
            "--prompts", folder / "prompts.jsonl", "--eval-prompts", folder / "eval.jsonl",
            "--microbatch-size", shape.microbatch_size, "--minibatch-size", shape.minibatch_size,
            "--batch-size", shape.batch_size, "--response-length", shape.response_length, *flags,
        ]
        cfg = cli.parse_args(ppo.Config, "", list(map(str, given)))
        tokenizer, device = common.load_tokenizer(cfg.policy), torch.device("cpu")
        rows, _ = load_prompts(cfg, tokenizer)
        policy, ref_policy, critic, scorers = ppo.load_models(cfg, tokenizer, rows, device)
        parts = estimate_memory(policy, critic, ref_policy, scorers, rows, cfg, device)
    parts["together"] = sum(parts.values())
    for part, size in parts.items():
        print(f"{part:<14}{size / 1e9:>9.3f} GB")
    iteration.save({"shape": vars(shape), "flags": flags, "bytes": parts}, args.output, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
