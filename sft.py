"""Stage 1 of RLHF, supervised fine-tuning: a language model learns to answer by imitation.

Goal      maximise  E_{(x, y) ~ demonstrations}[ log pi(y | x) ]

(1) loss  L = - mean over the batch's completion tokens of  log pi(y_t | x, y_<t)

Shapes    B rows, T tokens of prompt and completion (padded on the right), N that are imitated.
Time      logits[:, i] is the distribution of token i + 1. The loss shifts once, in completion_nll.
Mask      completion_mask is True where a token is imitated: the completion and its EOS.
          Prompt tokens are read and never predicted: the policy is to answer, not to ask.
Processes With torchrun each one takes its share of a batch's rows; gradients and losses are summed
          before the step, which is then the same on all.
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
          is finished also trainer_state/ (for --resume); with --lora-rank adapter/ too
"""

import plumbing  # first: Ctrl-C while torch loads is no traceback

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

import common
from common import UserError
from data import tiny_model
from plumbing import adapters, cli, processes, report
from plumbing.cli import DATA, RunConfig, arg
from plumbing.rows import convert, read_and_hold_out, too_long
from plumbing.runs import Run, adamw_with_cosine


# === 0. Configuration =============================================================================
# An optimizer step takes --batch-size rows; --microbatch-size of them are in memory at a time.
@dataclass(frozen=True)
class Config(RunConfig):  # the flags that all stages share are in plumbing/cli.py
    output: str = arg("ckpt/sft", "folder for the trained policy and the logs", heading="run")

    model: str | None = arg(None, "causal LM; else a tiny Llama from scratch", heading="data")
    data: list[str] = arg([str(DATA / "demonstrations.jsonl")], "JSONL; see the README")
    eval_data: list[str] | None = arg(None, "held-out rows; else a tenth of --data, at most 512")
    max_prompt_length: int = arg(512, "in tokens; rows above are dropped and counted", 1)
    response_length: int = arg(512, "in tokens, EOS included; rows above are dropped too", 1)

    epochs: int = arg(4, "passes over the data; 1 to 3 if pretrained", 1, heading="optimisation")
    batch_size: int = arg(16, "sequences per optimizer step", 1)
    microbatch_size: int = arg(16, "sequences per forward pass; memory only, same gradient", 1)
    lr: float | None = arg(None, "peak learning rate; else by size, see LR_BY_SIZE", 0, 1)
    warmup: float = arg(0.05, "share of steps in which lr rises from 0; then a cosine to 0", 0, 1)
    weight_decay: float = arg(0.0, "of AdamW; 0 to 0.1", 0, 1)
    max_grad_norm: float = arg(1.0, "clip the gradient to this norm", 1e-9)


# Learning rates by number of parameters: what a tiny model learns from, a large one forgets from.
LR_BY_SIZE = ((10e6, 3e-3), (1e9, 1e-5), (math.inf, 3e-6))  # (parameters below, learning rate)
FORMATS = [("prompt", "completion"), ("messages",), ("text",)]  # the keys of a row


# === 1. Data: rows to prompts and completions, to ids, to tensors =================================
# FORK: other demonstrations become prompts and completions here.
def row_dialogues(row):
    """[(prompt, completion)] of a data row, as `common.encode` takes them.

    A text is a completion without a prompt. A chat gives one example for each of the assistant's
    turns (of "messages") or for each in the completion: the prompt is the chat up to there.
    """
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]  # strings or chats
        if isinstance(prompt, str) or isinstance(completion, str):
            return [(prompt, completion)]
    elif "messages" in row:
        prompt, completion = [], row["messages"]  # every answer in it is imitated
    else:
        return [("", row["text"])]  # all of it is imitated
    chat = prompt + completion
    first = max(len(prompt), 1)  # an opening by the assistant answers nothing
    roles = [message["role"] for message in chat]
    turns = [i for i in range(first, len(chat)) if roles[i] == "assistant" != roles[i - 1]]
    if not turns:
        raise ValueError("has a chat without a message of the assistant that answers something")
    if len(turns) < roles[len(prompt) :].count("assistant"):
        common.notes["with a message of the assistant that answers nothing and is not learned"] += 1
    return [(chat[:i], chat[i : i + 1]) for i in turns if is_learned(chat[i])]


