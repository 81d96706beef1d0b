"""How much GPU memory ppo.py will need, by part and by phase, before a GPU is at hand.

    python bench/fits.py --model Qwen/Qwen2.5-0.5B --microbatch-size 8 --response-length 256
    python bench/fits.py --model my/config.json --reward mine.py:reward --gradient-checkpointing
    python bench/fits.py --model 8B --lora-rank 16
    python bench/fits.py --table --microbatch-size 4       the rows of docs/running.md

All flags of ppo.py are accepted. Its dry run is run on tensors that have a shape and a dtype but no
numbers: of a model only its config is read, so 8 B parameters take a minute and no memory. What is
alive after each operation is added up. Not counted: CUDA's context, what an operation needs within
itself, and what the allocator can't use because of fragmentation. Some room is left for them.
"""

import contextlib
import dataclasses
import gc
import io
import itertools
import tempfile
import weakref
from types import SimpleNamespace
from unittest import mock

import iteration
import torch
from iteration import SHAPES, Shape
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import harness
import ppo
from harness import arg
from rewards import TokenScorer

MODELS = {  # Qwen2.5-0.5B, Llama-3.2-1B and 3B, Llama-3.1-8B
    "0.5B": SHAPES["M"], "1B": SHAPES["L"],
    "3B": Shape("llama", 3072, 28, 24, 8, 8192, 128256, True),
    "8B": Shape("llama", 4096, 32, 32, 8, 14336, 128256, False),
}
CARDS = (12, 16, 24, 48, 80)  # GB
COLUMNS = ("weights", "gradients", "Adam's moments", "key-value cache", "activations", "rollout",
           "backward")  # of the table


@dataclasses.dataclass(frozen=True)
class Config(ppo.Config):
    model: str = arg("1B", f"folder, hub id or config.json, or {', '.join(MODELS)}")
    table: bool = arg(False, "0.5 to 8 B parameters, in full and with adapters")
    microbatch_size: harness.Count = arg(32, "responses per forward pass")


# === Tensors without numbers, and what is alive of them ===========================================
class Fake(FakeTensorMode):
    """Models of any size are made and run in no memory; a copy of one stays in the same mode."""

    def __deepcopy__(self, memo):
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:  # .item(): there is no number
            return {torch.bool: True, torch.int64: 2**62}.get(args[0].dtype, 0.0)
        return super().__torch_dispatch__(func, types, args, kwargs)


