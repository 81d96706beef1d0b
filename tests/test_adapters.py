"""--lora-rank: adapters of peft over shared frozen weights, and adapter folders as input."""

import copy
import json
import re
import shutil

import pytest
import safetensors.torch
import torch
import transformers
import zoo
from conftest import read_rows, tiny_lm
from test_cli import refused
from test_resume import STAGES, contents, flags_of, stopped
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common
import harness
import ppo

peft = pytest.importorskip("peft", reason="peft is optional")
CAUSAL, SCALAR = AutoModelForCausalLM, AutoModelForSequenceClassification


def make_lm(family):
    torch.manual_seed(0)
    config = zoo.FAMILIES[family][1](transformers)
    for name in vars(config).keys() & {"resid_pdrop", "embd_pdrop", "attn_pdrop"}:
        setattr(config, name, 0.0)  # as common.py loads it
    return CAUSAL.from_config(config, dtype=torch.float32).eval()


def trained(model):
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def randomize(model):
    """Adapters, and a head, as training might leave them; a new B is 0."""
    with torch.no_grad():
        for weight in trained(model).values():
            weight.add_(torch.randn_like(weight), alpha=0.1)


def summed_by_hand(own, rank, original, alpha=None):
    """Returns {name in the original: W + alpha / rank B A} for each A and B among `own`."""
    summed = {}
    for name, a in own.items():
        if ".lora_A." in name:
            b = own[name.replace(".lora_A.", ".lora_B.")]
            assert a.shape[0] == b.shape[1] == rank
            layer = name.partition(".lora_A.")[0].removeprefix("base_model.model.")
            module = original.get_submodule(layer)
            delta = torch.einsum("or,ri->oi", b, a) * (alpha or 2 * rank) / rank
            is_conv = type(module).__name__ == "Conv1D"  # its weight is (in, out)
            summed[f"{layer}.weight"] = module.weight + (delta.T if is_conv else delta)
    return summed


def outputs(model):
    torch.manual_seed(0)
    tokens, mask = torch.randint(2, 300, (3, 12)), torch.ones(3, 12).bool()
    mask[1, :4] = False
    return common.forward(model, tokens, mask).logits[mask]


