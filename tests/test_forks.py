"""The patches of examples/forks apply to ppo.py as it is, are small, and run."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_rows, tiny_lm

import common

FORKS = ROOT / "examples" / "forks"


def changed_lines(patch):
    return len(re.findall(r"^[+-](?![+-]{2} )", patch.read_text(encoding="utf-8"), re.M))


def forked(tmp_path, *names):
    """A copy of the project with the patches applied."""
    project = tmp_path / "project"
    shutil.copytree(ROOT, project, ignore=lambda folder, files: {file for file in files if file in ("ckpt", ".git", ".venv", "tests", "results", "__pycache__")})
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    for name in names:
        subprocess.run(["git", "apply", str(FORKS / name)], cwd=project, check=True)
    return project


def run_fork(project, world, output, *more):
    reward = [] if "--reward" in more else ["--reward", world / "reward_model"]
    flags = ["--policy", world / "sft", *reward, "--prompts", world / "prompts.jsonl", "--eval-prompts", world / "prompts.jsonl", "--iterations", 2,
             "--batch-size", 8, "--minibatch-size", 4, "--response-length", 6, "--device", "cpu", "--lr", "1e-3", "--output", output, *more]
    run = subprocess.run([sys.executable, "ppo.py", *map(str, flags)], cwd=project, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return [row for row in read_rows(output / "metrics.jsonl") if "split" not in row], run.stdout


@pytest.mark.parametrize("name", [path.name for path in sorted(FORKS.glob("*.patch"))])
def test_each_patch_has_at_most_40_changed_lines_and_as_many_as_its_readme_says(name):
    number = changed_lines(FORKS / name)
    assert number <= 40
    assert re.search(rf"^\| `{re.escape(name)}` \| {number} \|", (FORKS / "README.md").read_text(encoding="utf-8"), re.M), number


def test_rloo_trains_without_a_critic_on_k_responses_to_each_prompt(world, tmp_path):
    project = forked(tmp_path, "rloo.patch")
    (project / "keep.py").write_text(
        f"import json\ndef keep(prompts, responses, rows):\n    with open({str(tmp_path / 'seen')!r}, 'a') as file:\n"
        "        file.write(json.dumps(prompts) + '\\n')\n    return [float(len(response)) for response in responses]\n"
    )
    rows, out = run_fork(project, world, tmp_path / "out", "--reward", "keep.py:keep", "--samples-per-prompt", 4)
    assert len(rows) == 2 and all(row["critic_grad_norm"] is None and row["value_loss"] == 0 and row["grad_norm"] > 0 and row["ratio_first"] == pytest.approx(1, abs=1e-6) for row in rows)
    assert not (tmp_path / "out" / "critic").exists() and "critic" not in out.split("EOS")[0].replace("critic lr", "")
    batches = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    rollouts = [batch for batch in batches if batch[0] == batch[3] and batch[4] == batch[7] and len(batch) == 8]
    assert len(rollouts) >= 2 and any(batch[3] != batch[4] for batch in rollouts)


def test_the_leave_one_out_advantage_by_hand(tmp_path):
    program = (
        "import torch, ppo\n"
        "rewards = torch.tensor([[1., 2.], [3., 0.], [5., 9.], [7., 1.], [0., 4.], [2., 2.]])\n"
        "mask = torch.tensor([[True, True], [True, False], [True, True], [True, True], [True, True], [True, False]])\n"
        "print(ppo.rloo(rewards, rewards, mask, 3)[0].tolist())"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=forked(tmp_path, "rloo.patch"), capture_output=True, text=True)
    # paid 3, 3, 14 and 8, 4, 2: minus the means of the two others, 8.5, 8.5, 3 and 3, 5, 6
    assert json.loads(run.stdout) == [[-5.5, -5.5], [-5.5, 0.0], [11.0, 11.0], [5.0, 5.0], [-1.0, -1.0], [-4.0, 0.0]], run.stderr


def test_the_kl_in_the_loss_pulls_towards_the_reference(world, tmp_path):
    """With a constant reward only the KL acts: a policy that has been moved away comes back, and with beta 0 it does not."""
    project = forked(tmp_path, "kl_in_loss.patch")
    (project / "zero.py").write_text("def zero(prompts, responses, rows):\n    return [0.0] * len(rows)\n")
    away = (
        "import common, ppo, torch\nload = ppo.load_models\ndef moved(*arguments):\n    models = load(*arguments)\n    torch.manual_seed(9)\n"
        "    with torch.no_grad():\n        for p in models[0].parameters():\n            p += 0.03 * torch.randn_like(p)\n    return models\nppo.load_models = moved\n"
        "import sys\nfrom plumbing import cli\nwith cli.command_line():\n    ppo.main(cli.parse_args(ppo.Config, ''))\n"
    )
    (project / "away.py").write_text(away)
    kls = {}
    for beta in ("1.0", "0"):
        flags = ["--policy", world / "sft", "--reward", "zero.py:zero", "--prompts", world / "prompts.jsonl", "--eval-prompts", world / "prompts.jsonl", "--iterations", 12,
                 "--batch-size", 24, "--minibatch-size", 24, "--response-length", 6, "--missing-eos-penalty", 0, "--value-coef", 0, "--device", "cpu", "--lr", "1e-3", "--kl-coef", beta, "--output", tmp_path / beta]
        run = subprocess.run([sys.executable, "away.py", *map(str, flags)], cwd=project, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        kls[beta] = [row["kl_k3"] for row in read_rows(tmp_path / beta / "metrics.jsonl") if "split" not in row]
    ended = {beta: sum(values[-8:]) / 8 for beta, values in kls.items()}  # of 24 responses each: noisy
    assert ended["1.0"] < 0.5 * kls["1.0"][0] and ended["1.0"] < 0.6 * ended["0"], kls


def test_both_patches_fit_together(world, tmp_path):
    rows, _ = run_fork(forked(tmp_path, "rloo.patch", "kl_in_loss.patch"), world, tmp_path / "out")
    assert len(rows) == 2
    assert common.load_causal_lm(str(tmp_path / "out"), common.load_tokenizer(str(tmp_path / "out"))).num_parameters() >= tiny_lm().num_parameters()


def test_the_gradient_of_k3_is_that_of_the_other_kl_and_the_ratio_mends_it():
    """What the README of the forks says, by enumeration: a mean over the policy's own tokens, which the gradient doesn't reach."""
    generator = torch.Generator().manual_seed(3)
    logits, ref = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    logp, ref = logits.log_softmax(0), ref.log_softmax(0)
    gradient = lambda loss: torch.autograd.grad(loss, logits, retain_graph=True)[0]
    log_ratio, own = ref - logp, logp.exp().detach()
    of_patch = re.search(r"^\+.* kl_coef \* \((.*)\)$", (FORKS / "kl_in_loss.patch").read_text(encoding="utf-8"), re.M)[1]
    k3, ratio = eval(of_patch, {"log_ratio": log_ratio}), (logp - logp.detach()).exp()
    to_ref, from_ref = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()
    torch.testing.assert_close((own * k3).sum(), to_ref)
    torch.testing.assert_close(gradient((own * k3).sum()), gradient(from_ref))
    torch.testing.assert_close(gradient((own * ratio * k3).sum()), gradient(to_ref))
    assert (gradient(to_ref) - gradient(from_ref)).abs().max() > 0.05
