"""Stage 1 of RLHF, supervised fine-tuning: a language model learns to answer by imitation.

Goal      maximize  E_{(x, y) ~ demonstrations}[ log pi(y | x) ]

(1) loss  L = - mean over the batch's completion tokens of  log pi(y_t | x, y_<t)

Shapes    B rows, T tokens of prompt and completion (padded on the right); N of them are imitated.
Time      logits[:, i] is the distribution of token i + 1. The loss shifts once, in completion_nll.
Mask      completion_mask is True where a token is imitated: the completion and its EOS. Prompt
          tokens are read but not predicted: the policy is to answer, not to ask.
Chats     Message lists go through the tokenizer's chat template. Each turn of the assistant is one
          example; its prompt is the chat before it, up to the words that open the turn.
EOS       It is learned like any other token. A policy that never learned to stop is the most common
          bad start for PPO: its responses are truncated, and scores of truncated texts mean little.

Differs   The sum over a batch's tokens is divided once, by their number in the whole batch, so
          micro-batches change no gradient; a mean of their means would. Batches hold rows of
          similar length to save padding, so a token of a short text weighs more over an epoch.
          An example that is too long is dropped and counted: cut texts would teach never to stop.

Sources   Ouyang et al. 2022 (InstructGPT); Huang et al. 2024, "The N+ Implementation Details of
          RLHF with PPO". Its settings for TL;DR summaries with 1 B parameters are a start for
          models of that size: --lr 3e-6 --epochs 1 --batch-size 128, cosine decay.

Run       python sft.py                                            a tiny model from scratch, data/
          python sft.py --model Qwen/Qwen2.5-0.5B --data mine.jsonl --epochs 1
Data      {"prompt": str, "completion": str}, {"messages": [...]} or {"text": str}, one row a line
Writes    ckpt/sft: the policy as a Hugging Face folder, args.json and metrics.jsonl
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C comes while torch loads

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

import common
import harness
from common import UserError
from data import tiny_model
from harness import DATA, Count, Positive, Share, arg


# === 0. Configuration =============================================================================
# An optimizer step learns from --batch-size rows; --microbatch-size affects memory and speed only.
@dataclass(frozen=True)
class Config(harness.RunConfig):  # the flags that all stages share are in harness.py
    output: str = arg("ckpt/sft", "folder for the trained policy and the logs")
    save_every: Count = arg(500, "optimizer steps between checkpoints")

    model: str | None = arg(None, "causal LM, folder or hub name; None: a tiny Llama from scratch")
    data: list[str] | None = arg(None, "JSONL of prompt and completion; None: toy task in data/")
    eval_data: list[str] | None = arg(None, "held-out JSONL files; None: a tenth of --data")
    max_prompt_length: Count = arg(512, "in tokens; rows with longer prompts are dropped")
    response_length: Count = arg(512, "in tokens, with EOS; rows with longer ones are dropped")

    epochs: Count = arg(4, "passes over the data; 1 to 3 for a pretrained model")
    batch_size: Count = arg(16, "sequences per optimizer step")
    microbatch_size: Count | None = arg(None, "sequences at once; None: fastest that fits, CPU: 16")
    lr: Share | None = arg(None, "peak learning rate; None: by size, 3e-3 to 3e-6")
    warmup: Share = arg(0.05, "share of steps in which lr rises from 0; then a cosine to 0")
    weight_decay: Share = arg(0.0, "weight decay of AdamW; usually 0 to 0.1")
    max_grad_norm: Positive = arg(1.0, "clip the gradient to this norm")


# Learning rates by number of parameters: at a tiny model's rate, a large one forgets.
LR_BY_SIZE = ((10e6, 3e-3), (1e9, 1e-5), (math.inf, 3e-6))  # (parameters below, learning rate)
FORMATS = [("prompt", "completion"), ("messages",), ("text",)]  # the keys of a row


# === 1. Data: rows to prompts and completions, to ids, to tensors =================================
# FORK: other demonstrations become prompts and completions here.
def row_dialogues(row):
    """Returns the [(prompt, completion)] of a data row, as `common.encode` takes them.

    A text is a completion without a prompt. A chat gives one example for each turn of the assistant
    (of "messages", or of the completion): its prompt is the chat before it.
    """
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]  # strings or chats
        if isinstance(prompt, str) or isinstance(completion, str):
            return [(prompt, completion)]  # strings
    elif "messages" in row:
        prompt = []
        completion = row["messages"]
    else:
        return [("", row["text"])]  # all of it is imitated
    chat = prompt + completion  # all messages
    first = max(len(prompt), 1)  # an opening by the assistant answers nothing
    roles = [message["role"] for message in chat]  # system, user, assistant, tool
    turns = [i for i in range(first, len(chat)) if roles[i] == "assistant" != roles[i - 1]]
    if not turns:
        raise ValueError("has a chat in which the assistant answers nothing")
    if len(turns) < roles[len(prompt) :].count("assistant"):
        common.notes["with a message of the assistant that answers nothing and is not learned"] += 1
    return [(chat[:i], chat[i : i + 1]) for i in turns if is_learned(chat[i])]


def is_learned(message):
    """Returns False for context only: "weight": 0 in OpenAI's format, or "train": false."""
    marks = {key: message[key] for key in ("weight", "train") if message.get(key) is not None}
    for key, mark in marks.items():
        if mark not in (0, 1):  # False and True count as these
            raise ValueError(f"has a message with {mark!r} under {key!r}; only 0 and 1 are read")
    return all(marks.values())


