"""docs/one_batch.md: its numbers are those of docs/one_batch/numbers.json, and these agree with each other.

The oracle is float64 arithmetic written here, in other formulas than the code's where there are any.
"""

import ast
import inspect
import json
import math
import re
import string
import struct
import sys

import pytest
import torch
from conftest import ROOT, read_rows, tiny_lm

import common
import ppo
from data.true_reward import ANIMALS
from plumbing import cli

sys.path.insert(0, str(ROOT / "docs"))
import one_batch  # noqa: E402

FOLDER = ROOT / "docs" / "one_batch"
RECORD = json.loads((FOLDER / "numbers.json").read_text(encoding="utf-8"))
BATCH, ONE, SETTINGS = RECORD["batch"], RECORD["response"], RECORD["settings"]
TEMPLATES = sorted((ROOT / "docs").glob("one_batch*.template.md"))
ROUNDED = 1e-4  # the batch has four decimals, so a number is off by up to half of it
FLAGS = ["--device", "cpu", "--iterations", 3, "--batch-size", 8, "--minibatch-size", 4, "--response-length", 12]


def page_of(template):
    return template.with_name(template.name.replace(".template", "")).read_text(encoding="utf-8")


def read(template):
    """Its text, in which a Chinese one names equations and functions as the English one does."""
    text = re.sub(r"式 (\d\w?)、(\d)", r"eqs. \1 and \2", template.read_text(encoding="utf-8"))
    text = re.sub(r"式 (\d\w?)", r"eq. \1", text.replace("没有对应的公式", "No equation"))
    return re.sub(r"(eq\. \d)（(`\w+`)）", r"\1 (\2)", re.sub(r"(`common\.py`) 的 (`\w+`)", r"\2 of \1", text))


