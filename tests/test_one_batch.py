"""docs/one_batch.md: its numbers are those of docs/one_batch/numbers.json, and these agree.

The oracle is float64 arithmetic written here, in other formulas than the code's if there are any.
"""

import json
import re
import signal
import string
import sys

import pytest
import torch
from conftest import ROOT, read_rows
from test_cli import ppo_flags

import common
import harness
import ppo
from data.true_reward import ANIMALS

sys.path.insert(0, str(ROOT / "docs"))
import one_batch  # noqa: E402

FOLDER = ROOT / "docs" / "one_batch"
RECORD = json.loads((FOLDER / "numbers.json").read_text(encoding="utf-8"))
BATCH, ONE, SETTINGS = RECORD["batch"], RECORD["response"], RECORD["settings"]
PAGE, EPS, EPOCHS = RECORD["page"], SETTINGS["clip_eps"], SETTINGS["ppo_epochs"]
PER_EPOCH = SETTINGS["batch_size"] // SETTINGS["minibatch_size"]
TEMPLATES = sorted((ROOT / "docs").glob("one_batch*.template.md"))
ROUNDED = 1e-4  # the batch has four decimals, so a number is off by up to half of it
each_page = pytest.mark.parametrize("template", TEMPLATES, ids=[path.name for path in TEMPLATES])


def flat(rows):
    return torch.tensor([x for row in rows for x in row], dtype=torch.float64)


# === The pages ====================================================================================
def test_redraw_makes_the_same_pages_and_numbers_without_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "main", None)
    monkeypatch.setattr(one_batch, "new_figure", lambda height: None)
    monkeypatch.setattr(one_batch, "PICTURES", {})
    folder = tmp_path / "one_batch"
    folder.mkdir()
    (folder / "numbers.json").write_text(json.dumps(RECORD | {"page": {}}), encoding="utf-8")
    one_batch.main(one_batch.Config(redraw=True, folder=str(folder)))
    for path in [folder / "numbers.json", *tmp_path.glob("*.md")]:
        kept = ROOT / "docs" / path.relative_to(tmp_path)
        assert path.read_text(encoding="utf-8") == kept.read_text(encoding="utf-8"), path.name
    assert len(list(tmp_path.glob("*.md"))) == len(TEMPLATES) == 2


@each_page
def test_the_template_has_no_number_of_its_own(template):
    text = template.read_text(encoding="utf-8")
    text = re.sub(r"```.*?```|`[^`{]*`|\]\([^)]*\)", " ", text, flags=re.S)
    bare = "".join(piece for piece, *_ in string.Formatter().parse(text))  # without the fields
    others = r"([Ee]qs?\.|式) \d\w?((、| and )\d)?|sections?\s\d|第 \d 节|float32|bf16|\bc[12]\b"
    bare = re.sub(rf"(?m)^## \d\. |{others}", " ", bare)
    assert set(re.findall(r"\d+(?:\.\d+)?", bare)) <= {"0", "1"}  # t = 0, ratio 1, i + 1


@each_page
def test_every_name_on_the_page_exists(template):
    text = re.sub(r"```.*?```", " ", template.read_text(encoding="utf-8"), flags=re.S)
    known = {*vars(ppo), *vars(common), *ppo.Batch.__dataclass_fields__, *RECORD["metrics"]}
    known |= {harness.flag_of(name) for name in one_batch.Config.__dataclass_fields__}
    known |= {"reward_mean", "reward_std", "ppo.main", "python ppo.py", "--advantage bandit"}
    spans = [span for span in re.findall(r"`([^`]+)`", text) if "{" not in span]
    for span in spans:
        is_file = (ROOT / span).is_file() or (ROOT / "docs" / span).is_file()
        assert is_file if re.search(r"^[^ ]+\.(py|json|md)$", span) else span in known, span
    in_common = re.findall(r"`(\w+)` in `common\.py`|`common\.py` 的 `(\w+)`", text)
    assert len(spans) > 40 and in_common and all(hasattr(common, a or b) for a, b in in_common)
    named = re.findall(r"(?:[Ee]qs?\. |式 |and |、)(\d\w?)", text)
    assert {*"12345678"} <= set(named) <= set(re.findall(r"^\((\d\w?)\)", ppo.__doc__, re.M))
    pictures = re.findall(r"!\[[^]]*\]\(one_batch/(\S+\.png)\)\n\n\*[^*]*`[^*]*\*\n", text)
    assert pictures == list(one_batch.PICTURES) == sorted(path.name for path in FOLDER.glob("*.png"))