class Ledger(TorchDispatchMode):
    """Adds up the storages that are alive, each once, in the blocks of CUDA's allocator."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0  # bytes
        self.known = {}  # {address of a storage: weak reference}
        self.now = "loading"
        self.phases = {}  # {phase: its peak}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                self.add(x.untyped_storage())
        return result

    def add(self, storage):
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512

        def free(_):
            self.alive -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, free)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def phase(self, name):
        """Counts what follows for this phase."""
        self.phases[self.now], self.now, self.peak = self.peak, name, self.alive


def attention_on_cuda(query, key, value, attn_mask=None, is_causal=False, scale=None, **_):
    """The memory-efficient kernel, which takes a mask and does not keep the probabilities."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is not None:  # as numbers to add, in rows of a multiple of 16
        width = attn_mask.shape[-1]
        rows = query.new_zeros(*attn_mask.shape[:-1], -(-width // 16) * 16)
        attn_mask = rows[..., :width].expand(*query.shape[:3], -1)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    needs_grad = query.requires_grad or key.requires_grad
    return efficient(query, key, value, attn_mask, needs_grad, 0.0, is_causal, scale=scale)[0]


def pow_on_cuda(x, exponent, pow=torch.pow):
    """In float32 under autocast, which on a CPU leaves it (and with it GPT-2's GELU) in bf16."""
    return pow(x.float() if torch.is_autocast_enabled("cpu") else x, exponent)


# === The models, from their configs ===============================================================
def load_models(cfg):
    """Returns what `ppo.load_models` makes of the flags, with random weights."""

    def load_scorer(spec, policy, tokenizer, microbatch_size, **options):
        if ".py" in spec:
            return SimpleNamespace(model=None, reads_tokens=False)
        model, _ = common.load_classifier(spec, **options)
        return TokenScorer(spec, model.requires_grad_(False), microbatch_size)

    def load_model(auto_class, path, made_by, config, **options):
        attention = "eager" if cfg.attention == "eager" else None
        options = {"dtype": torch.float32, "attn_implementation": attention}
        return auto_class.from_config(config, **options).eval(), []

    tokenizer = SimpleNamespace(eos_token_id=2, bos_token_id=None, pad_token_id=1)
    longest = cfg.max_prompt_length + cfg.response_length
    replaced = {"load_model": load_model, "fit_embeddings": mock.Mock(), "check_model": mock.Mock()}
    with (
        mock.patch.multiple(common, **replaced), mock.patch.object(ppo, "load_scorer", load_scorer),
        tempfile.TemporaryDirectory() as folder,
    ):
        path = cfg.model.removesuffix("config.json")
        if cfg.model in MODELS:
            config, path = iteration.model_config(MODELS[cfg.model]), folder
            config.max_position_embeddings = longest
            config.save_pretrained(folder)
        reward = [path] if cfg.reward == Config().reward else cfg.reward
        cfg = dataclasses.replace(cfg, policy=path, reward=reward)
        return ppo.load_models(cfg, tokenizer, longest, torch.device(cfg.device))


# === The dry run ==================================================================================
def computed(cfg, on_cuda=True):
    """Returns (parts, phases): {name: bytes} of what there is, and of the most each phase takes.

    On tensors without numbers, as it would be on CUDA or else on this CPU.
    """
    forward, ledger, parts = ppo.forward_responses, Ledger(), {}

    def whole_parts(attention_mask, index, size):
        """All rows have the full length."""
        for rows in index.split(size):
            yield rows, slice(attention_mask.shape[1])

    def forward_responses(*args, **options):
        before = ledger.alive
        outputs = forward(*args, **options)
        if torch.is_grad_enabled():
            parts["activations"] = ledger.alive - before
        return outputs

    def sample_responses(policy, tokenizer, prompt_rows, response_length, temperature, generator):
        """The first and the last step. None between them takes more."""
        policy.eval()  # with gradient checkpointing the layers would keep no cache
        tokens = torch.ones(len(prompt_rows), cfg.max_prompt_length + response_length).long()
        mask, prompts = tokens.bool(), tokens[:, :-response_length]
        common.generate_responses(policy, prompts, mask[:, :-response_length], 1, temperature)
        peak, alive, cache = ledger.peak, ledger.alive, common.GrowingCache(config=policy.config)
        with common.autocast(policy), torch.no_grad():
            inputs = {"input_ids": tokens[:, 1:], "attention_mask": mask[:, 1:]}
            policy.forward(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ledger.peak, parts["key-value cache"] = peak, ledger.alive - alive
        with mock.patch.object(common, "GrowingCache", return_value=cache):
            common.generate_responses(policy, tokens[:, :1], mask, 1, temperature)
        response_mask = mask[:, -response_length:]
        return ppo.Rollout(tokens, mask, response_mask, mask[:, 0], response_mask.float(), [])

    replaced = [
        (common, "parts_by_length", whole_parts),
        (ppo, "forward_responses", forward_responses), (ppo, "sample_responses", sample_responses),
        (torch.cuda, "reset_peak_memory_stats", mock.Mock()),
        (torch.utils, "swap_tensors", lambda old, new: setattr(old, "data", new)),
    ]
    if on_cuda:
        cfg = dataclasses.replace(cfg, dtype=cfg.dtype.replace("auto", "bf16"))
        attention = (torch.nn.functional, "scaled_dot_product_attention", attention_on_cuda)
        replaced += [attention, (torch, "pow", pow_on_cuda)]
    cfg = dataclasses.replace(cfg, device="cpu", compile=False)
    with contextlib.ExitStack() as stack:
        for where, name, by in replaced:
            stack.enter_context(mock.patch.object(where, name, by))
        stack.enter_context(Fake())
        stack.enter_context(ledger)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        policy, ref_policy, critic, scorers = load_models(cfg)
        optimizer, _ = ppo.make_optimizer(cfg, policy, critic)
        run = SimpleNamespace(cfg=cfg, device=SimpleNamespace(type="cuda"), phase=ledger.phase)
        rows = [SimpleNamespace(prompt_ids=[3] * cfg.max_prompt_length)]
        gc.collect()  # what loading has left
        ppo.dry_run(run, policy, ref_policy, critic, scorers, optimizer, None, rows)
        ledger.phase("end")
    models = [policy, ref_policy, critic, *(scorer.model for scorer in scorers)]
    weights = {weight for model in models if model is not None for weight in model.parameters()}
    gradients = sum(weight.nbytes for weight in weights if weight.requires_grad)
    sizes = {"weights": sum(weight.nbytes for weight in weights), "gradients": gradients}
    del ledger.phases["loading"]
    return sizes | {"Adam's moments": 2 * gradients} | parts, ledger.phases


# === Command line =================================================================================
def smallest_card(phases):
    """Returns the first of CARDS, in GB, that holds the largest phase; None if none does. 8 % of a
    card, and at least 1.5 GB, are to stay free.
    """
    most = max(phases.values()) / 1e9
    return next((card for card in CARDS if most <= card - max(0.08 * card, 1.5)), None)


def table(cfg):
    """Prints rows of Markdown: each size, in full and with adapters, without and with
    --gradient-checkpointing.
    """
    ways = {
        "everything": {}, "LoRA": {"lora_rank": 16},
        "LoRA, reward a function": {"lora_rank": 16, "reward": ["mine.py:reward"]},
    }
    for model, (way, flags) in itertools.product(MODELS, ways.items()):
        cells = []
        for checkpointing in (False, True):
            changes = flags | {"model": model, "gradient_checkpointing": checkpointing}
            parts, phases = computed(dataclasses.replace(cfg, **changes))
            sizes = [f"{(parts | phases)[name] / 1e9:.1f}" for name in COLUMNS]
            cells.append([*sizes, str(smallest_card(phases))])
        pairs = [" / ".join(dict.fromkeys(pair)) for pair in zip(*cells)]  # one, if they are alike
        print(f"| {model} | {way} | {' | '.join(pairs)} |", flush=True)


def main(cfg):
    ppo.check_config(cfg)
    if cfg.table:
        return table(cfg)
    parts, phases = computed(cfg)
    most = {f"at the most, in {name}": size for name, size in phases.items()}
    for name, size in (parts | most).items():
        print(f"{name:<34}{size / 1e9:>8.2f} GB")
    card = smallest_card(phases)
    print(f"a card of {card} GB holds it" if card else f"no card of {CARDS[-1]} GB holds it")


if __name__ == "__main__":
    harness.run_stage(main, Config, __doc__.splitlines()[0])
