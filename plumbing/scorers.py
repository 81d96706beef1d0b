"""What --reward and --judge may name: reward models, of whatever make, and Python functions.

A scorer is called as scorer(tokens, attention_mask, rows, responses) and gives one score per
response, (B,) float32, on the device of the tokens: (B, P+R) ids, B data rows and B texts.
"""

import contextlib
import copy
import importlib.util
import math
import os
import pathlib
import random
import re
import sys
import traceback

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

import common
from common import UserError
from plumbing import cli, processes


HOME = pathlib.Path(__file__).resolve().parent.parent  # this project


class Scorer:
    """What all have: `spec`, the flag's value, and these."""

    model, reads_tokens = None, False  # of a function; can the critic start from this model?
    needs_scale = False  # has nobody measured yet what its scores are on average?


# FORK: a reward of your own is one function(prompts, responses, rows) -> a float per response.
# A prompt is what the row holds, a string or a chat; a response is a string.
class FunctionScorer(Scorer):
    """The function that "file.py:function" names. It is the user's own code and run as it is."""

    def __init__(self, spec):
        self.spec, (path, _, name) = spec, spec.rpartition(":")
        if not path:
            raise UserError(f"{spec} names no function in it; give file.py:function")
        if not os.path.isfile(path):
            raise UserError(f"{spec} names no function: no file {path!r}; give file.py:function")
        name_here = f"user_{len(sys.modules)}_{pathlib.Path(path).stem}"  # it may be called math.py
        module_spec = importlib.util.spec_from_file_location(name_here, path)
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_spec.name] = module  # dataclasses and pickle look it up there
        self.folder, self.modules = pathlib.Path(path).resolve().parent, {}
        sys.path.append(str(self.folder))  # it may import its neighbours
        try:
            with self.at_home():
                module_spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise UserError(f"{spec}: {path} fails: {type(error).__name__}: {error}") from error
        self.function, self.name = getattr(module, name, None), f"{name}()"
        if not callable(self.function):
            raise UserError(f"{spec}: {path} has no function {name}")

    @contextlib.contextmanager
    def at_home(self):
        """The user's code has random numbers of its own, whatever it draws or seeds, and torch's
        modes; and it imports a neighbour of its own where one has the name of ours, common.py say.
        """
        path = lambda module: pathlib.Path(getattr(module, "__file__", None) or ".").resolve()
        is_ours = lambda m: HOME in path(m).parents and self.folder not in path(m).parents
        names = {file.stem for file in self.folder.iterdir()}
        ours = {n: m for n, m in [*sys.modules.items()] if n.split(".")[0] in names and is_ours(m)}
        for name in ours:
            del sys.modules[name]
        sys.modules.update(self.modules)
        sys.path.insert(0, str(self.folder))
        devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
        state, dtype = random.getstate(), torch.get_default_dtype()
        grad = torch.is_grad_enabled()
        try:
            with torch.random.fork_rng(devices=devices), torch.set_grad_enabled(grad):
                yield
        finally:
            random.setstate(state)
            torch.set_default_dtype(dtype)
            sys.path.remove(str(self.folder))
            self.modules |= {name: sys.modules.pop(name) for name in ours if name in sys.modules}
            sys.modules.update(ours)

    def __call__(self, tokens, attention_mask, rows, responses):
        """What the function says, as it is. It may look at all rows, so rank 0 asks it of all."""
        scores = torch.zeros(len(rows), device=tokens.device)
        if processes.RANK == 0:
            scores += torch.tensor(self.ask(rows, responses), device=tokens.device)
        return common.total(scores)

    def ask(self, rows, responses):
        """A list of floats, checked to be one finite number per response."""
        its_rows = copy.deepcopy(rows)  # what it does to them stays its own
        try:
            with self.at_home():
                prompts = [row["prompt"] for row in its_rows]
                scores = self.function(prompts, list(responses), its_rows)
                if hasattr(scores, "__iter__") and not isinstance(scores, (str, dict, set)):
                    scores = list(scores)  # a generator runs here
        except (Exception, SystemExit) as error:
            if common.is_out_of_memory(error):
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"{self.name} failed: {type(error).__name__}: {error} ({place.filename} line "
                f"{place.lineno}); it is called as function(prompts, responses, rows)"
            ) from error
        if not isinstance(scores, list):
            what = type(scores).__name__
            raise UserError(f"{self.name} returned a {what}, not a list of numbers")
        if len(scores) != len(rows):
            raise UserError(f"{self.name} returned {len(scores)} scores for {len(rows)} responses")
        for score, row, response in zip(scores, rows, responses):
            try:
                is_number = not isinstance(score, str) and torch.tensor(float(score)).isfinite()
            except Exception:  # whatever its __float__ raises
                is_number = False
            if not is_number:
                where = f"for prompt {row['prompt']!r} and response {response!r}"
                raise UserError(f"{self.name} returned {score!r}, not a finite number, {where}")
        return [float(score) for score in scores]


