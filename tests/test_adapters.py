"""--lora-rank: adapters of peft over shared frozen weights, and adapter folders as input."""

import copy
import importlib.util
import json
import os
import re
import shutil
import signal
import sys

import pytest
import safetensors.torch
import torch
import transformers
from conftest import tiny_lm, tiny_scalar
from test_cli import refused
from test_resume import STAGES, contents, flags_of, interrupt
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common
import ppo
import zoo
from plumbing import adapters, cli, folders, report

CPU = torch.device("cpu")
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is optional")
FAMILIES = ["llama_tied", "llama_untied", "qwen2", "gemma3", "gpt2", "qwen3_5"]


def make_lm(family):
    torch.manual_seed(0)
    config = zoo.FAMILIES[family][1](transformers)
    for name in vars(config).keys() & {"resid_pdrop", "embd_pdrop", "attn_pdrop"}:  # as common loads it
        setattr(config, name, 0.0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def randomize(model):
    """Adapters, and a head, as training might leave them; as made, B is 0."""
    with torch.no_grad():
        for weight in adapters.trained(model).values():
            weight.add_(torch.randn_like(weight), alpha=0.1)


def summed_by_hand(own, rank, original):
    """{name in the original: W + 2 B A} where there are a B and an A, by their names in peft's files."""
    own = {name.removeprefix("base_model.model."): weight for name, weight in own.items()}
    summed = {}
    for name in own:
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            a, b, w = own[name], own[f"{layer}.lora_B.weight"], original.get_submodule(layer).weight
            assert a.shape[0] == b.shape[1] == rank
            delta = torch.einsum("or,ri->oi", b, a) * (2 * rank) / rank
            is_conv = type(original.get_submodule(layer)).__name__ == "Conv1D"  # (in, out)
            summed[f"{layer}.weight"] = w + (delta.T if is_conv else delta)
    return summed


def read(model, seed=0):
    torch.manual_seed(seed)
    tokens, mask = torch.randint(2, 300, (3, 12)), torch.ones(3, 12).bool()
    mask[1, :4] = False
    if common.has_token_head(model):
        return common.token_scores(model, tokens, mask)
    return common.forward(model, tokens, mask).logits[mask]


# === One line =====================================================================================
@pytest.mark.parametrize("stage", STAGES)
def test_without_peft_one_line_names_it(stage, world, tmp_path, run_stage, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    flags = [*flags_of(stage, world), "--output", tmp_path / "out"]
    words = "--lora-rank needs the package peft; pip install peft"
    refused(run_stage(STAGES[stage], *flags, "--lora-rank", 2), stage, words)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(world / "sft")}))
    flag = "--policy" if stage == "ppo" else "--model"
    words = f"{tmp_path / 'adapter'} is an adapter: it needs peft; pip install peft"
    refused(run_stage(STAGES[stage], *flags, flag, tmp_path / "adapter"), stage, words)


@needs_peft
def test_what_adapters_can_not_be_is_refused_in_one_line(world, tmp_path, run_stage):
    flags = [*flags_of("sft", world), "--output", tmp_path / "out"]
    refused(run_stage(STAGES["sft"], *flags, "--lora-rank", 0), "sft", "--lora-rank is 0; it must be at least 1")
    flags = ["--data", world / "sft.jsonl", "--output", tmp_path / "out", "--lora-rank", 2]
    refused(run_stage(STAGES["sft"], *flags), "sft", "--lora-rank adapts a --model")
    for family, words in (("mixtral", "mixture of experts"), ("gpt_oss", "mixture of experts"), ("mamba2", "state-space layers")):
        with pytest.raises(common.UserError, match=words):
            adapters.add(make_lm(family), 2, "x")
    with pytest.raises(common.UserError, match="peft can't adapt a Embedding"):
        adapters.add(torch.nn.Embedding(2, 2), 2, "x")


