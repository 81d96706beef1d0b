"""Stage 1 of RLHF, supervised fine-tuning: a language model learns to answer by imitation.

Goal      maximise  E_{(x, y) ~ demonstrations}[ log pi(y | x) ]

(1) loss  L = - mean over the batch's completion tokens of  log pi(y_t | x, y_<t)

Shapes    B rows, T tokens of prompt and completion (padded on the right), V vocabulary.
Time      logits[:, i] is the distribution of token i + 1. The loss shifts once, in completion_nll.
Mask      completion_mask is True where a token is imitated: the completion and its EOS.
          Prompt tokens are read and never predicted: the policy is to answer, not to ask.
Chats     Message lists go through the tokenizer's chat template. Each turn of the assistant is one
          example; the chat before it is its prompt, up to the words that open the turn.
EOS       It is learned like any other token. A policy that never learned to stop is the most common
          bad start for PPO: its responses are cut, and the scores of cut texts mean little.

Differs   The sum over a batch's tokens is divided once, by their number in the whole batch, so
          that micro-batches change no gradient; a mean of their means would. Batches hold rows of
          like length to save padding, so a token of a short text still weighs more over an epoch.
          An example that is too long is dropped and counted: cut texts teach never to end.

Sources   Ouyang et al. 2022 (InstructGPT); Huang et al. 2024, "The N+ Implementation Details of
          RLHF with PPO". The last one's settings for TL;DR summaries with 1 B parameters are a
          start for a model of that size: --lr 3e-6 --epochs 1 --batch-size 128, cosine decay.

Run       python sft.py                                            a tiny model from scratch, data/
          python sft.py --model Qwen/Qwen2.5-0.5B --data mine.jsonl --epochs 1
Data      {"prompt": str, "completion": str}, {"messages": [...]} or {"text": str}, one row a line
Writes    ckpt/sft: the policy as a Hugging Face folder, args.json and metrics.jsonl; until the run
          is finished also trainer_state/ (for --resume)
"""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import get_cosine_schedule_with_warmup, set_seed

import common
from common import arg


# === 0. Configuration =============================================================================
# An optimizer step takes --batch-size rows; --microbatch-size of them are in memory at a time.
@dataclass(frozen=True)
class Config:
    model: str | None = arg(None, "causal LM; else a tiny Llama from scratch", "model and data")
    data: list[str] = arg([str(common.DATA / "demonstrations.jsonl")], "JSONL; see the README")
    eval_data: list[str] | None = arg(None, "held-out rows; else a tenth of --data, at most 512")
    output: str = arg("ckpt/sft", "folder for the trained policy")
    max_prompt_length: int = arg(512, "in tokens; rows above are dropped and counted")
    response_length: int = arg(512, "in tokens, EOS included; rows above are dropped and counted")

    epochs: int = arg(4, "passes over the data; 1 to 3 for a pretrained model", "optimisation")
    batch_size: int = arg(16, "sequences per optimizer step")
    microbatch_size: int = arg(16, "sequences per forward pass; memory only, same gradient")
    lr: float | None = arg(None, "peak learning rate; by size if not given, see LR_BY_SIZE")
    warmup: float = arg(0.05, "share of the steps in which lr rises from 0; then a cosine to 0")
    weight_decay: float = arg(0.0, "of AdamW; 0 to 0.1")
    max_grad_norm: float = arg(1.0, "clip the gradient to this norm")

    save_every: int = arg(500, "optimizer steps between checkpoints", "run")
    resume: bool = arg(False, "go on with the run in --output, if there is one")
    overwrite: bool = arg(False, "start anew although --output holds a run")
    tensorboard: bool = arg(False, "write the metrics for TensorBoard too, if it is installed")
    seed: int = arg(0, "of weights, data order and samples")
    device: str = arg("auto", "cpu, cuda, cuda:1; auto is a GPU if there is one")
    dtype: Literal["auto", "float32", "bf16"] = arg("auto", "of matrix products; bf16 on CUDA")
    gradient_checkpointing: bool = arg(False, "recompute activations: less memory, more time")
    trust_remote_code: bool = arg(False, "run code that comes with --model")