def prompt_of(row):
    """Returns a row's prompt: no prompt should be both trained on and held out."""
    if "prompt" not in row and "messages" in row:
        return row["messages"][:-1]
    return row.get("prompt", row.get("text"))


def encode_row(row, tokenizer, eos_ids, cfg):
    """Yields each (prompt ids, completion ids with EOS) of a row, or why there is none."""
    dialogues = row_dialogues(row)  # [(prompt, completion)]
    if not dialogues:
        yield "marked not to be learned"
    for prompt, completion in dialogues:
        prompt_ids, completion_ids = common.encode(
            tokenizer, prompt, completion, eos_ids, row.get("tools")
        )
        if len(prompt_ids) + len(completion_ids) == 1:
            yield "empty"  # a lone EOS follows nothing
        else:
            reason = harness.too_long(cfg, prompt_ids, completion_ids)
            yield reason or (prompt_ids, completion_ids)  # two lists of int


def collate(examples, pad_id):
    """Returns examples as tokens int64, attention_mask bool, completion_mask bool, each (B, T)."""
    sequences = [prompt_ids + completion_ids for prompt_ids, completion_ids in examples]  # B lists
    tokens, attention_mask = common.pad(sequences, pad_id, "right")  # (B, T)
    prompt_lengths = torch.tensor([[len(prompt_ids)] for prompt_ids, _ in examples])  # (B, 1)
    completion_mask = attention_mask & (torch.arange(tokens.shape[1]) >= prompt_lengths)  # (B, T)
    completion_mask[:, 0] = False  # nothing comes before the first token, so nothing predicts it
    return tokens, attention_mask, completion_mask


# === 2. Loss: eq. 1 ===============================================================================
def completion_nll(model, tokens, attention_mask, completion_mask):
    """Returns the sum over completion tokens of -log pi(y_t | x, y_<t), a scalar in nats.

    It is a sum and not a mean: the micro-batches of a step add up, and the step divides once.
    """
    tokens, attention_mask = tokens.to(model.device), attention_mask.to(model.device)
    logits = common.forward(model, tokens, attention_mask).logits  # (B, T, vocabulary)
    # Position i predicts token i + 1: drop the last column of the logits and the first of the rest.
    is_target = completion_mask[:, 1:].to(model.device)  # (B, T-1)
    predictions, targets = logits[:, :-1][is_target], tokens[:, 1:][is_target]  # of N tokens
    return F.cross_entropy(predictions.float(), targets, reduction="sum")  # eq. 1