class TokenScorer(Scorer):
    """A reward model of reward_model.py on the policy's own tokens: it reads what was sampled."""

    reads_tokens = True

    def __init__(self, spec, model, microbatch_size):
        self.spec, self.model, self.microbatch_size = spec, model, microbatch_size

    @torch.no_grad()
    def __call__(self, tokens, attention_mask, rows, responses):
        """Normalised scores, read at each row's last attended token, the EOS if there is one."""
        scores, device = torch.zeros(len(tokens), device=tokens.device), self.model.device
        everything, size = torch.arange(len(tokens)), self.microbatch_size
        for part, columns in common.parts_by_length(attention_mask, everything, size):
            part = part.to(tokens.device)
            inputs = tokens[part, columns].to(device), attention_mask[part, columns].to(device)
            scores[part] = common.text_scores(self.model, *inputs).to(tokens.device)  # (b, T) -> b
        return _finite(common.total(scores), self.spec)


class TextScorer(Scorer):
    """A reward model that reads other tokens than the policy writes: it is asked about texts.

    Each text is encoded as this model expects it. One that reward_model.py made reads what it was
    trained on, the ids of `common.encode`. Another reads the text whole by its chat template if it
    has one (a prompt that is no chat becomes the user's message), a pair of texts if it is an
    encoder, else prompt, response and EOS. Texts do not show whether a response ended, so a cut one
    is read as ended; --missing-eos-penalty makes up for it.
    """

    def __init__(self, spec, model, tokenizer, microbatch_size):
        self.spec, self.model, self.microbatch_size = spec, model, microbatch_size
        self.tokenizer, self.eos_ids = tokenizer, common.eos_token_ids(tokenizer, model)
        self.is_ours = hasattr(model.config, "reward_mean")  # reward_model.py made it
        self.needs_scale, self.num_cut = not self.is_ours, 0

    def encode(self, row, response):
        """The model's inputs for one row and response: lists under "input_ids" and so on."""
        prompt, tools = row["prompt"], row.get("tools")
        if self.is_ours:
            response = response if isinstance(prompt, str) else response.strip()
            ids = common.encode(self.tokenizer, prompt, response, self.eos_ids, tools, True)
            return {"input_ids": sum(ids, [])}
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
        """Inputs that this model has positions for: too long ones lose their prompt's beginning.

        The first token stays, BOS or CLS. One row that is too long must not end a run of hours.
        """
        config = self.model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or 0  # XLNet says -1 for none
        limit = min(self.tokenizer.model_max_length, positions if positions > 0 else math.inf)
        if len(inputs["input_ids"]) <= limit:
            return inputs
        self.num_cut += 1
        if self.num_cut == 1:
            what = "longer texts lose the beginning of the prompt"
            tqdm.write(f"warning: {self.spec} reads {limit} tokens; {what}")
            report = lambda: print(f"  {self.num_cut} texts were cut to fit {self.spec}")
            cli.at_end.insert(0, report)
        return {name: [ids[0], *ids[len(ids) - limit + 1 :]] for name, ids in inputs.items()}

    @torch.no_grad()
    def __call__(self, tokens, attention_mask, rows, responses):
        """Scores by the model's own forward pass, normalised."""
        try:
            inputs = [self.encode(row, response) for row, response in zip(rows, responses)]
        except ValueError as error:
            raise UserError(f"{self.spec} can't read the prompts: a row {error}") from error
        inputs = [self.fit(each) for each in inputs]
        longest = max(len(each["input_ids"]) for each in inputs)
        scores, mine = torch.zeros(len(inputs), device=tokens.device), range(len(inputs))
        mine, (mean, deviation) = common.share(mine), common.score_scale(self.model.config)
        for start in range(0, len(mine), self.microbatch_size):
            part = mine[start : start + self.microbatch_size]
            some = [inputs[i] for i in part]
            padded = self.tokenizer.pad(some, padding_side="right", return_tensors="pt")
            try:
                with common.autocast(self.model):
                    logits = common.score_logits(self.model, **padded.to(self.model.device))
            except (IndexError, ValueError, RuntimeError) as error:
                if common.is_out_of_memory(error):  # others: RoBERTa has fewer positions than its
                    raise  # config says, BART wants an EOS, DeBERTa can't do bf16
                reason = str(error).splitlines()[0]
                raise UserError(f"{self.spec} can't read {longest} tokens: {reason}") from error
            scores[[*part]] = ((logits[:, 0].float() - mean) / deviation).to(tokens.device)
        return _finite(common.total(scores), self.spec)


