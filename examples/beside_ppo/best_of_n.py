"""Best of n: sample n responses, keep the one that the reward model likes best. No training.

Goal      a high score at a low KL to the SFT policy: the curve that other methods are compared with

(1) policy    pi_n(.|x): the best by score of y_1, ..., y_n ~ pi_ref(.|x)
(2) distance  KL(pi_n || pi_ref) <= log n - (n - 1)/n, equal where no sample comes twice
(3) score     E[best of n], from N >= n samples sorted by score, s_1 <= ... <= s_N:
              sum_k w_k s_k,  w_k = C(k-1, n-1) / C(N, n), the share of n-sets whose best is the kth

          (3) averages over all sets of n among the N samples, so it has no bias and one set of
          samples serves all n. The true reward of the chosen text is averaged with the same
          weights. Among equal scores the later sample is chosen.

          (2) is often quoted as the KL itself. It is that only where samples never repeat. A
          truncated response competes like one that finished.

Sources   Stiennon et al. 2020 (the KL); Nakano et al. 2021 ((3), appendix I); Beirami et al. 2024.

Run       python examples/beside_ppo/best_of_n.py                                  on data/
          python examples/beside_ppo/best_of_n.py --policy ckpt/sft --prompts mine.jsonl --n 16
Writes    --output, the rows of --prompts with the best of n as "completion" and its "score": with
          `sft.py --data` a policy learns to imitate them (rejection sampling)
"""

import json
import math
import pathlib
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import harness  # noqa: E402
import ppo  # noqa: E402
from common import UserError  # noqa: E402
from harness import DATA, Count, Range, arg  # noqa: E402
from rewards import FunctionScorer, load_scorer  # noqa: E402


@dataclass(frozen=True)
class Config:
    policy: str = arg("ckpt/sft", "causal LM that samples")
    reward: list[str] = arg(["ckpt/reward_model"], "reward models or file.py:function; summed")
    judge: str | None = arg(None, "file.py:function, the true reward: reported, chooses nothing")
    prompts: list[str] | None = arg(None, "JSONL files (default: the embedded held-out prompts)")
    output: str = arg("ckpt/best_of_n.jsonl", "file for the best responses; it is replaced")
    n: Count = arg(16, "samples per prompt, N of eq. 3")
    batch_size: Count = arg(128, "responses sampled at a time")
    microbatch_size: Count = arg(32, "responses scored at a time")
    max_prompt_length: Count = arg(512, "tokens; longer prompts are dropped and counted")
    response_length: Count = arg(64, "tokens; longer responses are truncated")
    temperature: Annotated[float, Range(0.01, 100)] = arg(1.0, "divides the logits in sampling")
    seed: Annotated[int, Range(0, 2**32 - 1)] = arg(0, "seed of the samples")
    device: str = arg("auto", "cpu, cuda or cuda:1; auto is a GPU if there is one")
    dtype: Literal["auto", "float32", "bf16"] = arg("auto", "matrix products; auto: bf16 on CUDA")
    trust_remote_code: bool = arg(False, "run code that comes with a model")

    __post_init__ = harness.RunConfig.__post_init__  # checks the ranges


# === Best of n: eqs. 2 and 3 ======================================================================
def kl_bound(n):
    """Returns eq. 2, in nats."""
    return math.log(n) - (n - 1) / n


def best_of(scores, values, n):
    """Returns eq. 3, (B,) float64: the mean of `values` (B, N) over the best of n by `scores`."""
    order = scores.argsort(dim=1, stable=True)  # s_1 <= ... <= s_N
    number = scores.shape[1]
    weights = [math.comb(k - 1, n - 1) / math.comb(number, n) for k in range(1, number + 1)]
    return values.double().gather(1, order) @ torch.tensor(weights, dtype=torch.float64)


# === Sampling =====================================================================================
def encode_prompts(rows, cfg, tokenizer, name=None):
    """Returns the rows with prompts that are short enough, their token ids as `row.prompt_ids`."""

    def encode(row):
        row.unread = ()  # a reward function may read any key
        row.prompt_ids, _ = common.encode(tokenizer, row["prompt"], tools=row.get("tools"))
        yield (harness.too_long(cfg, row.prompt_ids) if row.prompt_ids else "empty") or row

    return harness.convert(rows, encode, name)