# === 3. Held-out evaluation =======================================================================
@torch.no_grad()
def evaluate(model, examples, microbatch_size, pad_id):
    """Returns the mean loss per completion token, in nats; its exp is the perplexity."""
    nll = 0.0  # sums over all examples, divided once
    num_tokens = 0
    examples = sorted(examples, key=lambda example: len(example[0]) + len(example[1]))
    examples = common.share(examples)  # under torchrun a part, else all
    for start in range(0, len(examples), microbatch_size):
        micro = examples[start : start + microbatch_size]
        tokens, attention_mask, completion_mask = collate(micro, pad_id)
        nll += completion_nll(model, tokens, attention_mask, completion_mask).item()  # in nats
        num_tokens += completion_mask.sum().item()
    sums = harness.sum_over_processes([], {"nll": nll, "num_tokens": num_tokens})
    return float(sums["nll"] / sums["num_tokens"])


def print_result(loss_before, loss, model, tokenizer, examples):
    """Prints the loss before and after, and the policy's answers to a few held-out prompts."""
    print(
        f"\nheld-out loss {loss_before:.3f} -> {loss:.3f} nats per token, perplexity "
        f"{math.exp(loss_before):.2f} -> {math.exp(loss):.2f}; samples:"
    )
    prompts = [prompt_ids for prompt_ids, _ in examples if prompt_ids][:4]  # four samples
    if not prompts:  # plain text on a tokenizer without BOS: nothing to start from
        return
    tokens, mask = common.pad(prompts, tokenizer.pad_token_id, "left")  # (4, P)
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    longest = max(len(prompt_ids) + len(ids) for prompt_ids, ids in examples)  # positions it has
    length = min(64, longest - tokens.shape[1])  # tokens
    responses, _ = common.generate_responses(model, tokens, mask, length, temperature=1.0)
    for prompt_ids, response in zip(prompts, responses):
        print(f"\n  {tokenizer.decode(prompt_ids, skip_special_tokens=True)}")
        text = common.decode(tokenizer, prompt_ids, response.tolist())  # without EOS and padding
        print(harness.wrapped(f"    ->{text}"))


# === Main loop ====================================================================================
def load_model(cfg, rows):
    """Returns (model, tokenizer) of --model; without one, a tiny model to train from scratch."""
    code = cfg.trust_remote_code  # may a model bring code of its own?
    if cfg.model is not None:
        tokenizer = common.load_tokenizer(cfg.model, None, code, cfg.chat_template_kwargs)
        model = common.load_causal_lm(cfg.model, tokenizer, trust_remote_code=code)  # float32
        common.add_adapters(model, cfg.lora_rank, cfg.model)  # with --lora-rank
        return model, tokenizer
    if cfg.lora_rank is not None or cfg.chat_template_kwargs is not None:
        raise UserError("--lora-rank and --chat-template-kwargs need a pretrained --model")
    texts = [row[key] for row in rows for key in ("prompt", "completion", "text") if key in row]
    tokenizer = tiny_model.train_tokenizer([text for text in texts if isinstance(text, str)])  # BPE
    model = tiny_model.tiny_llama(tokenizer)  # 0.3 M random weights
    common.set_generation_defaults(model, tokenizer)
    return model, tokenizer