def _finite(scores, spec):
    if not scores.isfinite().all():
        raise UserError(f"a score is not finite; look at --reward {spec}, its model and --dtype")
    return scores


def load_scorer(spec, policy, tokenizer, microbatch_size, **options):
    """The scorer that `spec` names; `options` are those of `common.load_classifier`.

    Only a model that reward_model.py made on this tokenizer and chat template is read token by
    token. Where another was trained to answer, only its own forward knows; as that depends on its
    pad token, only a tokenizer without one gets a new one.
    """
    if re.search(r"\.py(:|$)", spec) and not os.path.isdir(spec):
        return FunctionScorer(spec)
    made_by, trust = "python reward_model.py", options["trust_remote_code"]
    theirs = common.load_tokenizer(spec, made_by, trust, needs_eos=False)
    own = common.load(AutoTokenizer, spec, made_by, trust_remote_code=trust)  # its own pad token
    model, missing = common.load_classifier(spec, made_by, **options)
    if missing:
        raise UserError(
            f"{spec} is no trained reward model: it has no {missing[0]}; make one with: {made_by}"
        )
    if own.pad_token_id is None:
        own.add_special_tokens({"pad_token": "<|pad|>"})
    common.fit_embeddings(model, own)
    model.config.pad_token_id = own.pad_token_id
    model.requires_grad_(False)
    is_ours = hasattr(model.config, "reward_mean") and common.has_token_head(model)
    same_tokens = theirs.get_vocab() == tokenizer.get_vocab()
    same_chats = theirs.chat_template == tokenizer.chat_template
    num_embedded = model.get_input_embeddings().num_embeddings
    knows_all = num_embedded >= policy.get_output_embeddings().out_features  # that may be sampled
    if is_ours and same_tokens and same_chats and knows_all:
        return TokenScorer(spec, model, microbatch_size)
    return TextScorer(spec, model, own, microbatch_size)


def measure_scales(scorers, kept, sample):
    """Give reward models from elsewhere the scale that reward_model.py would have given them: mean
    and deviation of their scores on responses of the SFT policy become 0 and 1.

    Args:
        kept: what a resumed run has kept, these scales among it.
        sample: from a scorer to evaluation samples of the SFT policy with their "score".
    """
    scales = dict(kept.get("scales", {}))
    for scorer in (scorer for scorer in scorers if scorer.needs_scale):
        if scorer.spec not in scales:
            scores = torch.tensor([each["score"] for each in sample(scorer)])
            mean, deviation = scores.mean().item(), scores.std(correction=0).item()
            if not 0 < deviation < math.inf:
                raise UserError(f"{scorer.spec} gives all responses the score {mean:g}")
            print(
                f"  {scorer.spec}: scores are taken by mean {mean:.3f} and deviation "
                f"{deviation:.3f} of those of {len(scores)} responses of the SFT policy"
            )
            scales[scorer.spec] = mean, deviation
        config = scorer.model.config
        config.reward_mean, config.reward_std = scales[scorer.spec]
        scorer.needs_scale = False
    return scales  # {reward: (mean, deviation)}