# === The arithmetic ===============================================================================
@pytest.mark.parametrize("family", ["llama_tied", "llama_untied", "gemma3", "gpt2", "qwen3_5"])
def test_a_model_with_adapters_starts_as_without_and_is_w_plus_2_b_a_merged_or_not(family):
    model, rank = make_lm(family), 3
    original = copy.deepcopy(model)
    common.add_adapters(model, rank, "x")
    before = outputs(original)
    assert type(model) is type(original) and torch.equal(outputs(model), before)
    randomize(model)
    summed = summed_by_hand(trained(model), rank, original)
    kinds = ("Linear", "Conv1D")
    linear = [name for name, module in original.named_modules() if type(module).__name__ in kinds]
    assert {f"{name}.weight" for name in linear} - {"lm_head.weight"} == {*summed}
    original.load_state_dict(summed, strict=False)
    expected = outputs(original)
    assert (expected - before).abs().max() > 0.1  # the adapters matter
    torch.testing.assert_close(outputs(model), expected, atol=1e-4, rtol=1e-4)
    common.merge_adapters(model)
    torch.testing.assert_close(outputs(model), expected, atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == list(original.state_dict())


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_adapters_have_gradients_and_they_are_those_of_w_plus_2_b_a(family, checkpointing):
    model = make_lm(family)
    original = copy.deepcopy(model).requires_grad_(False)
    common.add_adapters(model, 2, "x")
    randomize(model)
    common.to_device(model, torch.device("cpu"), "float32", gradient_checkpointing=checkpointing)
    outputs(model).logsumexp(-1).pow(2).sum().backward()
    own = trained(model)
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == (name in own) == ("lora_" in name)
    leaves = {name: weight.detach().clone().requires_grad_(True) for name, weight in own.items()}
    summed = summed_by_hand(leaves, 2, original)

    class Reimplemented(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, **inputs):
            return torch.func.functional_call(original, summed, kwargs=inputs)

    outputs(Reimplemented()).logsumexp(-1).pow(2).sum().backward()
    for name, leaf in leaves.items():
        scale = leaf.grad.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(own[name].grad, leaf.grad, atol=1e-4 * scale, rtol=1e-4)


def test_adapters_get_ten_times_the_rate_up_to_1e_3_and_a_given_rate_as_it_is():
    small, big = tiny_lm(vocab_size=12), tiny_lm(vocab_size=400)
    table = ((sum(weight.numel() for weight in small.parameters()) + 1, 3e-4), (1e9, 1e-5))
    assert [harness.lr_by_size(None, table, model) for model in (small, big)] == [3e-4, 1e-5]
    for model in (small, big):
        common.add_adapters(model, 64, "x")  # more than the small model itself
    assert harness.lr_by_size(None, table, small) == 1e-3
    assert harness.lr_by_size(None, table, big) == pytest.approx(1e-4)
    assert harness.lr_by_size(0.5, table, small) == 0.5


# === Models of PPO ================================================================================
KINDS = {
    "reward model": [], "shared": ["--critic", "shared"], "function": ["--reward", "FUNCTION"],
    "checkpointed": ["--gradient-checkpointing", "--advantage", "bandit"],
}


def flags_of_kind(kind, world, tmp_path, *more):
    """Returns PPO's flags with adapters; the function of `--reward` is written to a file."""
    file = tmp_path / "length.py"
    file.write_text("def score(prompts, texts, rows):\n    return [len(text) for text in texts]\n")
    flags = [str(flag) for flag in flags_of("ppo", world, *more, "--lora-rank", 2)]
    if kind == "function":
        flags[flags.index("--reward") + 1] = f"{file}:score"
        return flags
    return flags + KINDS[kind]


def plain_names(model):
    weights = {name.replace(".base_layer", ""): w for name, w in model.named_parameters()}
    return {name: weight for name, weight in weights.items() if "lora_" not in name}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_models_share_frozen_weights_that_no_step_moves_and_start_as_what_they_adapt(
    kind, dtype, world, tmp_path
):
    flags = flags_of_kind(kind, world, tmp_path, "--dtype", dtype)
    cfg = harness.parse_args(ppo.Config, "", flags)
    tokenizer = common.load_tokenizer(cfg.policy)
    rows, _ = ppo.load_prompts(cfg, tokenizer)
    torch.manual_seed(0)
    policy, ref_policy, critic, scorers = ppo.load_models(cfg, tokenizer, 64, torch.device("cpu"))
    of_policy, of_ref = plain_names(policy), plain_names(ref_policy)
    assert of_policy.keys() == of_ref.keys()
    assert all(of_policy[name] is of_ref[name] for name in of_ref)
    if kind == "function":
        for name, weight in plain_names(critic).items():
            assert weight is of_policy[name] if name != "score.weight" else not weight.any()
    elif kind != "shared":
        of_critic, of_reward = plain_names(critic), plain_names(scorers[0].model)
        for name, weight in of_reward.items():
            assert (of_critic[name] is weight) == (name != "score.weight")
        assert torch.equal(of_critic["score.weight"], of_reward["score.weight"])
    source = CAUSAL.from_pretrained(world / "sft", dtype=torch.float32)
    for name, weight in of_ref.items():  # frozen: as loaded, with matrices rounded once in bf16
        is_rounded = dtype == "bf16" and re.search("_proj|lm_head", name)
        expected = source.get_parameter(name).to(torch.bfloat16 if is_rounded else torch.float32)
        assert torch.equal(weight, expected) and not weight.requires_grad, name
    own = [*trained(policy).values(), *trained(critic).values()]
    assert {weight.dtype for weight in own} == {torch.float32}
    assert all("lora_" in name for name in trained(policy))
    optimizer, _ = ppo.make_optimizer(cfg, policy, critic)
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert held == {id(weight) for weight in own}

    generator = torch.Generator().manual_seed(1)
    rollout = ppo.sample_responses(policy, tokenizer, rows[:8], 6, 1.0, generator)
    logprobs, ref_logprobs, values, _ = ppo.evaluate_tokens(
        policy, critic, ref_policy, rollout, 1.0, 3
    )
    assert torch.equal(logprobs, ref_logprobs)  # KL 0, to the last bit
    if kind in ("reward model", "checkpointed"):
        scores = common.token_scores(scorers[0].model, rollout.tokens, rollout.attention_mask)
        now = common.token_scores(critic, rollout.tokens, rollout.attention_mask)
        assert torch.equal(now, scores) and scores.abs().sum() > 0
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in of_ref.items()}
    for _ in range(2):
        new_logprobs, new_values, _ = ppo.forward_responses(
            policy, critic, rollout.tokens, rollout.attention_mask, logprobs.shape[1], 1.0
        )
        (new_logprobs.sum() + (new_values - 1).pow(2).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved, ref_again, new_values, _ = ppo.evaluate_tokens(
        policy, critic, ref_policy, rollout, 1.0, 3
    )
    assert torch.equal(ref_again, ref_logprobs)
    assert not torch.equal(moved, logprobs) and not torch.equal(new_values, values)
    for name, (address, weight) in before.items():
        assert of_policy[name].data_ptr() == address and torch.equal(of_policy[name], weight)


# === Whole runs ===================================================================================
def num_weights(folder):
    (file,) = folder.glob("*.safetensors")
    return sum(weight.numel() for weight in safetensors.torch.load_file(file).values())


@pytest.mark.parametrize("stage, kind", [
    ("sft", None), ("reward_model", None), ("ppo", "shared"), ("ppo", "function"),
    ("ppo", "checkpointed"),
])
def test_a_run_that_stops_and_resumes_equals_one_that_does_not_and_writes_ordinary_folders(
    stage, kind, world, tmp_path, run_stage, monkeypatch
):
    flags = [*flags_of(stage, world), "--lora-rank", 2]
    if stage == "ppo":
        flags = [*flags_of_kind(kind, world, tmp_path), "--iterations", 4]
    out, flags = tmp_path / "whole", [*flags, "--lr", 0.01]
    status, printed, err = run_stage(STAGES[stage], *flags, "--output", out)
    assert status == 0, err
    stopped(monkeypatch, run_stage, stage, tmp_path / "parts", flags)
    held = safetensors.torch.load_file(tmp_path / "parts" / "checkpoint-3" / "model.safetensors")
    assert {weight.dtype for weight in held.values()} == {torch.float32}
    assert not any("lora" in name or "base_layer" in name for name in held)
    assert run_stage(STAGES[stage], "--resume", "--output", tmp_path / "parts")[0] == 0
    assert contents(out) == contents(tmp_path / "parts")
    if stage == "ppo":
        steps = [row for row in read_rows(out / "metrics.jsonl") if "split" not in row]
        assert steps[0]["kl"] == steps[0]["approx_kl_first"] == 0
        assert all(row["ratio_first"] == 1 for row in steps)
    folders = [(SCALAR if stage == "reward_model" else CAUSAL, "sft", out)]
    if kind == "checkpointed":
        folders.append((SCALAR, "reward_model", out / "critic"))
        shared = num_weights(world / "sft") + num_weights(world / "reward_model")
        own = num_weights(out / "adapter"), num_weights(out / "critic" / "adapter")
        assert f"moments take {4 * (shared + 4 * sum(own)) / 1e9:.3g} GB" in printed
        assert all(f"{number / 1e6:.3f} M trained" in printed for number in own)
    for auto, base, folder in folders:  # what is written is what peft makes of base and adapter
        options = {"dtype": torch.float32} | ({"num_labels": 1} if auto is SCALAR else {})
        merged = auto.from_pretrained(folder, **options).eval()
        raw = auto.from_pretrained(world / base, **options).eval()
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(raw), folder / "adapter").eval()
        tokens = torch.arange(3, 40)[None]
        results = [model(tokens).logits for model in (merged, adapted, raw)]
        torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
        assert (results[0] - results[2]).abs().max() > 1e-3
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 4, 0)
        assert config["base_model_name_or_path"] == str(world / base)


