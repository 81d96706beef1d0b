"""The patches of examples/forks apply to ppo.py as it is, are small, and do what they say."""

import dataclasses
import importlib.util
import re
import sys

import pytest
import torch
from conftest import PROMPTS, ROOT, read_rows, write_rows

import common

sys.path.append(str(ROOT / "examples" / "beside_ppo"))
import compare  # noqa: E402

FORKS = ROOT / "examples" / "forks"
DEAD_FLAGS = {"advantage", "gamma", "lam", "critic", "critic_lr", "value_coef", "value_clip_eps"}
DEAD_COLUMNS = {"explained_variance", "value_loss", "critic_grad_norm"}


def load_fork(patch, work):
    """Returns the patched ppo.py as a module; all else is that of this project."""
    name = f"ppo_{patch.stem}"
    spec = importlib.util.spec_from_file_location(name, compare.forked(work, patch) / "ppo.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    return {path.stem: load_fork(path, tmp_path_factory.mktemp("forks")) for path in FORKS.glob("*.patch")}


def check_size(patch, most):
    """A patch adds as many lines as the page beside it says, not too many, and keeps to 100 columns."""
    added = re.findall(r"^\+(?!\+\+ )(.*)", patch.read_text(encoding="utf-8"), re.M)
    assert len(added) <= most and max(map(len, added)) <= 100, len(added)
    readme = (patch.parent / "README.md").read_text(encoding="utf-8")
    assert f"| `{patch.name}` | {len(added)} |" in readme, len(added)


def flags_of(world, output, reward, *more):
    return [
        "--policy", world / "sft", "--reward", reward, "--prompts", world / "prompts.jsonl", "--eval-prompts",
        world / "prompts.jsonl", "--iterations", 2, "--batch-size", 8, "--minibatch-size", 4, "--response-length", 6,
        "--device", "cpu", "--lr", 1e-3, "--output", output, *more,
    ]


def steps_of(output):
    return [row for row in read_rows(output / "metrics.jsonl") if "split" not in row]


@pytest.mark.parametrize("name", ["rloo", "grpo", "kl_in_loss"])
def test_a_patch_adds_at_most_25_lines_as_its_readme_says(name):
    check_size(FORKS / f"{name}.patch", 25)


@pytest.mark.parametrize("name, k", [("rloo", 4), ("grpo", 8)])
def test_a_fork_without_a_critic_has_none_in_its_models_flags_and_log_and_is_continued(
    name, k, forks, world, tmp_path, run_stage
):
    (tmp_path / "mine.py").write_text(
        "prompts_seen = []\ndef length(prompts, responses, rows):\n"
        "    prompts_seen.append(prompts)\n    return [len(text) for text in responses]\n"
    )
    different = write_rows(
        tmp_path / "different.jsonl", [{"prompt": f"{row['prompt']} {i}"} for i, row in enumerate(PROMPTS)]
    )
    flags = flags_of(world, tmp_path / "out", world / "reward_model", "--explain")
    flags += ["--reward", f"{tmp_path / 'mine.py'}:length", world / "reward_model"]
    flags += ["--prompts", different, "--eval-prompts", different]
    status, out, err = run_stage(forks[name], *flags)
    assert status == 0 and " critic" not in out and not (tmp_path / "out" / "critic").exists(), err
    rows = steps_of(tmp_path / "out")
    for row in rows:
        assert row["grad_norm"] > 0 and row["policy_loss"] != 0
        assert row["ratio_first"] == pytest.approx(1, abs=1e-6)
    assert len(rows) == 2 and not DEAD_COLUMNS & {*rows[0]}
    fields = {field.name: field for field in dataclasses.fields(forks[name].Config)}
    assert not DEAD_FLAGS & {*fields} and fields["samples_per_prompt"].default == k
    common.load_causal_lm(str(tmp_path / "out"), common.load_tokenizer(str(tmp_path / "out")))
    [seen] = [x.prompts_seen for x in [*sys.modules.values()] if getattr(x, "__file__", 0) == f"{tmp_path}/mine.py"]
    rollouts = [batch for batch in seen if len(batch) == 8 and batch[0] == batch[1]]
    assert len(rollouts) == 2  # of the calls in training; evaluations have each prompt once
    for batch in rollouts:
        assert all(len({*batch[i : i + k]}) == 1 for i in range(0, 8, k))
    status, _, err = run_stage(forks[name], *flags, "--resume", "--iterations", 3)
    assert status == 0 and len(steps_of(tmp_path / "out")) == 3, err
    status, _, err = run_stage(forks[name], *flags, "--overwrite", "--samples-per-prompt", 1)
    assert status == 2 and "--samples-per-prompt is 1; it must be" in err


REWARDS = torch.tensor([[1.0, 2], [3, 0], [5, 9], [7, 1], [0, 4], [2, 0]])
MASK = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1], [1, 1], [1, 0]]).bool()