# Learning rates by number of parameters: what a tiny model learns from, a large one forgets from.
LR_BY_SIZE = ((10e6, 3e-3), (1e9, 1e-5), (math.inf, 3e-6))  # (parameters below, learning rate)


def check_config(cfg):
    """Every rule about the flags that needs no model."""
    many = (1, math.inf)
    common.check_range(
        cfg, max_prompt_length=many, response_length=many, epochs=many, batch_size=many,
        microbatch_size=many, lr=(0, 1), warmup=(0, 1), weight_decay=(0, 1),
        max_grad_norm=(1e-9, math.inf), save_every=many,
    )
    if cfg.tensorboard:
        common.import_tensorboard()


# Where memory may run out: {function: (what it does, the flag to halve)}
MEMORY_FLAGS = {
    "main": ("the update", "--microbatch-size"), "evaluate": ("evaluation", "--microbatch-size")
}


# === 1. Model: from a folder, or tiny and from scratch ============================================
def train_tokenizer(texts, vocab_size=1024):
    """A byte-pair tokenizer learned from `texts`; its alphabet is bytes, so nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|pad|>", "<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = {"pad_token": "<|pad|>", "eos_token": "<|end|>"}  # pad is not EOS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_llama(tokenizer, width=96):
    """A Llama of 0.3 million random weights, enough for the embedded world.

    Weights start at deviation 1/sqrt(width). The usual 0.02 is made for widths of thousands; with
    it, this model needs far more steps to learn to copy the animals' names from the prompt.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=width**-0.5, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    common.set_generation_defaults(model, tokenizer)
    return model


# === 2. Data ======================================================================================
# FORK: other data formats become prompts and completions here.
def row_dialogues(row):
    """[(prompt, completion)] of a data row, as `common.encode` takes them.

    A text is a completion without a prompt. A chat gives one example for each of the assistant's
    turns (of "messages") or for each in the completion: the prompt is the chat up to there.
    """
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) or isinstance(completion, str):
            return [(prompt, completion)]
    elif "messages" in row:
        prompt, completion = [], row["messages"]
    else:
        return [("", row["text"])]
    chat = prompt + completion
    first = max(len(prompt), 1)  # an opening by the assistant answers nothing
    roles = [message["role"] for message in chat]
    turns = [i for i in range(first, len(chat)) if roles[i] == "assistant" != roles[i - 1]]
    if not turns:
        raise ValueError("has a chat without a message of the assistant that answers something")
    return [(chat[:i], chat[i : i + 1]) for i in turns]


def encode_row(row, tokenizer, eos_ids, cfg):
    """Each (prompt ids, completion ids with EOS) of a row, or why there is none."""
    for prompt, completion in row_dialogues(row):
        prompt_ids, completion_ids = common.encode(tokenizer, prompt, completion, eos_ids)
        if len(prompt_ids) + len(completion_ids) == 1:
            yield "empty"  # a lone EOS follows nothing
        else:
            reason = common.too_long(cfg, prompt_ids, completion_ids)
            yield reason or (prompt_ids, completion_ids)


def collate(examples, pad_id):
    """Examples as tokens int64, attention_mask bool, completion_mask bool, each (B, T)."""
    sequences = [prompt_ids + completion_ids for prompt_ids, completion_ids in examples]
    tokens, attention_mask = common.pad(sequences, pad_id, "right")
    prompt_lengths = torch.tensor([[len(prompt_ids)] for prompt_ids, _ in examples])  # (B, 1)
    completion_mask = attention_mask & (torch.arange(tokens.shape[1]) >= prompt_lengths)
    completion_mask[:, 0] = False  # nothing comes before the first token, so nothing predicts it
    return tokens, attention_mask, completion_mask