def test_in_bf16_what_is_evaluated_is_merged_and_is_what_is_saved(
    world, tmp_path, run_stage, monkeypatch
):
    """reward_model.py itself compares the saved model's scores with those of the merged one."""
    for stage, judge, adapted in (
        ("sft", "evaluate", [True, False]), ("reward_model", "score_pairs", [False] * 3)
    ):
        seen, measure = [], getattr(STAGES[stage], judge)

        def spied(model, *rest):
            seen.append(any("lora_" in name for name, _ in model.named_parameters()))
            return measure(model, *rest)

        monkeypatch.setattr(STAGES[stage], judge, spied)
        more = ["--lora-rank", 2, "--dtype", "bf16", "--epochs", 1, "--output", tmp_path / stage]
        status, out, err = run_stage(STAGES[stage], *flags_of(stage, world), *more)
        assert status == 0 and seen == adapted, err
        held = safetensors.torch.load_file(tmp_path / stage / "model.safetensors")
        assert len(held) > 10 and {weight.dtype for weight in held.values()} == {torch.float32}
    assert float(re.search(r"differ by at most (\S+)", out)[1]) == 0


def test_what_adapters_cannot_be_is_refused_in_one_line(world, tmp_path, run_stage):
    flags = ["--data", world / "sft.jsonl", "--output", tmp_path / "out", "--lora-rank", 2]
    refused(run_stage(STAGES["sft"], *flags), "sft", "--lora-rank", "about a --model")
    for family in ("mixtral", "gpt_oss", "mamba2"):
        words = "state-space" if family == "mamba2" else "mixture of experts"
        with pytest.raises(common.UserError, match=f"--lora-rank: .*{words}"):
            common.add_adapters(make_lm(family), 2, "x")