# === The record ===================================================================================
def test_the_run_had_the_settings_that_are_todays_defaults():
    defaults = one_batch.Config()
    assert SETTINGS == {name: getattr(defaults, name) for name in SETTINGS}
    assert {*one_batch.SETTINGS, "iteration"} == set(SETTINGS) and ONE["row"] == defaults.row


def test_rewards_advantages_returns_and_whitening_follow_from_equations_1_to_3():
    beta, gamma, lam = BATCH["kl_coef"], SETTINGS["gamma"], SETTINGS["lam"]
    names = ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "whitened")
    rows = [ONE] + [{name: BATCH[name][i] for name in names} for i in range(SETTINGS["batch_size"])]
    finals = [ONE["score"], *BATCH["final_scores"]]
    for row, final in zip(rows, finals):
        digits = 1e-6 if row is ONE else ROUNDED
        rewards = [-beta * (x - y) for x, y in zip(row["logprobs"], row["ref_logprobs"])]
        rewards[-1] += final  # all responses finished, so nothing is subtracted
        assert row["rewards"] == pytest.approx(rewards, abs=2 * digits)
        next_values = [*row["values"][1:], 0.0]
        deltas = [r + gamma * w - v for r, w, v in zip(rewards, next_values, row["values"])]
        powers = [(gamma * lam) ** k for k in range(len(deltas))]  # A_t = sum_k (gamma lam)^k delta_{t+k}: no recursion
        advantages = [sum(p * d for p, d in zip(powers, deltas[t:])) for t in range(len(deltas))]
        assert row["advantages"] == pytest.approx(advantages, abs=20 * digits)  # a long sum
    every, its = flat(BATCH["advantages"]), rows[1 + ONE["row"]]
    whitened = (every - every.mean()) / every.std(correction=0)
    torch.testing.assert_close(flat(BATCH["whitened"]), whitened, rtol=0, atol=3 * ROUNDED)
    assert all(BATCH["ended"]) and "".join(ONE["tokens"][:-1]) == ONE["text"]
    for name in names:
        assert its[name] == pytest.approx(ONE[name], abs=ROUNDED), name
    returns = [a + v for a, v in zip(ONE["advantages"], ONE["values"])]
    assert ONE["returns"] == pytest.approx(returns, abs=2e-6)


def test_each_epoch_goes_over_all_rows_and_its_first_step_saw_the_recorded_ratios():
    before = [BATCH["logprobs"], *BATCH["new_logprobs"]]  # each epoch
    for epoch in range(EPOCHS):
        parts = BATCH["minibatches"][epoch * PER_EPOCH : (epoch + 1) * PER_EPOCH]
        assert sorted(sum(parts, [])) == list(range(SETTINGS["batch_size"]))
        columns = [before[epoch], BATCH["logprobs"], BATCH["whitened"]]
        new, old, white = [flat(rows[i] for i in parts[0]) for rows in columns]
        ratio, step = (new - old).exp(), RECORD["steps"][epoch * PER_EPOCH]
        gains = torch.minimum(ratio * white, ratio.clamp(1 - EPS, 1 + EPS) * white)
        outside = ((ratio - 1).abs() > EPS).double()
        expected = {"ratio": ratio, "policy_loss": -gains, "clip_fraction": outside}
        for name, x in (expected | {"approx_kl": ratio - 1 - ratio.log()}).items():
            assert step[name] == pytest.approx(x.mean().item(), abs=1e-3), name