# === 3. Loss: eq. 1 ===============================================================================
def completion_nll(model, tokens, attention_mask, completion_mask):
    """Sum over completion tokens of -log pi(y_t | x, y_<t), a scalar in nats.

    A sum and not a mean: micro-batches of one step add up, and the step divides once.
    """
    logits = model(
        input_ids=tokens, attention_mask=attention_mask, use_cache=False,
        position_ids=common.position_ids(attention_mask),
    ).logits  # (B, T, V)
    # Position i predicts token i + 1: drop the last column of the logits and the first of the rest.
    is_target = completion_mask[:, 1:]
    predictions, targets = logits[:, :-1][is_target], tokens[:, 1:][is_target]  # (N, V), (N,)
    return F.cross_entropy(predictions.float(), targets, reduction="sum")  # eq. 1


# === 4. Held-out evaluation =======================================================================
@torch.no_grad()
def evaluate(model, examples, cfg, pad_id, device):
    """Mean loss per completion token of held-out examples, in nats; its exp is the perplexity."""
    total_nll, num_tokens = 0.0, 0
    examples = sorted(examples, key=lambda example: len(example[0]) + len(example[1]))
    for start in range(0, len(examples), cfg.microbatch_size):
        batch = collate(examples[start : start + cfg.microbatch_size], pad_id)
        with common.arithmetic(device, cfg.dtype):
            total_nll += completion_nll(model, *(x.to(device) for x in batch)).item()
        num_tokens += batch[2].sum().item()
    return total_nll / num_tokens


def print_samples(model, tokenizer, examples, cfg, device):
    """What the policy now answers to a few held-out prompts."""
    prompts = [prompt_ids for prompt_ids, _ in examples if prompt_ids][:4]
    if not prompts:  # plain text on a tokenizer without BOS: nothing to start from
        return
    tokens, mask = (x.to(device) for x in common.pad(prompts, tokenizer.pad_token_id, "left"))
    fits = max(len(x) + len(y) for x, y in examples)  # the model may have no positions beyond
    with common.arithmetic(device, cfg.dtype):
        length = min(64, fits - tokens.shape[1])
        responses = common.generate_responses(model, tokens, mask, length, temperature=1.0)
    for prompt_ids, response in zip(prompts, responses):
        print(f"\n  {tokenizer.decode(prompt_ids, skip_special_tokens=True)}")
        print(f"    ->{tokenizer.decode(response, skip_special_tokens=True)}")


# === Main loop ====================================================================================
def load_data(cfg):
    """(training rows, held-out rows)."""
    formats = [("prompt", "completion"), ("messages",), ("text",)]
    rows = common.read_rows(cfg.data, formats)
    if cfg.eval_data is not None:
        return rows, common.read_rows(cfg.eval_data, formats)
    return common.hold_out(rows, 512, cfg.seed, "--eval-data")


