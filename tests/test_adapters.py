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
from conftest import ROOT, read_rows, tiny_lm
from test_cli import refused
from test_resume import STAGES, contents, flags_of, stopped
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common
import harness
import ppo

peft = pytest.importorskip("peft", reason="peft is optional")
CPU = torch.device("cpu")
TOKENS = torch.arange(3, 40)[None]


def load(folder, is_scalar=False):
    if is_scalar:
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=1).eval()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_lm(family):
    torch.manual_seed(0)
    config = zoo.FAMILIES[family][1](transformers)
    for name in vars(config).keys() & {"resid_pdrop", "embd_pdrop", "attn_pdrop"}:
        setattr(config, name, 0.0)  # as common.py loads it
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def trained(model):
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def summed_by_hand(own, rank, original, alpha):
    """Returns {name in the original: W + alpha / rank B A} for each A and B among `own`."""
    summed = {}
    for name in own:
        if ".lora_A." in name:
            a, b = own[name], own[name.replace(".lora_A.", ".lora_B.")]
            assert a.shape[0] == b.shape[1] == rank
            layer = name.partition(".lora_A.")[0].removeprefix("base_model.model.")
            module = original.get_submodule(layer)
            delta = torch.einsum("or,ri->oi", b, a) * alpha / rank
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
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_with_adapters_starts_as_without_and_is_w_plus_2_b_a_merged_or_not(family, checkpointing):
    model, rank = make_lm(family), 3
    original = copy.deepcopy(model).requires_grad_(False)
    common.add_adapters(model, rank, "x")
    before = outputs(original)
    assert type(model) is type(original) and torch.equal(outputs(model), before)
    own = trained(model)
    for weight in own.values():  # as training might leave them; a new B is 0
        weight.data.add_(torch.randn_like(weight), alpha=0.1)
    leaves = {name: weight.detach().clone().requires_grad_(True) for name, weight in own.items()}
    summed = summed_by_hand(leaves, rank, original, alpha=2 * rank)
    kinds = ("Linear", "Conv1D")
    linear = [name for name, module in original.named_modules() if type(module).__name__ in kinds]
    assert {f"{name}.weight" for name in linear} - {"lm_head.weight"} == {*summed}
    common.to_device(model, CPU, "float32", gradient_checkpointing=checkpointing)

    class Reimplemented(torch.nn.Module):
        device = CPU

        def forward(self, **inputs):
            return torch.func.functional_call(original, summed, kwargs=inputs)

    actual, expected = outputs(model), outputs(Reimplemented())
    assert (expected - before).abs().max() > 0.1  # the adapters matter
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    for logits in (actual, expected):
        logits.logsumexp(-1).pow(2).sum().backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == (name in own) == ("lora_" in name)
    for name, leaf in leaves.items():
        scale = leaf.grad.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(own[name].grad, leaf.grad, atol=1e-4 * scale, rtol=1e-4)
    common.merge_adapters(model)
    torch.testing.assert_close(outputs(model), expected, atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == list(original.state_dict())


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
FUNCTION = f"{ROOT}/data/true_reward.py:true_reward"


def plain_names(model):
    weights = {name.replace(".base_layer", ""): weight for name, weight in model.named_parameters()}
    return {name: weight for name, weight in weights.items() if "lora_" not in name}


@pytest.mark.parametrize("critic_from", ["reward model", "shared", "function"])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_models_share_frozen_weights_and_start_as_what_they_adapt(critic_from, dtype, world):
    reward = FUNCTION if critic_from == "function" else world / "reward_model"
    cfg = ppo.Config(
        policy=str(world / "sft"), reward=[str(reward)], lora_rank=2, device="cpu", dtype=dtype,
        critic="shared" if critic_from == "shared" else "separate",
    )
    tokenizer = common.load_tokenizer(cfg.policy)
    policy, ref_policy, critic, scorers = ppo.load_models(cfg, tokenizer, 64, CPU)
    of_policy, of_ref = plain_names(policy), plain_names(ref_policy)
    assert of_policy.keys() == of_ref.keys()
    assert all(of_policy[name] is weight for name, weight in of_ref.items())
    if critic_from != "shared":
        source = of_policy if critic_from == "function" else plain_names(scorers[0].model)
        of_critic = plain_names(critic)
        head = of_critic.pop("score.weight")
        assert all(weight is source[name] for name, weight in of_critic.items())
        assert torch.equal(head, source.get("score.weight", torch.zeros_like(head)))
        assert head is not source.get("score.weight")
    loaded = load(world / "sft")
    for name, weight in of_ref.items():  # frozen: as loaded, with matrices rounded once in bf16
        is_rounded = dtype == "bf16" and re.search("_proj|lm_head", name)
        expected = loaded.get_parameter(name).to(torch.bfloat16 if is_rounded else torch.float32)
        assert torch.equal(weight, expected) and not weight.requires_grad, name
    own = [*trained(policy).values(), *trained(critic).values()]
    assert {weight.dtype for weight in own} == {torch.float32}
    assert all("lora_" in name for name in trained(policy))
    optimizer, _ = ppo.make_optimizer(cfg, policy, critic)
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert held == {id(weight) for weight in own}  # so no step moves a frozen one
    assert torch.equal(outputs(policy), outputs(ref_policy))  # KL 0, to the last bit
    assert not any(weight.any() for name, weight in trained(critic).items() if ".lora_B." in name)


# === Whole runs ===================================================================================
def num_weights(folder):
    (file,) = folder.glob("*.safetensors")
    return sum(weight.numel() for weight in safetensors.torch.load_file(file).values())


CHECKPOINTED = ("--gradient-checkpointing", "--advantage", "bandit")


@pytest.mark.parametrize("stage, more", [
    ("sft", ()), ("reward_model", ()), ("ppo", ("--critic", "shared")), ("ppo", ("--reward", FUNCTION)),
    ("ppo", CHECKPOINTED),
])
def test_a_run_that_stops_and_resumes_equals_one_that_does_not_and_writes_ordinary_folders(
    stage, more, world, tmp_path, run_stage, monkeypatch
):
    out = tmp_path / "whole"
    flags = [*flags_of(stage, world), "--lora-rank", 2, "--lr", 0.01, *more]
    flags += ["--iterations", 4] if stage == "ppo" else []
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
    folders = [("sft", out, stage == "reward_model")]
    if more == CHECKPOINTED:
        folders.append(("reward_model", out / "critic", True))
        shared = num_weights(world / "sft") + num_weights(world / "reward_model")
        own = num_weights(out / "adapter"), num_weights(out / "critic" / "adapter")
        assert f"moments take {4 * (shared + 4 * sum(own)) / 1e9:.3g} GB" in printed
        assert all(f"{number / 1e6:.3f} M trained" in printed for number in own)
    for base, folder, is_scalar in folders:  # what is written is what peft makes of base and adapter
        raw, merged = load(world / base, is_scalar), load(folder, is_scalar)
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(raw), folder / "adapter").eval()
        torch.testing.assert_close(merged(TOKENS).logits, adapted(TOKENS).logits, atol=1e-4, rtol=1e-4)
        assert (merged(TOKENS).logits - raw(TOKENS).logits).abs().max() > 1e-3
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 4, 0)
        assert config["base_model_name_or_path"] == str(world / base)