def test_a_token_is_called_cut_exactly_where_policy_loss_has_no_gradient():
    old, white = flat(BATCH["logprobs"]), flat(BATCH["whitened"])
    table = PAGE["rows_of_epochs"].splitlines()
    for epoch, (rows, line) in enumerate(zip(BATCH["new_logprobs"], table, strict=True), 1):
        ratio = (flat(rows) - old).exp().requires_grad_()
        ppo.policy_loss(ratio, white, EPS).sum().backward()
        pairs = zip(ratio.tolist(), white.tolist())
        cut = torch.tensor([one_batch.is_cut(r, a, EPS) for r, a in pairs])
        assert cut.equal((ratio.grad == 0) & (white != 0)) and 0 < cut.sum() < len(cut)
        assert cut[ratio.argmin()] and cut[ratio.argmax()]  # "cut tokens go on moving"
        kl, outside = (ratio - 1 - ratio.log()).mean().item(), ((ratio - 1).abs() > EPS).double()
        cells = [f"{epoch}", f"{kl:.4f}", f"{ratio.min().item():.4f}", f"{ratio.max().item():.2f}"]
        cells += [f"{outside.mean():.1%}", f"{cut.double().mean():.1%}"]
        assert line == f"| {' | '.join(cells)} |"


def test_numbers_of_the_page_are_those_computed_by_hand_from_the_record():
    kl = flat(BATCH["logprobs"]) - flat(BATCH["ref_logprobs"])
    summed = torch.stack([x.sum() for x in kl.split([len(row) for row in BATCH["values"]])])
    raw, white = flat(BATCH["advantages"]), flat(BATCH["whitened"])
    returns, (p, r) = flat(BATCH["values"]) + raw, BATCH["columns"]
    unexplained = (returns - flat(BATCH["new_values"])).var(correction=0)
    scores = torch.tensor([BATCH["final_scores"], BATCH["true_rewards"]], dtype=torch.float64)
    by_hand = {
        "N": len(kl), "kl_per_token": kl.mean(), "lowest_kl": summed.min(), "kl": summed.mean(),
        "padding_share": 1 - (len(kl) + sum(BATCH["prompt_lengths"])) / (len(summed) * (p + r)),
        "prompt_pads": ONE["prompt_ids"].count(ONE["special_ids"]["pad"]), "mean_advantage": raw.mean(),
        "kl_error": summed.std(correction=0) / len(summed) ** 0.5, "deviation": raw.std(correction=0),
        "negative_tokens": (kl < 0).double().mean(), "negative_responses": (summed < 0).sum(),
        "sign_changed": (raw.sign() != white.sign()).double().mean(), "delta_max": max(ONE["deltas"][:-1]),
        "explained_variance": 1 - raw.var(correction=0) / returns.var(correction=0),
        "explained_after": 1 - unexplained / returns.var(correction=0), "correlation": torch.corrcoef(scores)[0, 1],
        "bandit": PAGE["r_sum"] - ONE["values"][0], "reaching_first": 0.95 ** (len(ONE["ids"]) - 1),
    }
    for name, value in by_hand.items():
        assert PAGE[name] == pytest.approx(float(value), rel=1e-3, abs=1e-6), name
    lengths, old = [len(row) for row in BATCH["values"]], flat(BATCH["logprobs"])
    log_ratio = flat(BATCH["new_logprobs"][-1]) - old
    ratio = log_ratio.exp()
    k3 = (ratio - 1 - log_ratio) / (ratio - 1 - log_ratio).sum()  # shares of approx_kl
    cut = torch.where(white > 0, ratio > 1 + EPS, ratio < 1 - EPS)
    shares = {"highest": k3[ratio.argmax()], "lowest": k3[ratio.argmin()], "cut": k3[cut].sum()}
    for name, share in shares.items():
        assert PAGE[f"{name}_share"] == pytest.approx(share.item(), abs=1e-3), name
    assert PAGE["mean_length"] == pytest.approx(sum(lengths) / len(lengths)) and PAGE["T"] > PAGE["mean_length"]
    assert PAGE["r_cut"] == cut.split(lengths)[ONE["row"]].sum() and PAGE["r_cut"] / PAGE["T"] > PAGE["last_cut"]
    assert PAGE["delta_token"] in ANIMALS and PAGE["delta_token"] not in ONE["prompt"]
    log = flat([row[PAGE["a_t"]]] for row in [ONE["logprobs"], *ONE["new_logprobs"]])
    own = [ONE["row"] in rows for rows in BATCH["minibatches"]]
    outside = (log[:-1][own] - log[0]).exp() > 1 + EPS  # as its own steps began; its A is above 0
    assert PAGE["a_pushed"] == EPOCHS - outside.sum() and 0 < outside.sum() < len(outside)