def padded(rows):
    """Rows of unlike lengths as (B, R) float64, 0 behind them."""
    rows = [torch.tensor(row, dtype=torch.float64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def mask_of(rows):
    return torch.nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)


def flat(rows):
    return torch.tensor([x for row in rows for x in row], dtype=torch.float64)


def advantages_by_sums(rewards, values, gamma, lam):
    """A_t as the sum over k of (gamma lam)^k delta_{t+k}: no recursion."""
    deltas = [r + gamma * v_next - v for r, v_next, v in zip(rewards, [*values[1:], 0.0], values)]
    return deltas, [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


# === The page =====================================================================================
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_the_page_is_its_template_filled_with_the_recorded_numbers(template):
    assert page_of(template) == one_batch.fill(template.read_text(encoding="utf-8"), RECORD["page"])


def test_the_recorded_numbers_of_the_page_are_those_that_the_record_gives_today():
    today = one_batch.to_digits(one_batch.summary(RECORD))
    assert today.keys() == RECORD["page"].keys()
    for name, value in today.items():
        assert value == (pytest.approx(RECORD["page"][name], rel=1e-5) if isinstance(value, float) else RECORD["page"][name]), name


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_the_template_has_no_number_of_its_own(template):
    text = re.sub(r"```.*?```|`[^`{]*`|\]\([^)]*\)", " ", read(template), flags=re.S)
    bare = "".join(piece for piece, *_ in string.Formatter().parse(text))  # without the fields
    bare = re.sub(r"(?m)^## \d\. |[Ee]qs?\. \d\w?( and \d)?|eq\. \d|sections? \d(?: and \d)?|float32|bf16|\bc[12]\b|第 \d 节", " ", bare)
    assert set(re.findall(r"\d+(?:\.\d+)?", bare)) <= {"0", "1"}  # t = 0, ratio 1, i + 1


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_every_name_on_the_page_exists(template):
    text = re.sub(r"```.*?```", " ", read(template), flags=re.S)
    flags = {cli.flag_of(name) for name in ppo.Config.__dataclass_fields__} | {"--redraw"}
    known = {*vars(ppo), *vars(common), *vars(ppo.Batch)["__dataclass_fields__"], *RECORD["metrics"]}
    spans = [span for span in re.findall(r"`([^`]+)`", text) if "{" not in span]
    assert len(spans) > 40
    for span in spans:
        if span.startswith("--"):
            assert span.split()[0] in flags, span
        elif span.startswith("python "):
            assert all((ROOT / path).is_file() for path in re.findall(r"\S+\.py", span)), span
        elif re.search(r"\.(py|json|md)$", span):
            assert (ROOT / span).is_file() or (ROOT / "docs" / span).is_file(), span
        else:
            assert span.removeprefix("ppo.") in known, span
    for function in re.findall(r"`(\w+)` (?:in|of) `common\.py`", text):
        assert callable(getattr(common, function)) and not hasattr(ppo, function)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_every_picture_names_its_equation_and_its_function(template):
    text = read(template)
    equations = set(re.findall(r"^\((\d\w?)\)", ppo.__doc__, re.M))
    named = set(re.findall(r"[Ee]qs?\. (\d\w?)", text)) | set(re.findall(r"[Ee]qs\. \d and (\d)", text))
    assert {"1", "2", "3", "4", "5", "6", "7", "8"} <= named <= equations
    captions = re.findall(r"!\[[^]]*\]\(one_batch/(\S+)\)\n\n\*(.*?)\*\n", text, re.S)
    assert [name for name, _ in captions] == list(one_batch.PICTURES)
    for name, caption in captions:
        functions = [f for f in re.findall(r"`(\w+)`", caption) if hasattr(ppo, f)]
        assert functions and ("No equation" in caption or re.search(r"eqs?\. \d", caption, re.I)), name
        assert all(inspect.isfunction(getattr(ppo, function)) for function in functions)
        its = set(re.findall(r"\d", " ".join(re.findall(r"[Ee]qs?\. \d(?: and \d)?", caption))))
        for function in functions:  # of those that mark an equation, it's this one
            marked = re.findall(r"[Ee]qs?\. (\d)", inspect.getsource(getattr(ppo, function)))
            assert not marked or its & {*marked}, (name, function)
    for number, function in re.findall(r"eq\. (\d) \(`(\w+)`\)", re.sub(r"\s+", " ", text)):
        assert re.search(rf"[Ee]q\. {number}", inspect.getsource(getattr(ppo, function))), function


def test_the_pictures_are_those_of_the_script_small_and_none_is_left_over():
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.name != "numbers.json"}
    assert set(files) == set(one_batch.PICTURES)
    for name, content in files.items():
        assert content[:8] == b"\x89PNG\r\n\x1a\n", name
        assert struct.unpack(">I", content[16:20])[0] >= 1200, name  # sharp at 700 px
    assert sum(map(len, files.values())) < 400_000


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_no_number_that_came_to_stand_first_in_a_line_makes_it_a_list(template):
    lists = [line for line in page_of(template).splitlines() if re.match(r"1[.)] |[-+*] ", line)]
    assert len(lists) == len(re.findall(r"(?m)^- ", template.read_text(encoding="utf-8")))


# === The record against itself ====================================================================
def test_the_run_had_the_settings_that_are_todays_defaults():
    defaults = ppo.Config()
    assert set(one_batch.SETTINGS) | {"iteration"} == set(SETTINGS)
    for name in one_batch.SETTINGS:
        assert SETTINGS[name] == getattr(defaults, name), f"{name}: run docs/one_batch.py again"
    decay = 1 - (SETTINGS["iteration"] - 1) / SETTINGS["iterations"]
    assert RECORD["metrics"]["lr"] == pytest.approx(ppo.LR_BY_SIZE[0][1] * decay)
    steps = SETTINGS["ppo_epochs"] * SETTINGS["batch_size"] // SETTINGS["minibatch_size"]
    assert len(RECORD["steps"]) == len(BATCH["minibatches"]) == len(ONE["new_logprobs"]) == steps


def test_rewards_advantages_and_returns_of_the_response_follow_from_equations_1_to_3():
    beta, gamma, lam = BATCH["kl_coef"], SETTINGS["gamma"], SETTINGS["lam"]
    rewards = [-beta * (x - y) for x, y in zip(ONE["logprobs"], ONE["ref_logprobs"])]
    rewards[-1] += ONE["score"] - SETTINGS["missing_eos_penalty"] * (not ONE["ended"])
    assert ONE["rewards"] == pytest.approx(rewards, abs=2e-6)
    deltas, advantages = advantages_by_sums(ONE["rewards"], ONE["values"], gamma, lam)
    assert ONE["deltas"] == pytest.approx(deltas, abs=2e-6)
    assert ONE["advantages"] == pytest.approx(advantages, abs=1e-5)
    assert ONE["returns"] == pytest.approx([a + v for a, v in zip(advantages, ONE["values"])], abs=1e-5)


def test_rewards_advantages_and_whitening_of_the_batch_follow_from_what_was_read_and_scored():
    beta, every = BATCH["kl_coef"], []
    for i, score in enumerate(BATCH["final_scores"]):
        rewards = [-beta * (x - y) for x, y in zip(BATCH["logprobs"][i], BATCH["ref_logprobs"][i])]
        rewards[-1] += score
        assert BATCH["rewards"][i] == pytest.approx(rewards, abs=ROUNDED)
        _, advantages = advantages_by_sums(rewards, BATCH["values"][i], SETTINGS["gamma"], SETTINGS["lam"])
        assert BATCH["advantages"][i] == pytest.approx(advantages, abs=20 * ROUNDED)  # a sum of some 20
        every += BATCH["advantages"][i]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in every) / len(every))
    whitened = (flat(BATCH["advantages"]) - mean) / deviation
    torch.testing.assert_close(flat(BATCH["whitened"]), whitened, rtol=0, atol=3 * ROUNDED)
    its = (torch.tensor(ONE["advantages"], dtype=torch.float64) - mean) / deviation
    torch.testing.assert_close(torch.tensor(ONE["whitened"], dtype=torch.float64), its, rtol=0, atol=ROUNDED)