def main(cfg):
    check_config(cfg)
    set_seed(cfg.seed)
    device = common.pick_device(cfg.device)
    state = common.open_run(cfg)

    # -- setup: data, tokenizer, model, optimizer
    rows, eval_rows = load_data(cfg)
    source = cfg.output if state else cfg.model
    if source is not None:
        trust = cfg.trust_remote_code
        tokenizer = common.load_tokenizer(source, trust_remote_code=trust)
        model = common.load_causal_lm(source, tokenizer, trust_remote_code=trust)
    else:
        texts = [row[key] for row in rows for key in ("prompt", "completion", "text") if key in row]
        tokenizer = train_tokenizer([text for text in texts if isinstance(text, str)])
        model = tiny_llama(tokenizer)
    pad_id, eos_ids = tokenizer.pad_token_id, model.generation_config.eos_token_id
    encode = lambda row: encode_row(row, tokenizer, eos_ids, cfg)
    examples = common.convert_rows(rows, encode, " ".join(cfg.data))
    eval_examples = common.convert_rows(eval_rows, encode, "held out")
    lengths = [len(prompt_ids) + len(completion_ids) for prompt_ids, completion_ids in examples]
    longest = max(len(x) + len(y) for x, y in examples + eval_examples)
    common.check_context(model, longest, "--max-prompt-length or --response-length")
    model.to(device)
    if cfg.gradient_checkpointing:
        common.enable_gradient_checkpointing(model)
    num_steps = cfg.epochs * math.ceil(len(examples) / cfg.batch_size)
    lr = common.by_size(cfg.lr, LR_BY_SIZE, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=cfg.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(cfg.warmup * num_steps), num_steps)
    generator = torch.Generator().manual_seed(cfg.seed)

    # -- start-up report
    print(common.describe("policy", model, trained=True))
    print(
        f"  {len(examples)} demonstrations, {len(eval_examples)} held out; {cfg.epochs} epochs x "
        f"{math.ceil(len(examples) / cfg.batch_size)} batches of {cfg.batch_size} = {num_steps} "
        f"optimizer steps\n  peak lr {lr:g} (by model size, unless --lr is given)"
    )
    common.print_tokens(tokenizer, model, *examples[0])

    if state:
        common.restore(state, len(examples), optimizer, schedule)
    steps_done = state["steps_done"] if state else 0
    loss_before = state["loss_before"] if state else evaluate(
        model, eval_examples, cfg, pad_id, device
    )
    log = common.open_log(common.start_logs(cfg, state), cfg.tensorboard)
    stop, skipped = common.StopRequest(), common.SkippedSteps()
    batches = common.endless_epochs(lengths, cfg.batch_size, generator)
    batches = itertools.islice(batches, steps_done, num_steps)  # a resumed run repeats the draws
    progress = tqdm(batches, desc="sft", unit="step", initial=steps_done, total=num_steps)
    for step, rows in enumerate(progress, steps_done + 1):
        batch = [examples[row] for row in rows]
        num_tokens = collate(batch, pad_id)[2].sum().item()  # the one denominator of this step
        loss = 0.0
        for start in range(0, len(batch), cfg.microbatch_size):  # same gradient, less memory
            micro = collate(batch[start : start + cfg.microbatch_size], pad_id)
            with common.arithmetic(device, cfg.dtype):
                nll = completion_nll(model, *(x.to(device) for x in micro))
            (nll / num_tokens).backward()
            loss += nll.item() / num_tokens
        grad_norm = clip_grad_norm_(model.parameters(), cfg.max_grad_norm).item()
        if skipped.may_step([grad_norm], f"up to step {step}, where the loss is {loss:.3g}"):
            optimizer.step()
        lr = schedule.get_last_lr()[0]
        schedule.step()
        optimizer.zero_grad()

        row = {
            "iteration": step,
            "loss": loss,  # nats per token; falls fast, then slowly
            "grad_norm": grad_norm,  # before clipping; steady after the warm-up
            "lr": lr,
        }
        log(row)
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if stop.signal or step % cfg.save_every == 0 or step == num_steps:
            more = {"steps_done": step, "loss_before": loss_before}
            with common.saved_run(cfg, len(examples), optimizer, schedule, **more) as folder:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
            if stop.signal:
                progress.close()
                stop.leave(cfg)
    stop.close()

    # -- held-out result, checkpoint, samples
    loss_after = evaluate(model, eval_examples, cfg, pad_id, device)
    before_after = {"loss_before": loss_before, "loss": loss_after}
    log({"split": "eval", "iteration": num_steps} | before_after)
    with common.saved_run(cfg) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(
        f"\nheld-out loss {loss_before:.3f} -> {loss_after:.3f} nats per token, perplexity "
        f"{math.exp(loss_before):.2f} -> {math.exp(loss_after):.2f}; samples:"
    )
    print_samples(model, tokenizer, eval_examples, cfg, device)
    data = "" if cfg.data == Config().data else " --data YOUR_PAIRS.jsonl"
    print(f"\nwrote {cfg.output}; next: python reward_model.py --model {cfg.output}{data}")


if __name__ == "__main__":
    with common.command_line(MEMORY_FLAGS):
        main(common.parse_args(Config, __doc__.splitlines()[0]))