def test_in_bf16_what_is_evaluated_is_what_is_saved(world, tmp_path, run_stage):
    more, rows = ["--lora-rank", 2, "--dtype", "bf16", "--epochs", 1], []
    for stage, model in (("sft", world / "sft"), ("sft", tmp_path / "0"), ("reward_model", world / "sft")):
        folder = tmp_path / str(len(rows))
        status, out, err = run_stage(
            STAGES[stage], *flags_of(stage, world), *more, "--model", model, "--output", folder
        )
        assert status == 0, err
        rows.append(read_rows(folder / "metrics.jsonl")[-1])
        held = safetensors.torch.load_file(folder / "model.safetensors")
        assert len(held) > 10 and {weight.dtype for weight in held.values()} == {torch.float32}
    assert rows[1]["loss_before"] == rows[0]["loss"]
    assert float(re.search(r"differ by at most (\S+)", out)[1]) == 0


def test_what_adapters_cannot_be_is_refused_in_one_line(world, tmp_path, run_stage):
    flags = ["--data", world / "sft.jsonl", "--output", tmp_path / "out", "--lora-rank", 2]
    refused(run_stage(STAGES["sft"], *flags), "sft", "--lora-rank", "about a --model")
    for family in ("mixtral", "gpt_oss", "mamba2"):
        words = "state-space" if family == "mamba2" else "mixture of experts"
        with pytest.raises(common.UserError, match=f"--lora-rank: .*{words}"):
            common.add_adapters(make_lm(family), 2, "x")


# === Adapter folders as input =====================================================================
def save_adapter(folder, base, is_scalar=False, targets=("q_proj", "down_proj")):
    """Writes a folder as peft's users have them. Returns the model that peft runs."""
    kind = "SEQ_CLS" if is_scalar else "CAUSAL_LM"
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=[*targets], task_type=kind)
    model = peft.get_peft_model(load(base, is_scalar), config)
    torch.manual_seed(3)
    for weight in trained(model).values():
        weight.data.normal_(std=0.2)
    model.save_pretrained(folder)
    return model.eval()