def test_the_response_is_a_row_of_the_batch_and_the_one_that_the_page_says():
    row, per_epoch, eps = ONE["row"], SETTINGS["batch_size"] // SETTINGS["minibatch_size"], SETTINGS["clip_eps"]
    for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "whitened"):
        assert BATCH[name][row] == pytest.approx(ONE[name], abs=ROUNDED), name
    for epoch, rows in enumerate(BATCH["new_logprobs"], 1):
        assert rows[row] == pytest.approx(ONE["new_logprobs"][epoch * per_epoch - 1], abs=ROUNDED)
    assert BATCH["prompt_lengths"][row] == sum(id != ONE["special_ids"]["pad"] for id in ONE["prompt_ids"])
    assert ONE["ended"] == (ONE["ids"][-1] == ONE["special_ids"]["eos"]) and ONE["special_ids"]["eos"] not in ONE["ids"][:-1]
    assert "".join(ONE["tokens"][: len(ONE["ids"]) - ONE["ended"]]) == ONE["text"]
    cuts = []
    for new, old, white in zip(BATCH["new_logprobs"][-1], BATCH["logprobs"], BATCH["whitened"]):
        ratio, white = (padded([new]) - padded([old])).exp(), padded([white])
        up, down = ((ratio > 1 + eps) & (white > 0)).sum().item(), ((ratio < 1 - eps) & (white < 0)).sum().item()
        cuts.append(up + down if up and down and len(new) <= one_batch.LONGEST else -1)
    assert cuts[row] == max(cuts) > 0