# === Adapter folders as input =====================================================================
def save_adapter(folder, base, kind="CAUSAL_LM", **changes):
    """Writes a folder as peft's users have them. Returns the model that peft runs."""
    options = {} if kind == "CAUSAL_LM" else {"num_labels": 1}
    model = (CAUSAL if kind == "CAUSAL_LM" else SCALAR).from_pretrained(
        base, dtype=torch.float32, **options
    )
    settings = dict(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], task_type=kind)
    model = peft.get_peft_model(model, peft.LoraConfig(**settings | changes))
    torch.manual_seed(3)
    for weight in trained(model).values():
        weight.data.normal_(std=0.2)
    model.save_pretrained(folder)
    return model.eval()


def test_an_adapter_folder_is_its_base_with_w_plus_alpha_over_r_b_a(world, tmp_path):
    save_adapter(tmp_path / "a", world / "sft")
    held = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    base = CAUSAL.from_pretrained(world / "sft", dtype=torch.float32)
    expected = base.state_dict() | summed_by_hand(held, 4, base, alpha=12)
    tokenizer = common.load_tokenizer(str(tmp_path / "a"))  # of the base: the folder has none
    model = common.load_causal_lm(str(tmp_path / "a"), tokenizer)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert all(weight.requires_grad for weight in model.parameters())
    assert model.state_dict().keys() == expected.keys()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-6)
    scalar, head_is_new = common.load_scalar_model(str(tmp_path / "a"), tokenizer)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert head_is_new and torch.equal(scalar.state_dict()[name], model.state_dict()[name])


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_head_or_embedding_is_merged_as_peft_runs_it_and_refused_if_they_are_tied(
    target, world, tmp_path
):
    tokenizer = common.load_tokenizer(str(world / "sft"))
    tokens = torch.arange(3, 40)[None]
    for tied in (False, True):
        base, folder = tmp_path / f"base{tied}", tmp_path / f"adapter{tied}"
        model = tiny_lm(vocab_size=len(tokenizer), tie_word_embeddings=tied)
        model.save_pretrained(base)
        expected = save_adapter(folder, base, target_modules=["v_proj", target])(tokens).logits
        if tied:
            with pytest.raises(common.UserError, match=f"{re.escape(str(folder))} .*tied") as error:
                common.load_causal_lm(str(folder), tokenizer)
            assert "\n" not in str(error.value)
        else:
            logits = common.load_causal_lm(str(folder), tokenizer)(tokens).logits
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_folder_goes_into_every_stage_and_the_reference_is_the_merged_model(
    world, tmp_path, run_stage
):
    causal, scalar = tmp_path / "causal", tmp_path / "scalar"
    save_adapter(causal, world / "sft")
    save_adapter(scalar, world / "reward_model", "SEQ_CLS")
    for stage, *flags in (
        ("sft", "--model", causal), ("reward_model", "--model", causal, "--lora-rank", 2),
        ("ppo", "--policy", causal, "--reward", scalar, "--lora-rank", 2),
        ("ppo", "--policy", causal, "--reward", scalar),
    ):
        out = tmp_path / f"{stage}{len(flags)}"
        flags += ["--iterations", 2] if stage == "ppo" else ["--epochs", 1]
        status, _, err = run_stage(STAGES[stage], *flags_of(stage, world), *flags, "--output", out)
        assert status == 0, err
        if stage == "ppo":
            rows = read_rows(out / "metrics.jsonl")
            assert rows[0]["kl"] == rows[1]["kl"] == 0 and rows[1]["ratio_first"] == 1
    head = safetensors.torch.load_file(scalar / "adapter_model.safetensors")
    loaded, _ = common.load_classifier(str(scalar))
    assert torch.equal(loaded.score.weight, head["base_model.model.score.weight"])
    # The adapter that is written is one of an adapter: still a folder that can be loaded.
    tokenizer = common.load_tokenizer(str(causal))
    again = common.load_causal_lm(str(tmp_path / "ppo6" / "adapter"), tokenizer).state_dict()
    held = safetensors.torch.load_file(tmp_path / "ppo6" / "model.safetensors")
    for name, weight in held.items():
        torch.testing.assert_close(again[name], weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("breakage, words", [
    ("less", "can't be merged"), ("more", "can't be merged"), ("shape", "can't be merged"),
    ("damaged", "can't be merged"), ("pickled", "can't be merged"), ("other", "can't be merged"),
    ("no base", "names no base model"), ("both", "give each a folder"),
])
def test_an_adapter_that_is_not_whole_is_refused_by_name(breakage, words, world, tmp_path):
    path = tmp_path / "adapter"
    save_adapter(path, world / "sft")
    file, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    held = safetensors.torch.load_file(file)
    first = min(held)
    if breakage == "less":
        del held[first]
    elif breakage == "more":
        held["base_model.model.lm_head.lora_A.weight"] = held[first].clone()
    elif breakage == "shape":
        held[first] = held[first][:1].clone()
    safetensors.torch.save_file(held, file)
    changes = {"no base": {"base_model_name_or_path": None}, "other": {"peft_type": "LOHA"}}
    changed = json.loads(config.read_text()) | changes.get(breakage, {})
    config.write_text(json.dumps(changed))
    if breakage == "damaged":
        file.write_bytes(file.read_bytes()[:100])
    elif breakage == "pickled":
        torch.save(held, path / "adapter_model.bin")
        file.unlink()
    elif breakage == "both":
        shutil.copy(world / "sft" / "model.safetensors", path)
    with pytest.raises(common.UserError, match=f"{re.escape(str(path))}.*{words}"):
        common.load_causal_lm(str(path), common.load_tokenizer(str(world / "sft")))


def test_a_family_without_a_classifier_goes_through_all_stages_from_adapter_folders(
    world, tmp_path, run_stage
):
    make_lm("cohere2").save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(world / "sft").save_pretrained(tmp_path / "base")
    policy, reward = tmp_path / "sft" / "adapter", tmp_path / "reward_model"
    for stage, *flags in (
        ("sft", "--model", tmp_path / "base", "--epochs", 1),
        ("reward_model", "--model", policy, "--epochs", 1),
        ("ppo", "--policy", policy, "--reward", reward, "--iterations", 2),
    ):
        flags = [*flags_of(stage, world, "--lora-rank", 2), *flags, "--output", tmp_path / stage]
        status, _, err = run_stage(STAGES[stage], *flags)
        assert status == 0, err
    first = read_rows(tmp_path / "ppo" / "metrics.jsonl")[1]
    assert first["kl"] == 0 and first["ratio_first"] == 1
    assert SCALAR.from_pretrained(tmp_path / "ppo" / "critic").score.weight.any()