def test_an_adapter_folder_is_its_base_with_w_plus_alpha_over_r_b_a(world, tmp_path):
    save_adapter(tmp_path, world / "sft")
    base = load(world / "sft")
    held = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    expected = base.state_dict() | summed_by_hand(held, 4, base, alpha=12)
    tokenizer = common.load_tokenizer(str(tmp_path))  # of the base: the folder has none
    model = common.load_causal_lm(str(tmp_path), tokenizer)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert all(weight.requires_grad for weight in model.parameters())
    torch.testing.assert_close(dict(model.state_dict()), dict(expected), atol=1e-6, rtol=1e-6)
    scalar, head_is_new = common.load_scalar_model(str(tmp_path), tokenizer)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert head_is_new and torch.equal(scalar.state_dict()[name], model.state_dict()[name])


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_head_or_embedding_is_merged_as_peft_runs_it_and_refused_if_they_are_tied(
    target, tied, world, tmp_path
):
    tokenizer = common.load_tokenizer(str(world / "sft"))
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny_lm(vocab_size=len(tokenizer), tie_word_embeddings=tied).save_pretrained(base)
    expected = save_adapter(folder, base, targets=("v_proj", target))(TOKENS).logits
    if tied:
        with pytest.raises(common.UserError, match=f"{re.escape(str(folder))} .*tied") as error:
            common.load_causal_lm(str(folder), tokenizer)
        assert "\n" not in str(error.value)
    else:
        model = common.load_causal_lm(str(folder), tokenizer)
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)
        scalar, head_is_new = common.load_scalar_model(str(folder), tokenizer)  # has no LM head
        hidden = [each.base_model(TOKENS).last_hidden_state for each in (scalar, model)]
        assert head_is_new and torch.equal(*hidden)


def test_an_adapter_folder_goes_into_every_stage_and_the_reference_is_the_merged_model(world, tmp_path, run_stage):
    base, causal, scalar = (tmp_path / name for name in ("base", "causal", "scalar"))
    make_lm("cohere2").save_pretrained(base)  # a family without a classifier of transformers'
    AutoTokenizer.from_pretrained(world / "sft").save_pretrained(base)
    save_adapter(causal, base)
    save_adapter(scalar, world / "reward_model", is_scalar=True)
    for stage, name, *flags in (
        ("sft", "sft", "--model", causal, "--epochs", 1),
        ("reward_model", "rm", "--model", causal, "--lora-rank", 2, "--epochs", 1),
        ("ppo", "ppo", "--policy", causal, "--reward", tmp_path / "rm", "--lora-rank", 2, "--iterations", 2),
        ("ppo", "whole", "--policy", causal, "--reward", scalar, "--iterations", 2),
    ):
        flags = [*flags_of(stage, world), *flags, "--output", tmp_path / name]
        status, _, err = run_stage(STAGES[stage], *flags)
        assert status == 0, err
        if stage == "ppo":
            rows = read_rows(tmp_path / name / "metrics.jsonl")
            assert rows[0]["kl"] == rows[1]["kl"] == 0 and rows[1]["ratio_first"] == 1
            assert common.load_classifier(str(tmp_path / name / "critic"))[0].score.weight.any()
    head = safetensors.torch.load_file(scalar / "adapter_model.safetensors")
    loaded, _ = common.load_classifier(str(scalar))
    assert torch.equal(loaded.score.weight, head["base_model.model.score.weight"])
    assert not hasattr(loaded.config, "reward_mean")  # which is the base's: its scale is measured anew
    # The adapter that is written is one of an adapter: still a folder that can be loaded.
    again = common.load_causal_lm(str(tmp_path / "ppo" / "adapter"), common.load_tokenizer(str(causal)))
    held = safetensors.torch.load_file(tmp_path / "ppo" / "model.safetensors")
    for name, weight in held.items():
        torch.testing.assert_close(again.state_dict()[name], weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("breakage, words", [
    *((breakage, "can't be merged") for breakage in ("less", "more", "shape", "damaged", "pickled", "other")),
    ("no base", "names no base model"), ("both", "give each a folder"), ("no JSON", "can't read"),
])
def test_an_adapter_that_is_not_whole_is_refused_by_name(breakage, words, world, tmp_path):
    save_adapter(tmp_path, world / "sft")
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    held = safetensors.torch.load_file(file)
    first = min(held)
    changed = {
        "less": {name: weight for name, weight in held.items() if name != first},
        "more": held | {"base_model.model.lm_head.lora_A.weight": held[first].clone()},
        "shape": held | {first: held[first][:1].clone()},
    }
    safetensors.torch.save_file(changed.get(breakage, held), file)
    changes = {"no base": {"base_model_name_or_path": None}, "other": {"peft_type": "LOHA"}}.get(breakage, {})
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    if breakage == "no JSON":
        config.write_text("{")
    if breakage == "damaged":
        file.write_bytes(file.read_bytes()[:100])
    elif breakage == "pickled":
        torch.save(held, tmp_path / "adapter_model.bin")
        file.unlink()
    elif breakage == "both":
        shutil.copy(world / "sft" / "model.safetensors", tmp_path)
    with pytest.raises(common.UserError, match=f"{re.escape(str(tmp_path))}.*{words}|{words} {re.escape(str(config))}"):
        common.load_causal_lm(str(tmp_path), common.load_tokenizer(str(world / "sft")))