@torch.no_grad()
def sample_all(cfg, policy, tokenizer, scorers, judge, rows):
    """Returns `cfg.n` responses per row: texts [B][N], scores and true rewards (B, N), or None."""
    flat = [row for row in rows for _ in range(cfg.n)]
    texts, scores, truths = [], [], []
    generator = torch.Generator().manual_seed(cfg.seed)
    for start in tqdm(range(0, len(flat), cfg.batch_size), desc="samples", leave=False):
        some = flat[start : start + cfg.batch_size]
        rollout = ppo.sample_responses(
            policy, tokenizer, some, cfg.response_length, cfg.temperature, generator
        )
        texts += rollout.texts
        scores.append(ppo.score_responses(scorers, rollout, some).sum(0).cpu())
        if judge:
            truths.append(ppo.score_responses([judge], rollout, some)[0].cpu())
    texts = [texts[i : i + cfg.n] for i in range(0, len(texts), cfg.n)]
    truths = torch.cat(truths).view(-1, cfg.n) if judge else None
    return texts, torch.cat(scores).view(-1, cfg.n), truths


def main(cfg):
    if harness.IS_TORCHRUN:
        raise UserError("it is one process; start it with python instead of torchrun")
    if len(set(cfg.reward)) < len(cfg.reward):
        raise UserError("--reward names one twice; it would count twice")
    path = pathlib.Path(cfg.output)
    files = cfg.prompts or [str(DATA / "heldout_prompts.jsonl")]
    if path.resolve() in [pathlib.Path(file).resolve() for file in files]:
        raise UserError(f"--output {path} would replace --prompts; name another")
    device = harness.pick_device(cfg.device)
    options = {"trust_remote_code": cfg.trust_remote_code}
    truth = None if cfg.prompts else f"{DATA / 'true_reward.py'}:true_reward"
    judge = FunctionScorer(cfg.judge or truth) if cfg.judge or truth else None
    tokenizer = common.load_tokenizer(cfg.policy, "python sft.py", cfg.trust_remote_code)
    policy = common.load_causal_lm(cfg.policy, tokenizer, "python sft.py", **options)
    scorers = []
    for spec in cfg.reward:
        scorers.append(load_scorer(spec, policy, tokenizer, cfg.microbatch_size, **options))
        if scorers[-1].needs_scale and len(cfg.reward) > 1:
            raise UserError(f"{spec} brings no scale, so its score can't be added to others")
    rows = encode_prompts(harness.read_rows(files, [("prompt",)]), cfg, tokenizer)
    for model in (policy, *(scorer.model for scorer in scorers)):
        if model is not None:  # functions have none
            common.to_device(model.requires_grad_(False), device, cfg.dtype)
    longest = max(len(row.prompt_ids) for row in rows) + cfg.response_length
    common.check_context(policy, longest)
    path.parent.mkdir(parents=True, exist_ok=True)
    open(path, "a").close()  # if that fails, hours of sampling would be lost
    harness.current["phase"] = "rollout"
    texts, scores, truths = sample_all(cfg, policy, tokenizer, scorers, judge, rows)
    print(f"\n{'n':>6}{'KL at most':>14}{'score':>10}{'true reward' if judge else '':>14}")
    for n in sorted({cfg.n, *(2**i for i in range(cfg.n.bit_length()))}):
        true = f"{best_of(scores, truths, n).mean():>14.3f}" if judge else ""
        print(f"{n:>6}{kl_bound(n):>14.2f}{best_of(scores, scores, n).mean():>10.3f}{true}")
    with open(path, "w", encoding="utf-8") as file:
        for row, some, own in zip(rows, texts, scores):
            best = own.argmax().item()  # eq. 1
            line = row | {"completion": some[best], "score": own[best].item()}
            file.write(json.dumps(line) + "\n")
    print(f"\nwrote {path}, the best of {cfg.n} to each of {len(rows)} prompts")


if __name__ == "__main__":
    harness.run_stage(main, Config, __doc__.splitlines()[0])
