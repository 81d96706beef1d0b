"""How much GPU memory ppo.py will need, by part and by phase, before a GPU is at hand.

    python bench/fits.py --model Qwen/Qwen2.5-0.5B --microbatch-size 8 --response-length 256
    python bench/fits.py --model my/config.json --reward mine.py:reward --gradient-checkpointing
    python bench/fits.py --model 8B --lora-rank 16
    python bench/fits.py --table --microbatch-size 4       the rows of docs/running.md
    python bench/fits.py --check --model 5M                beside a real trial, on this machine

All flags of ppo.py are taken. Its rehearsal, the largest batch once through all phases, is run on
tensors that have a shape and a dtype but no numbers: of a model only its config is read, and 8 B
parameters take a minute and no memory. What is alive after each operation is added up.

Not counted: CUDA's context, what an operation needs within itself, and what the allocator can't
use because it lies in pieces. ROOM is left for them.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import shutil
import sys
import tempfile
import weakref
from types import SimpleNamespace
from unittest import mock

import iteration
import torch
from iteration import Shape
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(iteration.HERE.parent))
import common  # noqa: E402
import ppo  # noqa: E402
from common import UserError  # noqa: E402
from plumbing import cli  # noqa: E402
from plumbing.cli import arg  # noqa: E402
from plumbing.scorers import Scorer, TokenScorer  # noqa: E402

LLAMA_3B = Shape("llama", 3072, 28, 24, 8, 8192, 128256, True)
LLAMA_8B = Shape("llama", 4096, 32, 32, 8, 14336, 128256, False)
MODELS = {  # the latter are Qwen2.5-0.5B, Llama-3.2-1B and 3B, Llama-3.1-8B
    "5M": Shape(), "0.5B": iteration.QWEN_500M, "1B": iteration.LLAMA_1B,
    "3B": LLAMA_3B, "8B": LLAMA_8B,
}
CARDS = (12, 16, 24, 48, 80)  # GB
COLUMNS = (  # of the table
    "weights", "gradients", "Adam's moments", "key-value cache", "activations", "rollout",
    "backward",
)
ROOM = lambda card: max(0.08 * card, 1.5)  # of a card, in GB


@dataclasses.dataclass(frozen=True)
class Config(ppo.Config):
    model: str = arg("1B", f"folder, hub id or config.json, or {', '.join(MODELS)}", heading="fits")
    table: bool = arg(False, "0.5 to 8 B parameters, in full and with adapters")
    check: bool = arg(False, "compare with a real update on this machine")


# === Tensors without numbers, and what is alive of them ===========================================
class Fake(FakeTensorMode):
    """Models of any size are made and run in no memory; a copy of one stays in the same mode."""

    __deepcopy__ = lambda self, memo: self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:  # .item(): there is no number
            return {torch.bool: True, torch.int64: 2**62}.get(args[0].dtype, 0.0)
        return super().__torch_dispatch__(func, types, args, kwargs)


class Ledger(TorchDispatchMode):
    """Adds up the storages that are alive, each once, in the blocks of CUDA's allocator."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.known, self.now, self.phases = 0, 0, {}, "loading", {}

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
        """What is counted from now on belongs to this phase."""
        self.phases[self.now], self.now, self.peak = self.peak, name, self.alive