def is_learned(message):
    """Not if it is marked as context alone: "weight": 0 in OpenAI's format, "train": false."""
    marks = {key: message[key] for key in ("weight", "train") if message.get(key) is not None}
    for key, mark in marks.items():
        if mark not in (0, 1):  # as which false and true count
            raise ValueError(f"has a message with {mark!r} under {key!r}; only 0 and 1 are read")
    return all(marks.values())


def encode_row(row, tokenizer, eos_ids, cfg):
    """Each (prompt ids, completion ids with EOS) of a row, or why there is none."""
    dialogues, tools = row_dialogues(row), row.get("tools")
    if not dialogues:
        yield "marked not to be learned"
    for prompt, completion in dialogues:
        prompt_ids, completion_ids = common.encode(tokenizer, prompt, completion, eos_ids, tools)
        if len(prompt_ids) + len(completion_ids) == 1:
            yield "empty"  # a lone EOS follows nothing
        else:
            reason = too_long(cfg, prompt_ids, completion_ids)
            yield reason or (prompt_ids, completion_ids)  # two lists of int


def collate(examples, pad_id):
    """Examples as tokens int64, attention_mask bool, completion_mask bool, each (B, T)."""
    sequences = [prompt_ids + completion_ids for prompt_ids, completion_ids in examples]
    tokens, attention_mask = common.pad(sequences, pad_id, "right")  # (B, T)
    prompt_lengths = torch.tensor([[len(prompt_ids)] for prompt_ids, _ in examples])  # (B, 1)
    completion_mask = attention_mask & (torch.arange(tokens.shape[1]) >= prompt_lengths)  # (B, T)
    completion_mask[:, 0] = False  # nothing comes before the first token, so nothing predicts it
    return tokens, attention_mask, completion_mask


# === 2. Loss: eq. 1 ===============================================================================
def completion_nll(model, tokens, attention_mask, completion_mask):
    """Sum over completion tokens of -log pi(y_t | x, y_<t), a scalar in nats.

    A sum and not a mean: micro-batches of one step add up, and the step divides once.
    """
    logits = common.forward(model, tokens, attention_mask).logits  # (B, T, vocabulary)
    # Position i predicts token i + 1: drop the last column of the logits and the first of the rest.
    is_target = completion_mask[:, 1:]  # (B, T-1)
    predictions, targets = logits[:, :-1][is_target], tokens[:, 1:][is_target]  # of N tokens
    return F.cross_entropy(predictions.float(), targets, reduction="sum")  # eq. 1


# === 3. Held-out evaluation =======================================================================
@torch.no_grad()
def evaluate(model, examples, microbatch_size, pad_id):
    """Mean loss per completion token of held-out examples, in nats; its exp is the perplexity."""
    total_nll, num_tokens = 0.0, 0  # sums over all, divided once
    examples = sorted(examples, key=lambda example: len(sum(example, [])))  # little padding
    examples = common.share(examples)  # of several processes each has its own
    for start in range(0, len(examples), microbatch_size):
        batch = collate(examples[start : start + microbatch_size], pad_id)
        total_nll += completion_nll(model, *(x.to(model.device) for x in batch)).item()
        num_tokens += batch[2].sum().item()  # True in completion_mask
    sums = processes.add_up([], {"nll": total_nll, "tokens": num_tokens})
    return sums["nll"] / sums["tokens"]


# === Main loop ====================================================================================
def load_model(cfg, source, rows):
    """(model, tokenizer) of a checkpoint or --model; if there is none, tiny and from scratch."""
    trust, source = cfg.trust_remote_code, source or cfg.model
    if source is not None:
        tokenizer = common.load_tokenizer(source, **cfg.of_tokenizer)
        base = source if cfg.lora_rank is None else cfg.model  # adapters are put onto their base
        return common.load_causal_lm(base, tokenizer, trust_remote_code=trust), tokenizer
    texts = [row[key] for row in rows for key in ("prompt", "completion", "text") if key in row]
    tokenizer = tiny_model.train_tokenizer([text for text in texts if isinstance(text, str)])
    if cfg.chat_template_kwargs is not None:
        common.set_template_kwargs(tokenizer, cfg.chat_template_kwargs)  # it has no template
    model = tiny_model.tiny_llama(tokenizer)
    common.set_generation_defaults(model, tokenizer)
    return model, tokenizer