def test_what_the_log_said_of_the_batch_can_be_computed_from_the_record():
    metrics, kl = RECORD["metrics"], padded(BATCH["logprobs"]) - padded(BATCH["ref_logprobs"])
    values, returns = flat(BATCH["values"]), flat(BATCH["values"]) + flat(BATCH["advantages"])
    assert metrics["kl"] == pytest.approx(kl.sum(1).mean().item(), abs=1e-3)
    assert metrics["kl_k3"] == pytest.approx((torch.exp(-kl) - 1 + kl).sum(1).mean().item(), rel=1e-3)
    ended = torch.tensor(BATCH["ended"], dtype=torch.float64)
    scores = torch.tensor(BATCH["final_scores"], dtype=torch.float64) + SETTINGS["missing_eos_penalty"] * (1 - ended)
    assert metrics["score"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert metrics["score_std"] == pytest.approx(scores.std(correction=0).item(), abs=1e-5)
    assert metrics["true_reward"] == pytest.approx(sum(BATCH["true_rewards"]) / len(ended), abs=1e-5)
    assert metrics["eos_rate"] == ended.mean().item()
    unexplained = (returns - values).var(correction=0) / returns.var(correction=0)
    assert metrics["explained_variance"] == pytest.approx(1 - unexplained.item(), abs=1e-3)
    for key in ("score", "true_reward", "kl", "explained_variance"):
        assert RECORD["history"][-1][key] == metrics[key] and len(RECORD["history"]) == SETTINGS["iteration"]
    for key in ("policy_loss", "value_loss", "approx_kl", "clip_fraction"):
        assert metrics[key] == pytest.approx(sum(step[key] for step in RECORD["steps"]) / len(RECORD["steps"]), abs=1e-6)


def test_each_epoch_goes_over_all_rows_and_its_first_step_saw_the_recorded_ratios():
    """The loop's own statistics of a step, from its minibatch, against the ratios that were computed anew."""
    per_epoch, eps = SETTINGS["batch_size"] // SETTINGS["minibatch_size"], SETTINGS["clip_eps"]
    before = [BATCH["logprobs"], *BATCH["new_logprobs"]]  # of each epoch
    for epoch in range(SETTINGS["ppo_epochs"]):
        parts = BATCH["minibatches"][epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(sum(parts, [])) == list(range(SETTINGS["batch_size"]))
        pick = lambda rows: flat([rows[i] for i in parts[0]])
        ratio, white = (pick(before[epoch]) - pick(BATCH["logprobs"])).exp(), pick(BATCH["whitened"])
        step = RECORD["steps"][epoch * per_epoch]
        assert step["ratio"] == pytest.approx(ratio.mean().item(), abs=2e-4)
        assert step["approx_kl"] == pytest.approx((ratio - 1 - ratio.log()).mean().item(), abs=2e-4)
        assert step["clip_fraction"] == pytest.approx((abs(ratio - 1) > eps).double().mean().item(), abs=2e-3)
        gains = torch.minimum(ratio * white, ratio.clamp(1 - eps, 1 + eps) * white)
        assert step["policy_loss"] == pytest.approx(-gains.mean().item(), abs=5e-4)
    rows = BATCH["minibatches"][0]
    errors = flat([BATCH["advantages"][i] for i in rows])  # G - V_old
    assert RECORD["steps"][0]["value_loss"] == pytest.approx(0.5 * (errors**2).mean().item(), abs=2e-4)


# === The record against the functions of ppo.py ===================================================
def test_the_functions_of_ppo_give_the_recorded_rewards_advantages_and_whitening():
    mask = mask_of(BATCH["values"])
    kl = padded(BATCH["logprobs"]) - padded(BATCH["ref_logprobs"])
    rewards = ppo.kl_shaped_rewards(torch.tensor(BATCH["final_scores"], dtype=torch.float64), kl, mask, BATCH["kl_coef"])
    torch.testing.assert_close(rewards, padded(BATCH["rewards"]), rtol=0, atol=ROUNDED)
    advantages, returns, value_mask = ppo.gae(rewards, padded(BATCH["values"]), mask, SETTINGS["gamma"], SETTINGS["lam"])
    torch.testing.assert_close(advantages, padded(BATCH["advantages"]), rtol=0, atol=20 * ROUNDED)
    torch.testing.assert_close(ppo.whiten(advantages, mask), padded(BATCH["whitened"]), rtol=0, atol=50 * ROUNDED)
    assert value_mask.equal(mask)
    assert returns[ONE["row"]][: len(ONE["ids"])].tolist() == pytest.approx(ONE["returns"], abs=20 * ROUNDED)
    response = torch.tensor(ONE["ids"] + [ONE["special_ids"]["pad"]] * 3)[None]
    assert ONE["ended"] and ppo.mask_through_first_eos(response, [ONE["special_ids"]["eos"]]).sum() == len(ONE["ids"])


def test_a_token_is_called_cut_exactly_where_policy_loss_has_no_gradient():
    old, white = flat(BATCH["logprobs"]), flat(BATCH["whitened"])
    for epoch, rows in enumerate(BATCH["new_logprobs"], 1):
        new = flat(rows).requires_grad_()
        losses, ratio = ppo.policy_loss(new, old, white, SETTINGS["clip_eps"])
        losses.sum().backward()
        cut = torch.tensor([one_batch.is_cut(r, a, SETTINGS["clip_eps"]) for r, a in zip(ratio.tolist(), white.tolist())])
        assert cut.equal((new.grad == 0) & (white != 0)) and 0 < cut.sum() < len(cut)
        assert cut[ratio.argmin()] and cut[ratio.argmax()]  # "the extremes are cut tokens"
        stats = ppo.update_statistics(losses.detach(), losses.detach(), ratio.detach(), len(old), len(old), SETTINGS["clip_eps"])
        row = RECORD["page"]["rows_of_epochs"].splitlines()[epoch - 1].split(" | ")
        low, high = ratio.min().item(), ratio.max().item()
        cells = f"{stats['approx_kl']:.4f}", f"{low:.4f}", f"{high:.2f}", f"{stats['clip_fraction']:.1%}", f"{cut.double().mean():.1%}"
        assert [cell.strip(" |") for cell in row] == [f"{epoch}", *cells]


def test_a_value_is_called_held_exactly_where_value_loss_has_no_gradient():
    old, advantages = flat(BATCH["values"]), flat(BATCH["advantages"])
    new = flat(BATCH["new_values"]).requires_grad_()
    ppo.value_loss(new, old, old + advantages, SETTINGS["value_clip_eps"]).sum().backward()
    held = (new.grad == 0).double().mean().item()
    assert RECORD["page"]["values_held"] == pytest.approx(held, abs=1e-3) and held > 0.01


# === The page's numbers, by hand ==================================================================
def test_numbers_of_the_page_are_those_computed_by_hand_from_the_record():
    page, n = RECORD["page"], sum(map(len, BATCH["values"]))
    kl = flat(BATCH["logprobs"]) - flat(BATCH["ref_logprobs"])
    summed = (padded(BATCH["logprobs"]) - padded(BATCH["ref_logprobs"])).sum(1)
    raw, white = flat(BATCH["advantages"]), flat(BATCH["whitened"])
    returns, moved = flat(BATCH["values"]) + raw, flat(BATCH["new_values"]) - flat(BATCH["values"])
    p, r = BATCH["columns"]
    assert r == max(map(len, BATCH["values"])) and p == max(BATCH["prompt_lengths"]) == len(ONE["prompt_ids"])
    score = torch.tensor([BATCH["final_scores"], BATCH["true_rewards"]], dtype=torch.float64)
    by_hand = {
        "N": n, "places": r * len(BATCH["ended"]), "P": p, "R": r, "T": len(ONE["ids"]), "pads_behind": r - len(ONE["ids"]),
        "padding_share": 1 - (n + sum(BATCH["prompt_lengths"])) / (len(BATCH["ended"]) * (p + r)),
        "kl_gap": sum(BATCH["exact_kl"]) / len(summed) - summed.mean().item(),
        "kl_gap_error": ((flat([BATCH["exact_kl"]]) - summed).var(correction=0) / len(summed)).sqrt().item(),
        "kl_error": (summed.var(correction=0) / len(summed)).sqrt().item(), "lowest_kl": summed.min().item(),
        "exact_kl": sum(BATCH["exact_kl"]) / len(summed), "kl_per_token": kl.mean().item(),
        "negative_tokens": (kl < 0).double().mean().item(), "negative_responses": (summed < 0).sum().item(),
        "mean_advantage": raw.mean().item(), "deviation": raw.std(correction=0).item(),
        "sign_changed": (raw.sign() != white.sign()).double().mean().item(),
        "values_far": (moved.abs() > SETTINGS["value_clip_eps"]).double().mean().item(),
        "explained_after": 1 - ((raw - moved).var(correction=0) / returns.var(correction=0)).item(),
        "correlation": torch.corrcoef(score)[0, 1].item(), "bandit": sum(ONE["rewards"]) - ONE["values"][0],
        "r_kl": sum(ONE["logprobs"]) - sum(ONE["ref_logprobs"]), "num_ended": sum(BATCH["ended"]),
        "reaching_first": SETTINGS["lam"] ** (len(ONE["ids"]) - 1), "gamma_lam": SETTINGS["gamma"] * SETTINGS["lam"],
        "deviation_0": flat([advantages_by_sums(*row, SETTINGS["gamma"], 0.0)[1] for row in zip(BATCH["rewards"], BATCH["values"])]).std(correction=0).item(),
        "deviation_1": flat([advantages_by_sums(*row, SETTINGS["gamma"], 1.0)[1] for row in zip(BATCH["rewards"], BATCH["values"])]).std(correction=0).item(),
    }
    for name, value in by_hand.items():
        assert page[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    t = max(range(len(ONE["deltas"]) - 1), key=ONE["deltas"].__getitem__)
    assert (page["delta_t"], page["delta_token"]) == (t, ONE["tokens"][t].strip())
    assert page["delta_max"] == pytest.approx(ONE["rewards"][t] + SETTINGS["gamma"] * page["delta_next"] - page["delta_V"], abs=1e-5)
    for name, best in (("a", max), ("b", min)):  # the three tokens
        t = best((t for t, x in enumerate(ONE["logprobs"]) if x < math.log(0.9)), key=ONE["whitened"].__getitem__)
        assert page[f"{name}_token"] == ONE["tokens"][t].strip()
        assert page[f"{name}_t"] == t and page[f"{name}_new"] == pytest.approx(math.exp(ONE["new_logprobs"][-1][t]), rel=1e-5)


def test_what_the_page_says_in_words_of_the_followed_response_is_so():
    page, words = RECORD["page"], re.findall(r"[a-z]+", ONE["prompt"].lower())
    assert page["delta_token"] in ANIMALS and page["delta_token"] not in words  # "the prompt has no chick"
    assert 0 < page["a_pushed"] < SETTINGS["ppo_epochs"] and page["a_ratio"] > 1 + SETTINGS["clip_eps"]
    log = torch.tensor([ONE["logprobs"], *ONE["new_logprobs"]], dtype=torch.float64)[:, page["a_t"]]
    new = log[[ONE["row"] in rows for rows in BATCH["minibatches"]] + [False]].requires_grad_()  # as its own steps began
    ppo.policy_loss(new, log[:1].expand(len(new)), torch.full_like(new, ONE["whitened"][page["a_t"]]), SETTINGS["clip_eps"])[0].sum().backward()
    assert len(new) == SETTINGS["ppo_epochs"] and page["a_pushed"] == (new.grad != 0).sum()
    assert math.log(page["a_ratio"]) == pytest.approx((log[-1] - log[0]).item(), abs=1e-5)
    ups, moved = torch.tensor(ONE["whitened"]) > 0, torch.tensor(ONE["new_logprobs"][-1]) > torch.tensor(ONE["logprobs"])
    assert ups[page["c_t"]] != moved[page["c_t"]]  # the wrong way
    assert abs(page["kl_gap"]) < 2 * page["kl_gap_error"]  # "may be chance"


def test_probes_are_within_what_they_can_be():
    probes = RECORD["probes"]
    assert 0 <= probes["padding"] < 1e-4  # left padding changes no log-probability
    assert 0 < probes["dropout_outside"] < 1 and probes["undivided_kl"] > 0
    assert 0 < probes["bf16_still"] < probes["bf16_still_small"] <= 1
    assert probes["median_step"] < RECORD["metrics"]["lr"]
    assert abs(RECORD["page"]["exact_kl"] - RECORD["page"]["kl"]) < 3 * (RECORD["page"]["kl_error"] + RECORD["page"]["exact_kl_error"])


def test_the_exact_kl_is_the_sum_over_positions_and_vocabulary_of_each_text_without_its_padding():
    policy, ref_policy = tiny_lm(seed=0), tiny_lm(seed=1)
    texts, num_columns = [([5, 3, 7], [4, 9, 1]), ([6], [8, 1])], 3
    tokens, mask = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.bool)
    expected = []
    for i, (prompt, response) in enumerate(texts):
        ids = prompt + response
        part = slice(3 - len(prompt), 3 + len(response))
        tokens[i, part], mask[i, part] = torch.tensor(ids), True
        p, q = (torch.softmax(model(torch.tensor([ids])).logits[0].detach().double() / 0.5, -1) for model in (policy, ref_policy))
        at = range(len(prompt) - 1, len(ids) - 1)
        expected.append(sum((p[k, v] * math.log(p[k, v] / q[k, v])).item() for k in at for v in range(p.shape[1])))
    got = one_batch.exact_kl(policy, ref_policy, tokens, mask, num_columns, 0.5)
    assert got.tolist() == pytest.approx(expected, rel=1e-4) and min(expected) > 0.1
    inputs = tokens, mask, num_columns, 1.0
    logprobs, _, _ = ppo.forward_responses(policy, None, *inputs)
    assert one_batch.padding_gap(policy, logprobs, *inputs) < 1e-5
    assert one_batch.padding_gap(policy, logprobs + 0.25, *inputs) == pytest.approx(0.25, abs=1e-5)
    ratio = one_batch.dropout_ratios(policy, logprobs, *inputs)[mask[:, -3:]]
    assert (ratio - 1).abs().max() > 1e-3  # it drops, and afterwards no more
    assert ppo.forward_responses(policy, None, *inputs)[0].equal(logprobs)


def test_bf16_weights_near_1_stay_under_steps_below_half_their_spacing_of_2_to_the_minus_7():
    steps = torch.tensor([0.001, 0.0038, 0.0041, 0.01])
    assert one_batch.rounded_away(torch.ones(4), steps) == 0.5
    weights, moved = one_batch.first_step([torch.tensor([1.0, 2.0])], [torch.tensor([1.5, 2.0])])
    assert (weights.tolist(), moved.tolist()) == ([1.0], [0.5])


# === The script on the tests' world ===============================================================
def flags_of(world):
    judge = f"{ROOT / 'data' / 'true_reward.py'}:true_reward"
    flags = ["--policy", world / "sft", "--reward", world / "reward_model", "--prompts", world / "prompts.jsonl", "--judge", judge]
    return [*map(str, [*flags, *FLAGS])]


@pytest.fixture(scope="module")
def tiny(world, tmp_path_factory):
    """The record of the second iteration of a run in the tests' world."""
    cfg = cli.parse_args(ppo.Config, "", [*flags_of(world), "--output", str(tmp_path_factory.mktemp("run"))])
    return one_batch.to_digits(one_batch.make_record(cfg, 2, one_batch.listen(cfg, 2)))


def test_who_listens_changes_nothing_a_plain_run_logs_the_same(world, tiny, tmp_path, run_stage):
    status, _, error = run_stage(ppo, *flags_of(world), "--output", tmp_path / "ppo")
    assert status == 0, error
    rows = [row for row in read_rows(tmp_path / "ppo" / "metrics.jsonl") if "split" not in row]
    assert rows[1]["iteration"] == 2 and rows[1]["approx_kl"] > 1e-6
    for key, value in tiny["metrics"].items():
        assert value == one_batch.to_digits(rows[1])[key], key


def test_the_probes_leave_the_random_numbers_and_the_models_as_they_were(tiny):
    assert tiny["metrics"]["ratio_first"] == pytest.approx(1, abs=1e-6)  # dropout is off again
    assert tiny["steps"][0]["approx_kl"] < 1e-8


def test_the_script_writes_numbers_and_page_of_a_run(world, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(one_batch, "new_figure", drawn.append)
    monkeypatch.setattr(one_batch, "PICTURES", {"1_batch.png": lambda record: record})
    monkeypatch.setattr(one_batch, "save_picture", lambda record, path: path.write_text(record["response"]["text"]))
    one_batch.main([*flags_of(world), "--iteration", "2", "--folder", str(tmp_path / "one_batch")])
    record = json.loads((tmp_path / "one_batch" / "numbers.json").read_text(encoding="utf-8"))
    assert record["settings"]["iteration"] == 2 and len(record["batch"]["minibatches"]) == 4 * 8 / 4
    for template in TEMPLATES:
        page = (tmp_path / template.name.replace(".template", "")).read_text(encoding="utf-8")
        assert page == one_batch.fill(template.read_text(encoding="utf-8"), record["page"]) and f"{record['page']['kl']:.2f}" in page
    assert (tmp_path / "one_batch" / "1_batch.png").read_text() == record["response"]["text"]
    assert drawn == [1]


def test_redraw_makes_page_and_numbers_again_without_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(one_batch, "new_figure", lambda height: None)
    monkeypatch.setattr(one_batch, "PICTURES", {})
    monkeypatch.setattr(ppo, "main", lambda cfg: pytest.fail("the run began"))
    folder = tmp_path / "one_batch"
    folder.mkdir()
    stale = RECORD | {"page": {}}
    (folder / "numbers.json").write_text(json.dumps(stale), encoding="utf-8")
    one_batch.main(["--redraw", "--folder", str(folder)])
    assert (folder / "numbers.json").read_text(encoding="utf-8") == (FOLDER / "numbers.json").read_text(encoding="utf-8")
    for template in TEMPLATES:
        assert (tmp_path / template.name.replace(".template", "")).read_text(encoding="utf-8") == page_of(template)


def test_without_matplotlib_it_stops_with_one_line_before_the_run(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(ppo, "main", lambda cfg: pytest.fail("the run began"))
    monkeypatch.setattr(sys, "argv", ["one_batch.py"])
    with pytest.raises(SystemExit) as stop, cli.command_line():
        one_batch.main([])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "one_batch.py: error: one_batch.py needs the package matplotlib; pip install matplotlib\n"


@pytest.mark.parametrize("flags, problem", [
    (["--iteration", "0"], "--iteration is 0"), (["--iteration", "31"], "from 1 to 30"), (["--advantage", "bandit"], "--advantage gae"),
    (["--max-approx-kl", "0.1"], "all optimizer steps"), (["--prompts", "mine.jsonl"], "--judge"), (["--iteratoins", "3"], "unknown argument"),
])
def test_what_the_page_cannot_show_is_refused_before_the_run(flags, problem, monkeypatch):
    monkeypatch.setattr(one_batch, "new_figure", lambda height: None)
    monkeypatch.setattr(ppo, "main", lambda cfg: pytest.fail("the run began"))
    with pytest.raises(common.UserError, match=problem):
        one_batch.main(flags)


@pytest.mark.parametrize("source", ["tiny", "recorded"])
def test_every_picture_can_be_drawn(source, tiny, tmp_path):
    pytest.importorskip("matplotlib")
    record = tiny if source == "tiny" else RECORD
    for name, draw in one_batch.PICTURES.items():
        one_batch.save_picture(draw(record), tmp_path / name)
        assert (tmp_path / name).stat().st_size > 3000


def test_the_script_imports_no_more_than_torch_at_its_top():
    tree = ast.parse((ROOT / "docs" / "one_batch.py").read_text(encoding="utf-8"))
    names = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert names - sys.stdlib_module_names == {"torch", "common", "ppo", "plumbing"}