def test_the_advantages_by_hand(forks):
    # The totals are 3, 3, 14 and 8, 4, 2. The means of the two others: 8.5, 8.5, 3 and 3, 5, 6.
    by_hand = [[-5.5, -5.5], [-5.5, 0], [11, 11], [5, 5], [-1, -1], [-4, 0]]
    assert forks["rloo"].rloo(REWARDS, MASK, 3).tolist() == by_hand
    # The groups' means are 20/3 and 14/3. The squared differences from them add up to 242/3 and 56/3, so the
    # standard deviations are sqrt(121/3) and sqrt(28/3).
    first, second = (121 / 3) ** 0.5 + 1e-4, (28 / 3) ** 0.5 + 1e-4
    by_hand = [-11 / 3 / first, -11 / 3 / first, 22 / 3 / first, 10 / 3 / second, -2 / 3 / second, -8 / 3 / second]
    advantages = forks["grpo"].grpo(REWARDS, MASK, 3)
    assert advantages[:, 0].tolist() == pytest.approx(by_hand, rel=1e-5)
    assert torch.equal(advantages[:, 1], torch.where(MASK[:, 1], advantages[:, 0], 0.0))
    assert not forks["grpo"].grpo(torch.ones(4, 2), torch.ones(4, 2).bool(), 2).any()  # all k alike: nothing is learned


@pytest.mark.parametrize("name, more", [("kl_in_loss", ["--value-coef", 0]), ("grpo", [])])
def test_the_kl_in_the_loss_pulls_towards_the_reference(name, more, forks, world, tmp_path, run_stage, monkeypatch):
    """With a constant reward only the KL acts: a policy that has been moved away comes back, with beta 0 not."""
    load = forks[name].load_models
    (tmp_path / "zero.py").write_text("def zero(prompts, responses, rows):\n    return [0] * len(rows)\n")

    def moved(cfg, tokenizer, longest, device):
        models = load(cfg, tokenizer, longest, device)
        torch.manual_seed(9)
        with torch.no_grad():
            for weight in models[0].parameters():
                weight += 0.03 * torch.randn_like(weight)
        return models

    monkeypatch.setattr(forks[name], "load_models", moved)
    more = [*more, "--iterations", 18, "--batch-size", 24, "--minibatch-size", 24, "--missing-eos-penalty", 0]
    first, last = {}, {}
    for beta in (1, 0):
        flags = flags_of(world, tmp_path / f"{beta}", f"{tmp_path / 'zero.py'}:zero", "--kl-coef", beta, *more)
        status, _, err = run_stage(forks[name], *flags)
        assert status == 0, err
        kls = [row["kl_k3"] for row in steps_of(tmp_path / f"{beta}")]
        first[beta], last[beta] = kls[0], sum(kls[-8:]) / 8  # of 24 responses each: noisy
    assert last[1] < 0.5 * first[1] and last[1] < 0.6 * last[0], (first, last)


@pytest.mark.parametrize("name", ["kl_in_loss", "grpo"])
def test_the_gradient_of_k3_is_that_of_the_other_kl_and_the_ratio_mends_it(name):
    """The README's claim, by enumeration: a mean over the policy's own tokens, which are drawn
    without gradient.
    """
    generator = torch.Generator().manual_seed(3)
    logits, ref = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logp, ref = logits.log_softmax(0), ref.log_softmax(0)
    patch = (FORKS / f"{name}.patch").read_text(encoding="utf-8")
    expression = re.search(r"^\+ +k3 = (.*?)  #", patch, re.M)[1]
    k3 = eval(expression, {"log_ref_ratio": ref - logp, "torch": torch})
    own, ratio = logp.exp().detach(), (logp - logp.detach()).exp()
    to_ref, from_ref = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()

    def gradient(loss):
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    torch.testing.assert_close((own * k3).sum(), to_ref)
    torch.testing.assert_close(gradient((own * k3).sum()), gradient(from_ref))
    torch.testing.assert_close(gradient((own * ratio * k3).sum()), gradient(to_ref))
    assert (gradient(to_ref) - gradient(from_ref)).abs().max() > 0.05
