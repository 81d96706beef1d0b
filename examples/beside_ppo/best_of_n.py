"""Best of n: sample n responses, keep the one that the reward model likes best. No training.

Goal      more score for as little KL to the SFT policy as can be: what the others are drawn against

(1) policy    pi_n(.|x): the best by score of y_1, ..., y_n ~ pi_ref(.|x)
(2) distance  KL(pi_n || pi_ref) <= log n - (n - 1)/n, equal where no sample comes twice
(3) score     E[best of n], from N >= n samples sorted by score, s_1 <= ... <= s_N:
              sum_k w_k s_k,  w_k = C(k-1, n-1) / C(N, n), the share of n-sets whose best is the kth

          (3) averages over all sets of n among the N samples, so it has no bias and one set of
          samples serves all n. Any other number of the chosen text, its true reward say, is
          averaged with the same weights. With equal scores the later sample stands for both.

Shapes    B prompts, N samples of each.
Differs   (2) is what is quoted as the KL. It is that only where samples never repeat (Beirami et
          al. 2024); with the small world's few texts the KL is smaller.
          A response that was cut competes like one that ended.

Sources   Stiennon et al. 2020 (the KL); Nakano et al. 2021 ((3), appendix I); Beirami et al. 2024.

Run       python examples/beside_ppo/best_of_n.py                                  on data/
          python examples/beside_ppo/best_of_n.py --policy ckpt/sft --prompts mine.jsonl --n 16
Writes    OUTPUT, the rows of --prompts with the best of all --n as "completion" and its "score":
          also what `sft.py --data` would imitate (rejection sampling)
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import plumbing  # noqa: E402, F401 - first: Ctrl-C while torch loads is no traceback

import json
import math
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm
from transformers import set_seed

import common
import ppo
from common import UserError
from plumbing import cli, processes
from plumbing.cli import DATA, arg
from plumbing.rows import convert, read_rows, too_long
from plumbing.scorers import FunctionScorer, load_scorer


@dataclass(frozen=True)
class Config:
    policy: str = arg("ckpt/sft", "causal LM that samples", heading="models, data")
    reward: list[str] = arg(["ckpt/reward_model"], "models or file.py:function; several are summed")
    judge: str | None = arg(None, "file.py:function, the true reward; reported, it chooses nothing")
    prompts: list[str] = arg([str(DATA / "heldout_prompts.jsonl")], "JSONL rows with a prompt")
    output: str = arg("ckpt/best_of_n.jsonl", "file for the best responses; is replaced")
    trust_remote_code: bool = arg(False, "run code that comes with a model")

    n: int = arg(16, "samples to each prompt, N of eq. 3", 1, heading="sampling")
    batch_size: int = arg(128, "responses that are sampled at once", 1)
    microbatch_size: int = arg(32, "responses that are scored at once", 1)
    max_prompt_length: int = arg(512, "in tokens; longer prompts are dropped and counted", 1)
    response_length: int = arg(64, "in tokens; what has not ended by then is cut", 1)
    temperature: float = arg(1.0, "of sampling", 0.01, 100)
    seed: int = arg(0, "of the samples", 0, 2**32 - 1)
    device: str = arg("auto", "cpu, cuda, cuda:1; auto is a GPU if there is one")
    dtype: Literal["auto", "float32", "bf16"] = arg("auto", "of matrix products; bf16 on CUDA")


# === Best of n: eqs. 2 and 3 ======================================================================
def kl_bound(n):
    """Eq. 2, in nats."""
    return math.log(n) - (n - 1) / n


def best_of(scores, values, n):
    """Eq. 3: the mean of `values` over the best of n by `scores`, both (B, N): (B,) float64."""
    order = scores.argsort(dim=1, stable=True)  # s_1 <= ... <= s_N
    number = scores.shape[1]
    weights = [math.comb(k - 1, n - 1) / math.comb(number, n) for k in range(1, number + 1)]
    return values.double().gather(1, order) @ torch.tensor(weights, dtype=torch.float64)


# === Sampling =====================================================================================
@torch.no_grad()
def sample_all(cfg, policy, tokenizer, scorers, judge, rows):
    """`cfg.n` responses to each row: texts [B][N], scores and true rewards (B, N), or None."""
    flat = [row for row in rows for _ in range(cfg.n)]
    texts, scores, truths = [], [], []
    for start in tqdm(range(0, len(flat), cfg.batch_size), desc="samples", leave=False):
        some = flat[start : start + cfg.batch_size]
        tokens, attention_mask, response_mask, ended, _ = ppo.sample_responses(
            policy, some, cfg.response_length, cfg.temperature
        )
        responses = ppo.decode_responses(tokens, attention_mask, response_mask, ended, tokenizer)
        asked = tokens, attention_mask, some, responses
        texts += responses
        scores.append(ppo.score_responses(scorers, *asked).sum(0).cpu())
        if judge:
            truths.append(judge(*asked).cpu())
    shaped = lambda parts: torch.cat(parts).view(len(rows), cfg.n)
    texts = [texts[i : i + cfg.n] for i in range(0, len(texts), cfg.n)]
    return texts, shaped(scores), shaped(truths) if judge else None


def write(path, text, mode):
    """Write or append to --output."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"can't write --output {path}: {error.strerror}") from None


