"""Stage 1 of RLHF, supervised fine-tuning: a language model learns to answer prompts by imitating demonstrations.

Goal      minimise  E_{(x, y) ~ demonstrations}[ -log pi(y | x) ]

(1) loss        L = - mean over the batch's completion tokens of  log pi(y_t | x, y_<t)

          The sum over completion tokens, EOS among them, is divided once by their number in the batch, whatever the
          micro-batches are. Prompt tokens are read and never predicted: the policy is to answer, not to ask.

Shapes    B rows, T tokens of prompt and completion (padded on the right), V vocabulary.
Time      logits[:, i] are the model's opinion of token i + 1; the loss shifts once, in `completion_nll`.
Mask      completion_mask is True where a token is imitated: the completion and the EOS that ends it.
EOS       The EOS is learned like any other token. A policy that never learns to stop is PPO's most common bad start.

Differs   Rows that are too long are dropped and counted, not cut: a text cut in the middle teaches never to end.
          TRL averages the micro-batches' means by default flags of its own; here the denominator is the batch's.

Settings for a model of about 1 B parameters to start from: lr 3e-6, one epoch, batches of 128, cosine decay
(Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO", TL;DR summarisation with Pythia 1B).

Run       python sft.py                                             a tiny model, from scratch, on data/
          python sft.py --model Qwen/Qwen2.5-0.5B --data mine.jsonl   {"prompt": ..., "completion": ...} per line
Writes    ckpt/sft, an ordinary Hugging Face folder
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup, set_seed

import common
from common import arg


# === 0. Configuration =============================================================================
@dataclass(frozen=True)
class Config:
    model: str | None = arg(None, "causal LM folder or hub id; without it a tiny Llama is trained from scratch", "model and data")
    data: str = arg(str(common.DATA / "demonstrations.jsonl"), "demonstrations, JSONL rows of prompt and completion, or of text")
    eval_data: str | None = arg(None, "held-out demonstrations; without it a tenth of --data, at most 512 rows")
    output: str = arg("ckpt/sft", "folder for the trained model")
    max_prompt_length: int = arg(512, "longest prompt in tokens; rows above it are dropped and counted")
    response_length: int = arg(512, "longest completion in tokens, EOS included; rows above it are dropped and counted")

    epochs: int = arg(4, "passes over the data; 1 to 3 for a pretrained model", "optimisation")
    batch_size: int = arg(16, "sequences per optimizer step")
    microbatch_size: int = arg(16, "sequences per forward pass; changes memory, not the gradient")
    lr: float | None = arg(None, "peak learning rate; without it 3e-3 below 10 M parameters, 1e-5 below 1 B, 3e-6 above")
    warmup: float = arg(0.05, "share of the steps in which the learning rate rises from 0; then it follows a cosine to 0")
    weight_decay: float = arg(0.0, "AdamW's decoupled weight decay; 0 to 0.1")
    max_grad_norm: float = arg(1.0, "gradient clipping, by the norm over all parameters")

    seed: int = arg(0, "seed of weights, data order and samples", "run")
    device: str = arg("auto", "cpu, cuda, cuda:1; auto takes a GPU if there is one")
    dtype: Literal["auto", "float32", "bf16"] = arg("auto", "arithmetic of the matrix products; weights are float32; auto is bf16 on CUDA")
    gradient_checkpointing: bool = arg(False, "recompute activations in the backward pass: less memory, a third slower")


LR_BY_SIZE = ((10e6, 3e-3), (1e9, 1e-5), (float("inf"), 3e-6))  # (parameters below, learning rate)


def check_config(cfg):
    """Every rule about the flags that needs no model."""
    many = (1, float("inf"))
    common.check_range(
        cfg, max_prompt_length=many, response_length=many, epochs=many, batch_size=many,
        microbatch_size=(1, cfg.batch_size), lr=(0, 1), warmup=(0, 1), weight_decay=(0, 1),
        max_grad_norm=(1e-9, math.inf),
    )  # fmt: skip


# === 1. Model: from a folder, or tiny and from scratch ============================================
def train_tokenizer(texts, vocab_size=1024):
    """A byte-level byte-pair tokenizer learned from `texts`. Bytes are its alphabet, so it has no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|pad|>", "<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")