# === The arithmetic ===============================================================================
@needs_peft
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_adapters_starts_as_the_one_without_and_is_w_plus_2_b_a_merged_or_not(family):
    model, rank = make_lm(family), 3
    original = copy.deepcopy(model)
    adapters.add(model, rank, "x")
    assert type(model) is type(original) and torch.equal(read(model), read(original))
    randomize(model)
    summed = summed_by_hand(adapters.trained(model), rank, original)
    linear = [name for name, module in original.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    assert {f"{name}.weight" for name in linear} - {"lm_head.weight"} == set(summed)  # all but the LM head
    before = read(original)
    original.load_state_dict(summed, strict=False)
    expected, unmerged = read(original), read(model)
    assert (expected - before).abs().max() > 0.1  # the adapters say something
    torch.testing.assert_close(unmerged, expected, atol=1e-4, rtol=1e-4)
    adapters.merge(model)
    torch.testing.assert_close(read(model), expected, atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == list(original.state_dict()) and not adapters.is_adapted(model)


@needs_peft
@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "llama_untied"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_adapters_have_gradients_and_they_are_those_of_w_plus_2_b_a(family, checkpointing):
    model = make_lm(family)
    original = copy.deepcopy(model).requires_grad_(False)
    adapters.add(model, 2, "x")
    randomize(model)
    common.place(model, CPU, "float32", gradient_checkpointing=checkpointing)
    read(model).logsumexp(-1).pow(2).sum().backward()
    own = adapters.trained(model)
    assert all("lora_" in name for name, w in model.named_parameters() if w.grad is not None)
    assert all(weight.grad.abs().sum() > 0 for weight in own.values())
    leaves = {name: weight.detach().clone().requires_grad_(True) for name, weight in own.items()}
    summed = summed_by_hand(leaves, 2, original)

    class Reimplemented(torch.nn.Module):
        device = CPU

        def forward(self, **inputs):
            return torch.func.functional_call(original, summed, kwargs=inputs)

    read(Reimplemented()).logsumexp(-1).pow(2).sum().backward()
    for name, leaf in leaves.items():
        scale = leaf.grad.abs().max().item()
        torch.testing.assert_close(own[name].grad, leaf.grad, atol=1e-4 * scale, rtol=1e-4)


# === Models of PPO ================================================================================
KINDS = {
    "reward model": [], "shared": ["--critic", "shared"], "function": ["--reward", "FUNCTION"],
    "checkpointed": ["--gradient-checkpointing", "--advantage", "bandit"],
}


def flags_of_kind(kind, world, tmp_path):
    (tmp_path / "length.py").write_text("def score(prompts, responses, rows):\n    return [float(len(r)) for r in responses]\n")
    return [str(f).replace("FUNCTION", f"{tmp_path / 'length.py'}:score") for f in KINDS[kind]]


def load_all(world, tmp_path, kind, dtype):
    flags = [*flags_of("ppo", world, *flags_of_kind(kind, world, tmp_path)), "--lora-rank", 2, "--dtype", dtype]
    keep = [str(f) for f in flags]
    if kind == "function":  # a flag of several values is given once
        at = keep.index("--reward")
        del keep[at : at + 2]
    cfg = cli.parse_args(ppo.Config, "", keep)
    tokenizer = common.load_tokenizer(cfg.policy)
    rows, _ = ppo.load_prompts(cfg, tokenizer)
    torch.manual_seed(0)
    return cfg, rows, tokenizer, ppo.load_models(cfg, tokenizer, rows, CPU)


def plain_names(model):
    return {name.replace(".base_layer", ""): w for name, w in model.named_parameters() if "lora_" not in name}


@needs_peft
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_models_share_frozen_weights_that_no_step_moves_and_start_as_what_they_adapt(kind, dtype, world, tmp_path):
    cfg, rows, tokenizer, models = load_all(world, tmp_path, kind, dtype)
    policy, ref_policy, critic, scorers = models
    source = AutoModelForCausalLM.from_pretrained(world / "sft", dtype=torch.float32)
    of_policy, of_ref = plain_names(policy), plain_names(ref_policy)
    assert of_policy.keys() == of_ref.keys() and all(of_policy[name] is of_ref[name] for name in of_ref)
    pairs = [(policy, ref_policy)]
    if kind == "function":
        of_critic = plain_names(critic)
        assert all(of_critic[name] is of_policy[name] for name in of_critic if name != "score.weight")
        assert not critic.score.weight.any()
    elif kind != "shared":
        of_critic, of_reward = plain_names(critic), plain_names(scorers[0].model)
        assert all((of_critic[n] is of_reward[n]) == (n != "score.weight") for n in of_reward)
        assert torch.equal(of_critic["score.weight"], of_reward["score.weight"])
    for name, weight in of_ref.items():  # frozen: as loaded, matrices rounded once in bf16
        is_rounded = dtype == "bf16" and re.search("_proj|lm_head", name) and weight is not ref_policy.get_input_embeddings().weight
        expected = source.get_parameter(name).detach()
        assert torch.equal(weight, expected.to(torch.bfloat16) if is_rounded else expected), name
        assert not weight.requires_grad
    trained = cli.trainable(policy) + cli.trainable(critic)
    assert {w.dtype for w in trained} == {torch.float32}
    assert all("lora_" in n for n, w in policy.named_parameters() if w.requires_grad)
    optimizer, _ = ppo.make_optimizer(cfg, policy, critic)
    assert {id(w) for g in optimizer.param_groups for w in g["params"]} == {id(w) for w in trained}

    torch.manual_seed(1)
    rollout = ppo.sample_responses(policy, rows[:8], 6, 1.0)
    tokens, mask, response_mask, *_ = rollout
    inputs = tokens, mask, response_mask.shape[1], 1.0
    logprobs, ref_logprobs, values, _ = ppo.evaluate_tokens(policy, critic, ref_policy, *inputs, 3)
    assert torch.equal(logprobs, ref_logprobs)  # KL 0, to the last bit
    if kind in ("reward model", "checkpointed"):
        scores = common.token_scores(scorers[0].model, tokens, mask)
        assert torch.equal(common.token_scores(critic, tokens, mask), scores) and scores.abs().sum() > 0
    held = {id(w): (w.data_ptr(), w.clone()) for m in models[:2] for w in m.parameters() if not w.requires_grad}
    for _ in range(2):
        new_logprobs, new_values, _ = ppo.forward_responses(policy, critic, *inputs)
        (new_logprobs.sum() + (new_values - 1).pow(2).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved, ref_again, values_now, _ = ppo.evaluate_tokens(policy, critic, ref_policy, *inputs, 3)
    assert torch.equal(ref_again, ref_logprobs) and not torch.equal(moved, logprobs) and not torch.equal(values_now, values)
    for model in models[:2]:
        for weight in model.parameters():
            if id(weight) in held:
                address, before = held[id(weight)]
                assert weight.data_ptr() == address and torch.equal(weight, before) and weight.grad is None


@needs_peft
def test_the_memory_line_counts_shared_weights_once_and_gradients_only_of_what_is_trained(world, tmp_path, capsys):
    cfg, rows, tokenizer, (policy, ref_policy, critic, scorers) = load_all(world, tmp_path, "reward model", "float32")
    count = lambda folder: sum(w.numel() for w in safetensors.torch.load_file(world / folder / "model.safetensors").values())
    ranks = lambda model: sum(2 * sum(m.weight.shape) for n, m in model.named_modules() if n.endswith("_proj"))  # r (in + out)
    head = scorers[0].model.score.weight.numel()
    own = ranks(ref_policy), ranks(scorers[0].model) + head
    expected = 4 * (count("sft") + count("reward_model") + 4 * sum(own)) / 1e9
    report.ppo_start(cfg, policy, ref_policy, critic, scorers, [1, 1], tokenizer, rows, rows)
    out = capsys.readouterr().out
    assert f"moments take {expected:.3g} GB" in out
    assert f"{own[0] / 1e6:.3f} M trained" in out and f"{own[1] / 1e6:.3f} M trained" in out and out.count("frozen") == 2


@needs_peft
def test_adapters_take_ten_times_the_rate_of_the_weights_up_to_1e_3_and_a_given_rate_as_it_is():
    small, big = tiny_lm(vocab_size=12), tiny_lm(vocab_size=400)
    sizes = [sum(w.numel() for w in model.parameters()) for model in (small, big)]
    table = ((sizes[0] + 1, 3e-4), (1e9, 1e-5))
    assert [cli.by_size(None, table, model) for model in (small, big)] == [3e-4, 1e-5]
    for model in (small, big):
        adapters.add(model, 64, "x")  # more than the small model itself
    assert [cli.by_size(None, table, model) for model in (small, big)] == [1e-3, pytest.approx(1e-4)]
    assert cli.by_size(0.5, table, small) == 0.5


# === Whole runs ===================================================================================
RUNS = [("sft", []), ("reward_model", []), *(("ppo", [kind]) for kind in KINDS)]


def run_flags(stage, kind, world, tmp_path):
    more = flags_of_kind(kind[0], world, tmp_path) if kind else []
    return [*flags_of(stage, world, *more), "--lora-rank", 2]


@needs_peft
@pytest.mark.parametrize("stage, kind", RUNS)
def test_a_run_that_stops_and_resumes_equals_one_that_does_not_and_begins_at_kl_0_and_ratio_1(stage, kind, world, tmp_path, run_stage, monkeypatch):
    module, flags = STAGES[stage], run_flags(stage, kind, world, tmp_path)
    status, _, err = run_stage(module, *flags, "--output", tmp_path / "whole")
    assert status == 0, err
    undo = interrupt(monkeypatch, module, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_stage(module, *flags, "--output", tmp_path / "parts")[0] == 128 + signal.SIGTERM
    undo()
    checkpoint = tmp_path / "parts" / "checkpoint-3"  # an ordinary folder too
    held = safetensors.torch.load_file(checkpoint / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in held) and {w.dtype for w in held.values()} == {torch.float32}
    assert run_stage(module, "--resume", "--output", tmp_path / "parts")[0] == 0
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert whole == parts and "adapter/adapter_model.safetensors" in whole
    if stage == "ppo":
        first = whole["metrics.jsonl"][1]
        assert first["kl"] == 0 and first["ratio_first"] == 1 and first["approx_kl_first"] == 0
        assert all(row["ratio_first"] == 1 for row in whole["metrics.jsonl"] if "split" not in row)


@needs_peft
@pytest.mark.parametrize("stage", STAGES)
def test_output_is_an_ordinary_merged_folder_and_its_adapter_is_one_of_peft_s(stage, world, tmp_path, run_stage):
    import peft

    out = tmp_path / "out"
    assert run_stage(STAGES[stage], *flags_of(stage, world), "--lr", 0.01, "--lora-rank", 2, "--output", out)[0] == 0
    scalar, causal = AutoModelForSequenceClassification, AutoModelForCausalLM
    folders_of = {"sft": [(causal, "sft", out)], "reward_model": [(scalar, "sft", out)], "ppo": [(causal, "sft", out), (scalar, "reward_model", out / "critic")]}
    for auto, base, folder in folders_of[stage]:
        options = {"dtype": torch.float32} | ({"num_labels": 1} if auto is scalar else {})
        merged, raw = (auto.from_pretrained(path, **options).eval() for path in (folder, world / base))
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(raw), folder / "adapter").eval()
        tokens = torch.arange(3, 40)[None]
        results = [model(tokens).logits for model in (merged, adapted, raw)]
        torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
        assert (results[0] - results[2]).abs().max() > 1e-3
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 4, 0) and config["base_model_name_or_path"] == str(world / base)


@needs_peft
@pytest.mark.parametrize("stage, judge", [("sft", "evaluate"), ("reward_model", "score_pairs")])
def test_the_last_evaluation_and_the_scale_are_those_of_the_merged_model(stage, judge, world, tmp_path, run_stage, monkeypatch):
    seen, measure = [], getattr(STAGES[stage], judge)
    monkeypatch.setattr(STAGES[stage], judge, lambda model, *rest: (seen.append(adapters.is_adapted(model)), measure(model, *rest))[1])
    flags = [*flags_of(stage, world), "--lora-rank", 2, "--epochs", 1, "--output", tmp_path / "out"]
    assert run_stage(STAGES[stage], *flags)[0] == 0
    assert seen == ([True, False] if stage == "sft" else [False] * 3)  # before; after, the scale, read back


@needs_peft
def test_in_bf16_what_is_saved_is_what_was_evaluated(world, tmp_path, run_stage):
    """reward_model.py itself holds the saved model to the scores of the merged one: to rounding."""
    flags = [*flags_of("reward_model", world), "--lora-rank", 2, "--dtype", "bf16", "--output", tmp_path / "out"]
    status, out, err = run_stage(STAGES["reward_model"], *flags)
    assert status == 0 and float(re.search(r"differ by at most (\S+)", out)[1]) == 0, err
    flags = [*flags_of("sft", world), "--lora-rank", 2, "--dtype", "bf16", "--output", tmp_path / "sft"]
    assert run_stage(STAGES["sft"], *flags)[0] == 0
    held = safetensors.torch.load_file(tmp_path / "sft" / "model.safetensors")
    assert "lm_head.weight" in held and {weight.dtype for weight in held.values()} == {torch.float32}


# === Adapter folders as input =====================================================================
def an_adapter(folder, base, kind="CAUSAL_LM", **changes):
    """A folder as peft's users have them: trained by whatever, saved by peft."""
    import peft

    auto = AutoModelForCausalLM if kind == "CAUSAL_LM" else AutoModelForSequenceClassification
    options = {} if kind == "CAUSAL_LM" else {"num_labels": 1}
    model = auto.from_pretrained(base, dtype=torch.float32, **options)
    settings = dict(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], task_type=kind) | changes
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.2)
    model.save_pretrained(folder)
    return str(folder)