def main(cfg):
    cli.check_ranges(cfg)
    if processes.IS_TORCHRUN:
        raise UserError("it is one process; start it with python instead of torchrun")
    if len({*cfg.reward}) < len(cfg.reward):
        raise UserError("--reward names one twice; it would count twice")
    path = pathlib.Path(cfg.output)
    if path.resolve() in [pathlib.Path(file).resolve() for file in cfg.prompts]:
        raise UserError(f"--output {path} would replace --prompts; name another")
    set_seed(cfg.seed)
    device, options = cli.pick_device(cfg.device), {"trust_remote_code": cfg.trust_remote_code}
    judge = cfg.judge
    if judge is None and cfg.prompts == Config().prompts:  # the embedded world knows the truth
        judge = f"{DATA / 'true_reward.py'}:true_reward"
    judge = FunctionScorer(judge) if judge else None
    tokenizer = common.load_tokenizer(cfg.policy, "python sft.py", **options)
    policy = common.load_causal_lm(cfg.policy, tokenizer, "python sft.py", **options)
    common.set_generation_defaults(policy, tokenizer, cfg.temperature)
    load = lambda spec: load_scorer(spec, policy, tokenizer, cfg.microbatch_size, **options)
    scorers = [load(spec) for spec in cfg.reward]
    unscaled = [scorer.spec for scorer in scorers if scorer.needs_scale]
    if unscaled and len(scorers) > 1:
        raise UserError(f"{unscaled[0]} brings no scale, so its score can't be added to others")

    def encode(row):
        row.unread = ()  # a reward function may read them
        row.prompt_ids, _ = common.encode(tokenizer, row["prompt"], tools=row.get("tools"))
        yield (too_long(cfg, row.prompt_ids) if row.prompt_ids else "empty") or row

    rows = convert(read_rows(cfg.prompts, [("prompt",)]), encode)
    longest = max(len(row.prompt_ids) for row in rows) + cfg.response_length
    models = [policy, *(scorer.model for scorer in scorers if scorer.model is not None)]
    for model in models:
        common.place(model.requires_grad_(False), device, cfg.dtype)
    common.check_context(policy, longest)
    write(path, "", "a")  # it can be written to: else hours of sampling would be lost
    cli.now_in.update(phase="rollout", cfg=cfg)
    texts, scores, truths = sample_all(cfg, policy, tokenizer, scorers, judge, rows)

    print(f"\n{'n':>6}{'KL at most':>14}{'score':>10}{'true reward':>14}".rstrip())
    for n in sorted({cfg.n, *(2**i for i in range(cfg.n.bit_length()))}):
        true = "" if truths is None else f"{best_of(scores, truths, n).mean():>14.3f}"
        print(f"{n:>6}{kl_bound(n):>14.2f}{best_of(scores, scores, n).mean():>10.3f}{true}")
    lines = [  # eq. 1
        row | {"completion": some[best], "score": own[best].item()}
        for row, some, own, best in zip(rows, texts, scores, scores.argmax(1).tolist())
    ]
    write(path, "".join(json.dumps(line) + "\n" for line in lines), "w")
    print(f"\nwrote {path}, the best of {cfg.n} to each of {len(rows)} prompts")


if __name__ == "__main__":
    with cli.command_line():
        main(cli.parse_args(Config, __doc__.splitlines()[0]))