def tiny_llama(tokenizer):
    """A Llama with random weights, under a million parameters: enough for the embedded world, seconds on a laptop."""
    width = 96
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=width**-0.5,  # the usual 0.02 is for widths of thousands; here it halves the speed of learning
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    common.set_generation_defaults(model, tokenizer)
    return model


# === 2. Data ======================================================================================
# FORK: other data formats become a prompt and a completion here.
def row_texts(row):
    """(prompt, completion) of a data row; a row of plain text is a completion of nothing."""
    return (row["prompt"], row["completion"]) if "completion" in row else ("", row["text"])


def encode_rows(rows, tokenizer, cfg, source):
    """Rows as [(prompt ids, completion ids ending in EOS)], without those that are too long."""
    examples = []
    for prompt, completion in map(row_texts, rows):
        examples.append((common.encode_prompt(tokenizer, prompt), common.encode_response(tokenizer, completion)))
    fits = lambda x, y: len(x) <= cfg.max_prompt_length and len(y) <= cfg.response_length
    kept = [example for example in examples if fits(*example)]
    common.report_dropped(len(examples) - len(kept), len(examples), source)
    return kept


def collate(examples, pad_id):
    """Examples as tokens, attention_mask, completion_mask, each (B, T), padded on the right."""
    tokens, attention_mask = common.pad([prompt + completion for prompt, completion in examples], pad_id, "right")
    prompt_lengths = torch.tensor([[len(prompt)] for prompt, _ in examples])  # (B, 1)
    completion_mask = attention_mask & (torch.arange(tokens.shape[1]) >= prompt_lengths)
    return tokens, attention_mask, completion_mask


# === 3. Loss: eq. 1 ===============================================================================
def completion_nll(model, tokens, attention_mask, completion_mask):
    """Sum over completion tokens of -log pi(y_t | x, y_<t): a scalar in nats, not yet divided by their number."""
    logits = model(
        input_ids=tokens, attention_mask=attention_mask, position_ids=common.position_ids(attention_mask), use_cache=False
    ).logits  # (B, T, V)
    # Position i scores token i + 1, so the logits lose their last column and tokens and mask their first.
    predicted = completion_mask[:, 1:]
    return F.cross_entropy(logits[:, :-1][predicted].float(), tokens[:, 1:][predicted], reduction="sum")  # eq. 1


@torch.no_grad()
def evaluate(model, examples, microbatch_size, pad_id, device, dtype):
    """Mean negative log-likelihood per completion token of held-out examples, in nats; its exp is the perplexity."""
    total, num_tokens = 0.0, 0
    for start in range(0, len(examples), microbatch_size):
        batch = [x.to(device) for x in collate(examples[start : start + microbatch_size], pad_id)]
        with common.arithmetic(device, dtype):
            total += completion_nll(model, *batch).item()
        num_tokens += batch[2][:, 1:].sum().item()
    return total / num_tokens


def print_samples(model, tokenizer, prompts, device, cfg):
    """What the model now answers to a few held-out prompts."""
    tokens, mask = (x.to(device) for x in common.pad(prompts, tokenizer.pad_token_id, "left"))
    with common.arithmetic(device, cfg.dtype):
        responses = common.generate_responses(model, tokens, mask, min(cfg.response_length, 64), temperature=1.0)
    for prompt, response in zip(prompts, responses):
        print(f"  {tokenizer.decode(prompt, skip_special_tokens=True)}")
        print(f"    ->{tokenizer.decode(response, skip_special_tokens=True)}\n")