def main(cfg):
    cli.check_ranges(cfg)
    if cfg.lora_rank is not None and cfg.model is None:
        raise UserError("--lora-rank adapts a --model; one from scratch has nothing to adapt")
    run = Run(cfg)  # seeds, takes --output, finds what --resume goes on from

    # -- setup: data, tokenizer, model, optimizer
    rows, eval_rows = read_and_hold_out(cfg, FORMATS, most=512)
    model, tokenizer = load_model(cfg, run.source, rows)  # float32, no dropout
    adapters.add(model, cfg.lora_rank, cfg.model)
    pad_id, eos_ids = tokenizer.pad_token_id, model.generation_config.eos_token_id
    encode = lambda row: encode_row(row, tokenizer, eos_ids, cfg)
    examples = convert(rows, encode)
    eval_examples = convert(eval_rows, encode, "held out")  # says what was dropped, and why
    lengths = [len(x) + len(y) for x, y in examples]  # in tokens
    common.check_context(model, max(len(x) + len(y) for x, y in examples + eval_examples))
    common.place(model, run.device, cfg.dtype, cfg.gradient_checkpointing)  # and its precision
    num_steps = cfg.epochs * math.ceil(len(examples) / cfg.batch_size)  # the last may be smaller
    optimizer, schedule = adamw_with_cosine(cfg, model, LR_BY_SIZE, num_steps)
    sizes = len(examples), len(eval_examples)
    report.supervised_start(cfg, "policy", model, "demonstrations", *sizes, optimizer)
    report.print_tokens(tokenizer, model, *examples[0])

    # -- the start
    run.restore(tokenizer, {"policy": model}, optimizer, schedule)
    look = lambda: evaluate(model, eval_examples, cfg.microbatch_size, pad_id)
    loss_before = run.kept["loss_before"] if run.done else look()
    run.start()  # nothing is written before
    generator = torch.Generator().manual_seed(cfg.seed)  # its own: --resume draws the same again
    batches = common.epochs_by_length(lengths, cfg.batch_size, generator)
    for step, index in run.steps(batches, num_steps):
        run.phase("backward")
        batch = [examples[i] for i in index]  # of like length
        num_tokens = collate(batch, pad_id)[2].sum().item()  # the one denominator of this step
        loss, mine = 0.0, common.share(batch)  # under torchrun a part, else all of it
        # The gradient is that of the whole batch, however small the parts that are in memory.
        for start in range(0, len(mine), cfg.microbatch_size):
            micro = collate(mine[start : start + cfg.microbatch_size], pad_id)
            nll = completion_nll(model, *(x.to(run.device) for x in micro))  # a sum, in nats
            (nll / num_tokens).backward()  # gradients add up
            loss += nll.item() / num_tokens
        loss = processes.add_up([model], {"loss": loss})["loss"]  # and all gradients
        grad_norm = clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        if run.may_step([grad_norm]):  # finite: one bad batch is no reason to stop
            optimizer.step()
        lr = schedule.get_last_lr()[0]  # of this step
        schedule.step()  # for the next
        optimizer.zero_grad()

        # -- log, save
        row = {
            "iteration": step,
            "loss": loss,  # nats per token; falls fast, then slowly
            "grad_norm": grad_norm.item(),  # before clipping; steady after the warm-up
            "lr": lr,  # up, then down
        }
        run.log(row, show={"loss": "loss"})
        run.save_if_due(loss_before=loss_before)

    # -- held-out result, samples
    run.phase("evaluation")
    adapters.merge(model)
    loss = look()
    run.log({"split": "eval", "iteration": num_steps, "loss_before": loss_before, "loss": loss})
    run.finish()  # --output is now a model's folder
    report.sft_result(loss_before, loss, model, tokenizer, eval_examples)
    data = "" if cfg.data == Config().data else " --data YOUR_PAIRS.jsonl"
    print(f"\nwrote {cfg.output}; next: python reward_model.py --model {cfg.output}{data}")


if __name__ == "__main__":
    with cli.command_line():
        main(cli.parse_args(Config, __doc__.splitlines()[0]))