@needs_peft
def test_an_adapter_folder_is_loaded_as_its_base_with_w_plus_alpha_over_r_b_a(world, tmp_path):
    path = an_adapter(tmp_path / "adapter", world / "sft")
    held = safetensors.torch.load_file(f"{path}/adapter_model.safetensors")
    expected = {k: v.clone() for k, v in safetensors.torch.load_file(world / "sft" / "model.safetensors").items()}
    for name, a in held.items():
        if ".lora_A." in name:
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            expected[f"{layer}.weight"] += 3 * held[name.replace("lora_A", "lora_B")] @ a  # 12 / 4
    tokenizer = common.load_tokenizer(path)  # of the base: the folder has none
    model = common.load_causal_lm(path, tokenizer)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id] and all(w.requires_grad for w in model.parameters())
    for name, weight in expected.items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=1e-6, rtol=1e-6)
    scalar, head_is_new = common.load_scalar_model(path, tokenizer)
    assert head_is_new and torch.equal(scalar.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.q_proj.weight)


@needs_peft
def test_an_adapter_folder_goes_into_every_stage_and_the_reference_is_the_merged_model(world, tmp_path, run_stage):
    causal = an_adapter(tmp_path / "causal", world / "sft")
    scalar = an_adapter(tmp_path / "scalar", world / "reward_model", "SEQ_CLS")
    for stage, flags in (("sft", ["--model", causal]), ("reward_model", ["--model", causal]), ("ppo", ["--policy", causal, "--reward", scalar])):
        for rank in ([], ["--lora-rank", 2]):
            out = tmp_path / f"{stage}{len(rank)}"
            more = ["--iterations", 2] if stage == "ppo" else ["--epochs", 1]
            status, _, err = run_stage(STAGES[stage], *flags_of(stage, world), *flags, *more, *rank, "--output", out)
            assert status == 0, err
            if stage == "ppo":
                rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                assert rows[0]["kl"] == rows[1]["kl"] == 0 and rows[1]["ratio_first"] == 1
    head = safetensors.torch.load_file(f"{scalar}/adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(common.load_classifier(scalar)[0].score.weight, head)
    # its adapter is one of an adapter: still a folder that can be loaded
    tokenizer = common.load_tokenizer(causal)
    again = common.load_causal_lm(str(tmp_path / "ppo2" / "adapter"), tokenizer).state_dict()
    for name, weight in safetensors.torch.load_file(tmp_path / "ppo2" / "model.safetensors").items():
        torch.testing.assert_close(again[name], weight, atol=1e-5, rtol=1e-5)


@needs_peft
@pytest.mark.parametrize("breakage, words", [
    ("less", "1 too few"), ("more", "1 weights too many"), ("shape", "can't be merged"), ("nan", "holds a weight that is not finite, in"), ("damaged", "can't be merged"),
    ("pickled", "never read"), ("no base", "names no base model"), ("base gone", "is an adapter of .*there is no folder"), ("both", "give each a folder"), ("prompt", "can't be merged"),
])
def test_an_adapter_that_is_not_whole_is_refused_by_name(breakage, words, world, tmp_path):
    path = tmp_path / "adapter"
    an_adapter(path, world / "sft")
    file, config = path / "adapter_model.safetensors", json.loads((path / "adapter_config.json").read_text())
    held = safetensors.torch.load_file(file)
    first = min(held)
    if breakage == "less":
        del held[first]
    elif breakage == "more":
        held["base_model.model.lm_head.lora_A.weight"] = held[first].clone()
    elif breakage == "shape":
        held[first] = held[first][:1].clone()
    elif breakage == "nan":
        held[first][0, 0] = float("nan")
    safetensors.torch.save_file(held, file)
    config |= {"no base": {"base_model_name_or_path": None}, "base gone": {"base_model_name_or_path": "/gone"}, "prompt": {"peft_type": "PROMPT_TUNING"}}.get(breakage, {})
    (path / "adapter_config.json").write_text(json.dumps(config))
    if breakage == "damaged":
        file.write_bytes(file.read_bytes()[:100])
    elif breakage == "pickled":
        file.rename(path / "adapter_model.bin")
    elif breakage == "both":
        shutil.copy(world / "sft" / "config.json", path)
    with pytest.raises(common.UserError, match=f"{re.escape(str(path))}.*{words}"):
        common.load_causal_lm(str(path), common.load_tokenizer(str(world / "sft")))


@needs_peft
def test_fingerprints_know_an_adapter_s_weights_its_settings_and_its_base(world, tmp_path):
    shutil.copytree(world / "sft", tmp_path / "base")
    path = tmp_path / "adapter"
    an_adapter(path, tmp_path / "base")
    cfg = cli.parse_args(STAGES["sft"].Config, "", ["--model", str(path), "--lora-rank", "2"])
    prints = [folders.fingerprints(cfg)[f"--model {path}"]]
    for file, change in ((path / "adapter_model.safetensors", b"\x01"), (path / "adapter_config.json", b" "), (tmp_path / "base" / "model.safetensors", b"\x01")):
        data = file.read_bytes()
        if file.suffix == ".json":
            file.write_bytes(data.replace(b'"lora_alpha": 12', b'"lora_alpha": 13'))
        else:
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        prints.append(folders.fingerprints(cfg)[f"--model {path}"])
    assert len({*prints}) == 4


@needs_peft
def test_a_base_that_has_changed_is_refused_at_resume(world, tmp_path, run_stage, monkeypatch):
    shutil.copytree(world / "sft", tmp_path / "base")
    flags = [*flags_of("sft", world), "--model", tmp_path / "base", "--lora-rank", 2, "--output", tmp_path / "out"]
    undo = interrupt(monkeypatch, STAGES["sft"], 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_stage(STAGES["sft"], *flags)[0] == 128 + signal.SIGTERM
    undo()
    state = safetensors.torch.load_file(tmp_path / "base" / "model.safetensors")
    safetensors.torch.save_file({k: v + 1 for k, v in state.items()}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    result = run_stage(STAGES["sft"], "--resume", "--output", tmp_path / "out")
    refused(result, "sft", f"--model {tmp_path / 'base'} has changed since the run began")


@needs_peft
def test_a_family_without_a_classifier_goes_through_all_stages_from_adapter_folders(world, tmp_path, run_stage):
    make_lm("cohere2").save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(world / "sft").save_pretrained(tmp_path / "base")
    more = ["--lora-rank", 2]
    status, _, err = run_stage(STAGES["sft"], *flags_of("sft", world, *more), "--model", tmp_path / "base", "--output", tmp_path / "sft")
    assert status == 0, err
    policy = tmp_path / "sft" / "adapter"
    status, out, err = run_stage(STAGES["reward_model"], *flags_of("reward_model", world, *more), "--model", policy, "--output", tmp_path / "rm")
    assert status == 0 and "scores after reloading differ by at most 0" in out, err
    assert (tmp_path / "rm" / common.HEAD).exists()
    for kind, reward in (("model", [tmp_path / "rm"]), ("function", flags_of_kind("function", world, tmp_path)[1:])):
        flags = [*flags_of("ppo", world, *more), "--policy", policy, "--iterations", 2, "--reward", *reward]
        status, _, err = run_stage(STAGES["ppo"], *flags, "--output", tmp_path / kind)
        assert status == 0, err
        rows = [json.loads(line) for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
        assert rows[1]["kl"] == 0 and rows[1]["ratio_first"] == 1