def attention_on_cuda(query, key, value, attn_mask=None, is_causal=False, scale=None, **_):
    """The flash kernel; with a mask the memory-efficient one. Neither keeps the probabilities."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.bfloat16() for x in (query, key, value))
    if attn_mask is None and query.dtype == torch.bfloat16:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, is_causal, scale=scale)[0]
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    if attn_mask is not None:  # as numbers to add, in rows of a multiple of 16
        width = attn_mask.shape[-1]
        rows = query.new_zeros(*attn_mask.shape[:-1], -(-width // 16) * 16)
        attn_mask = rows[..., :width].expand(*query.shape[:3], -1)
    needs_grad = any(x.requires_grad for x in (query, key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, needs_grad, 0.0, is_causal, scale=scale)[0]


def pow_on_cuda(x, exponent, pow=torch.pow):
    """In float32 under autocast, which on a CPU leaves it (and with it GPT-2's GELU) in bf16."""
    return pow(x.float() if torch.is_autocast_enabled("cpu") else x, exponent)


# === The models, from their configs ===============================================================
def config_folder(name, cfg, folder):
    """A folder or hub id that holds the config which `name` means; it may be made in `folder`."""
    if name in MODELS:
        length = {"prompt_length": cfg.max_prompt_length, "response_length": cfg.response_length}
        iteration.model_config(dataclasses.replace(MODELS[name], **length)).save_pretrained(folder)
    elif name.endswith(".json") and pathlib.Path(name).is_file():
        shutil.copy(name, pathlib.Path(folder) / "config.json")
    else:
        return name
    return folder


def load_models(cfg):
    """What `ppo.load_models` makes of the flags, with random weights: only configs are read."""

    def load_scorer(spec, policy, tokenizer, microbatch_size, **options):
        if ".py" in spec:
            return Scorer()  # a function
        model, _ = common.load_classifier(spec, **options)
        if not common.has_token_head(model):
            raise UserError(f"{spec} reads no tokens of the policy's; only such reward models do")
        return TokenScorer(spec, model.requires_grad_(False), microbatch_size)

    def load_weights(auto_class, path, made_by, config, options):
        attention = "eager" if cfg.attention == "eager" else None
        options = {"dtype": torch.float32, "attn_implementation": attention}
        try:
            return auto_class.from_config(config, **options).eval(), []
        except ValueError as error:  # it lists all families
            raise UserError(f"{path} is of no family of {auto_class.__name__}") from error

    replaced = {"_load_weights": load_weights, "fit_embeddings": None, "prove": None}
    replaced = {name: by or (lambda *args: None) for name, by in replaced.items()}
    tokenizer = SimpleNamespace(eos_token_id=2, bos_token_id=None, pad_token_id=1)
    rows = [SimpleNamespace(prompt_ids=[3] * cfg.max_prompt_length)]
    device = torch.device(cfg.device)
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        path = config_folder(cfg.model, cfg, temporary)
        reward = [path] if cfg.reward == Config().reward else cfg.reward
        cfg = dataclasses.replace(cfg, policy=path, reward=reward)
        stack.enter_context(mock.patch.multiple(common, **replaced))
        stack.enter_context(mock.patch.object(ppo, "load_scorer", load_scorer))
        models = ppo.load_models(cfg, tokenizer, rows, device)
    return models


# === The rehearsal ================================================================================
def whole_parts(attention_mask, index, size):
    """`common.parts_by_length` where all rows have the full length."""
    for rows in index.split(size):
        yield rows, slice(attention_mask.shape[1])


def first_and_last_step(ledger, parts):
    """`common.generate_responses` without the steps between, none of which takes more."""
    generate, new_cache = common.generate_responses, common.GrowingCache

    def sample(model, prompts, prompt_mask, response_length, temperature):
        training = model.training
        generate(model, prompts, prompt_mask, 1, temperature)
        before = prompts[:, :1].expand(-1, prompts.shape[1] + response_length - 1)
        mask = torch.ones_like(torch.cat([before, before[:, :1]], 1)).bool()
        peak, alive, cache = ledger.peak, ledger.alive, new_cache(config=model.config)
        with common.autocast(model), torch.no_grad():
            inputs = {"input_ids": before, "attention_mask": mask[:, 1:], "logits_to_keep": 1}
            model.eval().forward(**inputs, past_key_values=cache, use_cache=True)
        ledger.peak, parts["key-value cache"] = peak, ledger.alive - alive
        with mock.patch.object(common, "GrowingCache", lambda config: cache):
            generate(model.train(training), before[:, :1], mask, 1, temperature)
        response = prompts[:, :1].repeat(1, response_length)
        return response, response.float()

    return sample


def rehearse(cfg, models, phase):
    """`ppo.rehearse`, which calls `phase` with the name of each phase as it begins."""
    policy, ref_policy, critic, scorers = models
    both = [model for model in (policy, critic) if model is not None]
    trained = [p for model in both for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, eps=1e-5, fused=True)
    run = SimpleNamespace(cfg=cfg, device=SimpleNamespace(type="cuda"), phase=phase)
    rows = [SimpleNamespace(prompt_ids=[3] * cfg.max_prompt_length)]
    with mock.patch.object(torch.random, "fork_rng", lambda **_: contextlib.nullcontext()):
        with mock.patch.object(ppo.report, "measured_peak", phase):
            ppo.rehearse(run, *models, optimizer, rows)
    gradients = sum(p.nbytes for p in trained)
    weights = sum(p.nbytes for p in parameters(models))
    return {"weights": weights, "gradients": gradients, "Adam's moments": 2 * gradients}


def parameters(models):
    """The parameters of all models, each once."""
    *three, scorers = models
    all_models = [model for model in (*three, *(s.model for s in scorers)) if model is not None]
    return {id(p): p for model in all_models for p in model.parameters()}.values()


def computed(cfg, on_cuda=True):
    """(parts, phases): {name: bytes} of what there is, and of the most that each phase takes.

    On tensors without numbers, as it would be on CUDA or else on this CPU.
    """
    forward, ledger, parts = ppo.forward_responses, Ledger(), {}

    def forward_responses(*args, **options):
        before = ledger.alive
        outputs = forward(*args, **options)
        parts["activations"] = ledger.alive - before
        return outputs

    with contextlib.ExitStack() as stack:
        patch = lambda *what: stack.enter_context(mock.patch.object(*what))
        if on_cuda:
            cfg = dataclasses.replace(cfg, dtype=cfg.dtype.replace("auto", "bf16"))
            patch(torch.nn.functional, "scaled_dot_product_attention", attention_on_cuda)
            patch(torch, "pow", pow_on_cuda)
        patch(torch.utils, "swap_tensors", lambda old, new: setattr(old, "data", new))
        patch(common, "parts_by_length", whole_parts)
        patch(common, "generate_responses", first_and_last_step(ledger, parts))
        patch(ppo, "forward_responses", forward_responses)
        stack.enter_context(Fake())
        stack.enter_context(ledger)
        cfg = dataclasses.replace(cfg, device="cpu")
        parts = rehearse(cfg, load_models(cfg), ledger.phase) | parts
    del ledger.phases["loading"]
    return parts, ledger.phases


def measured(cfg, device):
    """The phases of a real rehearsal: {name: bytes}, as torch.cuda counts them; on a CPU, where
    nothing does, as a Ledger of real tensors does.
    """
    phases, now, ledger = {}, None, Ledger()

    def phase(name):
        nonlocal now
        phases[now], now = torch.cuda.max_memory_allocated(device), name
        torch.cuda.reset_peak_memory_stats(device)

    with contextlib.nullcontext() if device.type == "cuda" else ledger:
        models = load_models(dataclasses.replace(cfg, device=str(device)))
        rehearse(cfg, models, phase if device.type == "cuda" else ledger.phase)
    return phases or ledger.phases


# === Command line =================================================================================
def smallest_card(phases):
    """The first of CARDS, in GB, that holds the largest phase; None if none does."""
    return next((card for card in CARDS if max(phases.values()) / 1e9 <= card - ROOM(card)), None)


def show(cfg):
    """What there is, what each phase takes at the most, and the smallest card."""
    parts, phases = computed(cfg)
    for name, size in parts.items():
        print(f"{name:<34}{size / 1e9:>8.2f} GB")
    for name, size in phases.items():
        print(f"at the most, in {name:<18}{size / 1e9:>8.2f} GB")
    card = smallest_card(phases)
    print(f"a card of {card} GB holds it" if card else f"no card of {CARDS[-1]} GB holds it")


def table(cfg):
    """Rows of Markdown: each size, in full and with adapters, plain / --gradient-checkpointing."""
    ways = {
        "everything": {}, "LoRA": {"lora_rank": 16},
        "LoRA, reward a function": {"lora_rank": 16, "reward": ["mine.py:reward"]},
    }
    for model, (way, flags) in itertools.product(list(MODELS)[1:], ways.items()):
        cfgs = [
            dataclasses.replace(cfg, model=model, gradient_checkpointing=checkpointing, **flags)
            for checkpointing in (False, True)
        ]
        both = [(parts | phases, smallest_card(phases)) for parts, phases in map(computed, cfgs)]
        gb = lambda name: dict.fromkeys(f"{sizes[name] / 1e9:.1f}" for sizes, _ in both)
        cells = [" / ".join(gb(name)) for name in COLUMNS]
        cells += [" / ".join(f"{card or 'none'}" for _, card in both)]
        print(f"| {model} | {way} | {' | '.join(cells)} |", flush=True)


def check(cfg):
    """Computed and measured, side by side."""
    device = cli.pick_device(cfg.device)
    _, ours = computed(cfg, on_cuda=device.type == "cuda")
    theirs = measured(cfg, device)
    print(f"{'MB':<20}{'computed':>10}{'measured':>10}")
    for name, size in ours.items():
        share = size / theirs[name] - 1
        print(f"{name:<20}{size / 1e6:>10.1f}{theirs[name] / 1e6:>10.1f}{share:>+9.1%}")


def main(argv):
    with cli.command_line():
        cfg = cli.parse_args(Config, __doc__.splitlines()[0], argv)
        ppo.check_config(cfg)
        (check if cfg.check else table if cfg.table else show)(cfg)


if __name__ == "__main__":
    main(sys.argv[1:])
