"""What --reward and --judge may name: Python functions, our reward models, and other people's.

A scorer is called as scorer(tokens, attention_mask, rows, responses), with (B, P+R) ids and mask, B
data rows and B texts, and returns one score per response, (B,) float32 on the tokens' device.
"""

import copy
import math
import os
import re
import signal
import traceback

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

import common
import harness
from common import UserError


# FORK: a reward of your own is one function(prompts, responses, rows) -> a number per response.
# A prompt is what the row holds, a string or a chat; a response is a string.
class FunctionScorer:
    """The function that "file.py:function" names. Its values are used as they are."""

    model, reads_tokens, needs_scale = None, False, False

    def __init__(self, spec):
        self.spec = spec
        self.function = harness.load_function(spec)

    @torch.enable_grad()  # and as before afterwards, whatever the function sets
    def __call__(self, tokens, attention_mask, rows, responses):
        """Returns the function's values. It may compare all rows, so rank 0 calls it for all."""
        zeros = torch.zeros(len(rows), device=tokens.device)
        if harness.RANK > 0:
            return common.total(zeros)
        copies = copy.deepcopy(rows)  # what it does to them stays its own
        signals = {signal.SIGINT} if hasattr(signal, "pthread_sigmask") else set()
        try:
            if signals:  # a Ctrl-C must not kill programs it starts: the call would fail
                signal.pthread_sigmask(signal.SIG_BLOCK, signals)
            values = self.function([row["prompt"] for row in copies], list(responses), copies)
            if not isinstance(values, (str, dict, set, frozenset, torch.Tensor)):
                values = list(values)  # a generator runs here
            scores = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
        except (Exception, SystemExit) as error:
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"{self.spec} failed: {type(error).__name__}: {error} ({place.filename} line "
                f"{place.lineno}); it is called as function(prompts, responses, rows) and returns "
                "one number per response"
            ) from error
        finally:
            if signals:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        if scores.shape != zeros.shape:
            raise UserError(f"{self.spec} returned shape {list(scores.shape)}, not [{len(rows)}]")
        for score, row, response in zip(scores, rows, responses):
            if not score.isfinite():
                where = f"prompt {row['prompt']!r} and response {response!r}"
                raise UserError(f"{self.spec} returned {score:g}, not a finite number, for {where}")
        return common.total(zeros + scores.to(tokens.device))


class TokenScorer:
    """A reward model of reward_model.py that reads the very tokens that the policy wrote."""

    reads_tokens, needs_scale = True, False

    def __init__(self, spec, model, microbatch_size):
        self.spec = spec
        self.model = model
        self.microbatch_size = microbatch_size

    @torch.no_grad()
    def __call__(self, tokens, attention_mask, rows, responses):
        """Returns normalized scores, read at each row's last token, the EOS if there is one."""
        device = tokens.device  # the model may be on another
        tokens, mask = tokens.to(self.model.device), attention_mask.to(self.model.device)
        scores = torch.zeros(len(tokens), device=tokens.device)
        index = torch.arange(len(tokens))
        for part, columns in common.parts_by_length(mask, index, self.microbatch_size):
            part_tokens, part_mask = tokens[part, columns], mask[part, columns]  # (b, T) each
            scores[part] = common.text_scores(self.model, part_tokens, part_mask)  # (b,)
        return common.total(scores.to(device))