def main(cfg):
    run = harness.Run(cfg)  # seeds, takes --output, reads the checkpoint of --resume

    # Data, tokenizer, model, optimizer
    rows = harness.read_rows(cfg.data or [str(DATA / "demonstrations.jsonl")], FORMATS)
    if cfg.eval_data is None:
        rows, eval_rows = harness.hold_out(rows, 512, cfg.seed, prompt_of)  # a tenth, at most 512
    else:
        eval_rows = harness.read_rows(cfg.eval_data, FORMATS)
        harness.report_overlap(rows, eval_rows, prompt_of)  # prompts that both have
    model, tokenizer = load_model(cfg, rows)  # float32, no dropout
    pad_id = tokenizer.pad_token_id
    eos_ids = model.generation_config.eos_token_id  # a list

    def encode(row):
        return encode_row(row, tokenizer, eos_ids, cfg)

    examples = harness.convert(rows, encode)  # prints what was dropped, and why
    eval_examples = harness.convert(eval_rows, encode, "held out")
    lengths = [len(prompt_ids) + len(ids) for prompt_ids, ids in examples]  # in tokens
    eval_lengths = [len(prompt_ids) + len(ids) for prompt_ids, ids in eval_examples]
    longest = max(lengths + eval_lengths)
    common.check_context(model, longest)  # has it as many positions?
    common.to_device(model, run.device, cfg.dtype, cfg.gradient_checkpointing)  # and precision
    num_steps = cfg.epochs * math.ceil(len(examples) / cfg.batch_size)  # an epoch's last is smaller
    optimizer, schedule = harness.adamw_with_cosine(cfg, model, LR_BY_SIZE, num_steps)
    harness.print_models([("policy", model)])
    harness.print_steps(cfg, len(examples), len(eval_examples), num_steps, optimizer)
    harness.print_tokens(tokenizer, model, examples[0][0], examples[0][1])  # is the EOS there?
    num_predicted = max(len(ids) for _, ids in examples + eval_examples)  # at most, of a row
    largest = ([pad_id] * (longest - num_predicted), [pad_id] * num_predicted)  # for the dry run

    def try_size(size):
        tokens, attention_mask, completion_mask = collate([largest] * size, pad_id)
        attention_mask[0, -1] = False  # some padding, as in most batches
        completion_nll(model, tokens, attention_mask, completion_mask).backward()

    microbatch_size = harness.choose_microbatch_size(run, optimizer, 16, cfg.batch_size, try_size)
    loss_before = run.kept.get("loss_before")  # a resumed run kept it
    if loss_before is None:
        loss_before = evaluate(model, eval_examples, microbatch_size, pad_id)
    run.restore(tokenizer, {"policy": model}, optimizer, schedule)  # and opens the logs

    generator = torch.Generator().manual_seed(cfg.seed)  # its own: --resume draws the same again
    batches = common.epochs_by_length(lengths, cfg.batch_size, generator)
    for step, index in run.steps(batches, num_steps):
        run.phase("backward")
        batch = [examples[i] for i in index]  # of similar length
        num_tokens = collate(batch, pad_id)[2].sum().item()  # the one denominator of this step
        loss = 0.0  # mean over the batch, in nats per token
        part = common.share(batch)  # under torchrun this process's part, else all
        for start in range(0, len(part), microbatch_size):
            micro = part[start : start + microbatch_size]
            tokens, attention_mask, completion_mask = collate(micro, pad_id)
            nll = completion_nll(model, tokens, attention_mask, completion_mask)  # a sum, in nats
            (nll / num_tokens).backward()  # gradients add up to those of the whole batch
            loss += nll.item() / num_tokens
        sums = harness.sum_over_processes([model], {"loss": loss})  # and gradients; alone: as is
        grad_norm = clip_grad_norm_(model.parameters(), cfg.max_grad_norm)  # before clipping
        if run.may_step(grad_norm):  # finite
            optimizer.step()  # AdamW
        optimizer.zero_grad()  # for the next step
        run.log({
            "iteration": step,
            "loss": float(sums["loss"]),  # nats per token; falls fast, then slowly
            "grad_norm": grad_norm.item(),  # before clipping; steady after the warm-up
            "lr": schedule.get_last_lr()[0],  # up, then down
        }, shown=("loss",))
        schedule.step()  # the learning rate of the next step
        run.save_if_due({"loss_before": loss_before})

    # Held-out result and samples
    run.phase("evaluation")
    common.merge_adapters(model)  # what is saved and evaluated
    loss = evaluate(model, eval_examples, microbatch_size, pad_id)  # after training
    run.log({"split": "eval", "iteration": num_steps, "loss_before": loss_before, "loss": loss})
    run.finish()  # --output becomes a model folder
    print_result(loss_before, loss, model, tokenizer, eval_examples)
    data = "" if cfg.data is None else " --data YOUR_PAIRS.jsonl"  # pairs like them
    print(f"\nwrote {cfg.output}; next: python reward_model.py --model {cfg.output}{data}")


if __name__ == "__main__":
    harness.run_stage(main, Config, __doc__.splitlines()[0])