def test_the_page_for_readers_of_blog_posts_says_of_extreme_ratios_what_the_record_says():
    page = " ".join((ROOT / "docs" / "from_a_blog_post.md").read_text(encoding="utf-8").split())
    old, white = flat(BATCH["logprobs"]), flat(BATCH["whitened"])
    ratios = [(flat(rows) - old).exp() for rows in BATCH["new_logprobs"]]
    low, high = ratios[-1].argmin(), ratios[-1].argmax()
    assert white[low] < 0 < white[high] and f"each of the {len(ratios)} epochs both were cut" in page
    assert all(ratio[low] < 1 - EPS and ratio[high] > 1 + EPS for ratio in ratios)
    low_name, high_name = f"{ratios[-1][low]:.4f}", f"{int(ratios[-1][high])}"
    assert f"Is a ratio of {low_name} or {high_name} on one token" in page
    shares = [f"{PAGE[name]:.0%}".replace("%", " %") for name in ("highest_share", "lowest_share", "cut_share")]
    assert f"{shares[0]} of it comes from the token at {high_name} alone" in page
    assert f", {shares[1]} from the one at {low_name}" in page
    cut = f"{PAGE['last_cut'] * 100:.1f} % of the tokens"
    assert f"and {shares[2]} from all tokens that are cut ({cut})" in page


# === The script ===================================================================================
def test_recording_changes_nothing_of_a_run(world, tmp_path, run_stage, monkeypatch):
    pytest.importorskip("matplotlib")
    more = ["--judge", f"{ROOT / 'data' / 'true_reward.py'}:true_reward", "--iterations", 2, "--response-length", 12]
    flags = ppo_flags(world, tmp_path / "ppo", *more, "--seed", 1)
    assert run_stage(ppo, *flags)[0] == 0
    plain = [row for row in read_rows(tmp_path / "ppo" / "metrics.jsonl") if "split" not in row][1]
    own = ["--iteration", 2, "--row", 3, "--folder", tmp_path / "new"]
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # the run ends in its loop
    one_batch.main(harness.parse_args(one_batch.Config, "", [*map(str, flags + own)]))
    record = json.loads((tmp_path / "new" / "numbers.json").read_text(encoding="utf-8"))
    assert plain["approx_kl"] > 1e-6 and record["metrics"].items() <= one_batch.to_digits(plain).items()
    assert record["response"]["row"] == 3 and len(record["batch"]["minibatches"]) == 4 * 8 / 4
    assert {path.name for path in (tmp_path / "new").glob("*.png")} == set(one_batch.PICTURES)


@pytest.mark.parametrize("flags, problem", [
    ({"iteration": 31}, "--iteration"), ({"row": 128}, "--row"), ({"advantage": "bandit"}, "gae"),
    ({"max_approx_kl": 0.1}, "all optimizer steps"), ({"prompts": ["mine.jsonl"]}, "--judge"),
    ({"redraw": True}, "pip install matplotlib"),
])
def test_what_the_page_cannot_show_is_refused_before_the_run(flags, problem, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    if "redraw" not in flags:
        monkeypatch.setattr(one_batch, "new_figure", lambda height: None)
    monkeypatch.setattr(ppo, "main", None)
    with pytest.raises(common.UserError, match=problem):
        one_batch.main(one_batch.Config(**flags))