# === Main loop ====================================================================================
def main(cfg):
    check_config(cfg)
    set_seed(cfg.seed)
    device = common.pick_device(cfg.device)
    common.prepare_output(cfg.output)

    # -- setup: data, tokenizer, model, optimizer
    formats = [("prompt", "completion"), ("text",)]
    rows = common.read_rows(cfg.data, formats)
    if cfg.eval_data:
        eval_rows = common.read_rows(cfg.eval_data, formats)
    else:
        rows, eval_rows = common.hold_out(rows, 512, cfg.seed)
    if cfg.model:
        tokenizer = common.load_tokenizer(cfg.model)
        model = common.load_causal_lm(cfg.model, tokenizer)
    else:
        tokenizer = train_tokenizer([text for row in rows for text in row_texts(row)])
        model = tiny_llama(tokenizer)
    model.to(device)
    examples = encode_rows(rows, tokenizer, cfg, cfg.data)
    eval_examples = encode_rows(eval_rows, tokenizer, cfg, cfg.eval_data or f"the held-out part of {cfg.data}")
    common.check_context(model, max(len(x) + len(y) for x, y in examples + eval_examples), "--response-length")
    if cfg.gradient_checkpointing:
        common.enable_gradient_checkpointing(model)
    num_steps = cfg.epochs * math.ceil(len(examples) / cfg.batch_size)
    lr = common.by_size(cfg.lr, LR_BY_SIZE, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=cfg.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(cfg.warmup * num_steps), num_steps)
    generator = torch.Generator().manual_seed(cfg.seed)

    # -- startup report
    print(common.describe("policy", model, trained=True))
    print(f"  {len(examples)} demonstrations, {len(eval_examples)} held out; {cfg.epochs} epochs of {cfg.batch_size} per "
          f"optimizer step = {num_steps} steps; lr {lr:g}" + ("" if cfg.lr else " (by model size; --lr sets it)"))  # fmt: skip
    common.print_tokens(tokenizer, model, *examples[0])
    loss_before = evaluate(model, eval_examples, cfg.microbatch_size, tokenizer.pad_token_id, device, cfg.dtype)

    log = []
    lengths = [len(prompt) + len(completion) for prompt, completion in examples]
    progress = tqdm(total=num_steps, desc="sft", unit="step")
    for _ in range(cfg.epochs):
        for rows in common.length_bucketed(lengths, cfg.batch_size, generator):
            num_tokens = sum(len(examples[row][1]) for row in rows)  # the one denominator of this step
            loss = 0.0
            for start in range(0, len(rows), cfg.microbatch_size):  # same gradient at any size, less memory
                micro = collate([examples[row] for row in rows[start : start + cfg.microbatch_size]], tokenizer.pad_token_id)
                with common.arithmetic(device, cfg.dtype):
                    micro_loss = completion_nll(model, *(x.to(device) for x in micro)) / num_tokens
                micro_loss.backward()
                loss += micro_loss.item()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

            log.append(
                {
                    "iteration": len(log) + 1,
                    "loss": loss,  # nats per completion token; falls fast, then slowly
                    "grad_norm": grad_norm.item(),  # before clipping; rarely above 10
                    "lr": schedule.get_last_lr()[0],
                }
            )
            progress.set_postfix(loss=f"{loss:.3f}")
            progress.update()
    progress.close()

    # -- held-out result, samples, checkpoint
    loss_after = evaluate(model, eval_examples, cfg.microbatch_size, tokenizer.pad_token_id, device, cfg.dtype)
    log.append({"split": "eval", "iteration": num_steps, "loss_before": loss_before, "loss": loss_after})
    with common.written_whole(cfg.output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for row in log:
            common.append_json_line(folder / "metrics.jsonl", row)
    print(f"\nheld-out loss {loss_before:.3f} -> {loss_after:.3f} nats per token, "
          f"perplexity {math.exp(loss_before):.2f} -> {math.exp(loss_after):.2f}\n")  # fmt: skip
    print_samples(model, tokenizer, [prompt for prompt, _ in eval_examples[:4]], device, cfg)
    print(f"wrote {cfg.output}; next: python reward_model.py --model {cfg.output}")


if __name__ == "__main__":
    with common.command_line():
        main(common.parse_args(Config, __doc__.splitlines()[0]))