class TextScorer:
    """A reward model with other tokens than the policy's: responses reach it as texts.

    One made by reward_model.py reads the ids of `common.encode`. Another reads its own chat
    template (a plain prompt becomes a user's message). Without a template, an encoder reads prompt
    and response as a pair, a decoder as one text with EOS. Truncated responses look finished.
    """

    reads_tokens = False

    def __init__(self, spec, model, tokenizer, microbatch_size):
        self.spec = spec
        self.model = model
        self.microbatch_size = microbatch_size
        self.tokenizer = tokenizer
        self.eos_ids = common.eos_token_ids(tokenizer, model)
        self.needs_scale = not hasattr(model.config, "reward_mean")  # else it is ours
        self.has_cut = False

    def encode(self, row, response):
        """Returns the model's inputs for one row and response: {"input_ids": list, ...}."""
        prompt = row["prompt"]
        tools = row.get("tools")
        if not self.needs_scale:
            response = response if isinstance(prompt, str) else response.strip()
            ids = common.encode(self.tokenizer, prompt, response, self.eos_ids, tools, True)
            return {"input_ids": ids[0] + ids[1]}
        if self.tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            chat = [*chat, {"role": "assistant", "content": response.strip()}]
            text = common.render_chat(self.tokenizer, chat, tools=tools)
            return dict(self.tokenizer(text, add_special_tokens=False))
        if isinstance(prompt, str) and not common.has_token_head(self.model):
            return dict(self.tokenizer(prompt, response.strip()))
        prompt_ids, response_ids = common.encode(self.tokenizer, prompt, response)
        return {"input_ids": prompt_ids + response_ids}

    def fit(self, inputs):
        """Returns inputs that fit: of longer ones the first id (BOS or CLS) and the last ones."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", 0) or 0
        limit = self.tokenizer.model_max_length
        limit = min(limit, positions) if positions > 0 else limit  # XLNet has -1 for none
        if len(inputs["input_ids"]) <= limit:
            return inputs
        if not self.has_cut:
            what = "longer texts lose the beginning of the prompt"
            tqdm.write(f"warning: {self.spec} reads {limit} tokens; {what}")
        self.has_cut = True
        return {name: [ids[0], *ids[len(ids) - limit + 1 :]] for name, ids in inputs.items()}

    @torch.no_grad()
    def __call__(self, tokens, attention_mask, rows, responses):
        """Returns normalized scores from the model's own forward pass."""
        scores = torch.zeros(len(rows))
        mean, std = common.score_scale(self.model.config)
        try:
            inputs = [self.fit(self.encode(*pair)) for pair in zip(rows, responses)]
            indices = common.share(range(len(inputs)))
            for start in range(0, len(indices), self.microbatch_size):
                part = indices[start : start + self.microbatch_size]
                padded = self.tokenizer.pad(
                    [inputs[i] for i in part], padding_side="right", return_tensors="pt"
                ).to(self.model.device)
                with common.autocast(self.model):
                    logits = self.model(**padded).logits[:, 0]  # (b,)
                scores[list(part)] = ((logits.float() - mean) / std).cpu()
        except Exception as error:  # RoBERTa has fewer positions than its config says, ...
            common.explain(error, f"{self.spec} can't read a text")
        return common.total(scores.to(tokens.device))


def load_scorer(spec, policy, tokenizer, microbatch_size, **options):
    """Returns the scorer that `spec` names; `options` are those of `common.load_classifier`. Only a
    model that reward_model.py made with this tokenizer and chat template reads tokens.
    """
    if re.search(r"\.py(:|$)", spec) and not os.path.isdir(spec):
        return FunctionScorer(spec)
    made_by = "python reward_model.py"
    own = common.load(AutoTokenizer, spec, made_by, trust_remote_code=options["trust_remote_code"])
    if own.pad_token_id is None:  # its own forward pass depends on its pad token
        common.give_pad_token(own)
    model, missing = common.load_classifier(spec, made_by, **options)
    if missing:
        what = f"{spec} is no trained reward model: it has no {missing[0]}"
        raise UserError(f"{what}; make one with: {made_by}")
    common.fit_embeddings(model, own)
    model.config.pad_token_id = own.pad_token_id
    model.requires_grad_(False)
    num_sampled = policy.get_output_embeddings().out_features  # ids that the policy may sample
    if (
        hasattr(model.config, "reward_mean") and common.has_token_head(model)
        and own.get_vocab().items() >= tokenizer.get_vocab().items()  # it may have a pad token more
        and own.chat_template == tokenizer.chat_template
        and model.get_input_embeddings().num_embeddings >= num_sampled
    ):
        return TokenScorer(spec, model, microbatch_size)
    print(f"  {spec} reads texts: responses are decoded, and tokenized for it")
    return TextScorer(spec, model, own, microbatch_size)


def mean_and_std(scorer, scores):
    """Returns (mean, std) of the N scores that a reward model gives to SFT's responses."""
    scores = torch.tensor(scores)
    mean, std = scores.mean().item(), scores.std(correction=0).item()
    if not 1e-6 * max(1, abs(mean)) < std < math.inf:  # rounding alone
        raise UserError(f"{scorer.spec} gives all responses the score {mean:g}")
    number = len(scores)
    print(f"  {scorer.spec}: mean {mean:.3f} and std {std:.3f} of {number} scores become 0 and 1")
    return mean, std
