"""What --reward and --judge may name: functions, reward models of ours and from elsewhere, sums."""

import json
import os
import pathlib
import sys

import pytest
import torch
import transformers
import zoo
from conftest import DEMONSTRATIONS, read_rows, tiny_lm, tiny_scalar
from test_chat_and_formats import CHATML, HH, a_tokenizer
from test_cli import ppo_flags, refused
from test_resume import STAGES, contents, flags_of, in_child, stopped
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer

import common
import ppo
import reward_model
import rewards
import sft

# === Functions ====================================================================================
VALUES = {  # what a function returns for three responses: the scores, or None if it is refused
    "[1, 0, 2]": [1, 0, 2], "[True, False, True]": [1, 0, 1], "(1.0, 2.0, 3.0)": [1, 2, 3],
    "(float(len(text)) for text in responses)": [1, 2, 0], "[Fraction(1, 2), 1, 2]": [0.5, 1, 2],
    "numpy.array([1.5, 2.5, 3.5])": [1.5, 2.5, 3.5], "numpy.float16([1.5, 2, 3])": [1.5, 2, 3],
    "torch.ones(3, requires_grad=True)": [1, 1, 1], "torch.ones(3).bfloat16()": [1, 1, 1],
    "[torch.tensor(1.0), torch.tensor(2.0), 3]": [1, 2, 3],
    "None": None, "[1.0, None, 2.0]": None, "['1.0', '2', '3']": None, "'123'": None, "1.0": None,
    "torch.tensor(1.0)": None, "[1.0] * 2": None, "[1.0] * 4": None, "torch.ones(3, 2)": None,
    "{0: 1.0, 1: 2.0, 2: 3.0}": None, "{1.0, 2.0, 3.0}": None, "frozenset([1, 2, 3])": None, "[float('nan')] * 3": None,
    "[1e300] * 3": None, "[1 / 0] * 3": None, "sys.exit(0)": None, "later()": None,
}


@pytest.mark.filterwarnings("ignore:coroutine")
def test_numbers_in_any_form_count_as_they_are_and_all_else_is_refused_by_name(tmp_path):
    code = "import numpy, sys, torch\nfrom fractions import Fraction\nasync def later(): return [1, 2, 3]\n"
    for number, value in enumerate(VALUES):
        code += f"def f{number}(prompts, responses, rows): return {value}\n"
    (tmp_path / "values.py").write_text(code)
    given = torch.zeros(3, 5), None, [{"prompt": "A fox."}] * 3, ["a", "bc", ""]
    for number, (value, expected) in enumerate(VALUES.items()):
        scorer = rewards.FunctionScorer(f"{tmp_path}/values.py:f{number}")
        if expected is None:
            with pytest.raises(common.UserError, match=f"values.py:f{number} (failed|returned)"):
                scorer(*given)
        else:
            scores = scorer(*given)
            assert scores.tolist() == expected and not scores.requires_grad, value
            assert scores.dtype == torch.float32


def test_a_file_runs_once_for_all_flags_and_its_functions_cannot_change_what_the_run_sees(world, tmp_path, run_stage):
    (tmp_path / "shared.py").write_text("lengths, log = {}, []\n")
    file = tmp_path / "math.py"  # it is called like a library's module
    file.write_text(
        "import math, shared\nassert math.sqrt(4) == 2\nopen(f'{__file__}.runs', 'a').write('x')\n"
        "def greedy(prompts, responses, rows):\n"
        "    shared.lengths.update({text: len(text) for text in responses})\n"
        "    prompts.clear(), responses.clear(), rows[0].clear(), rows.clear()\n    return [0.0] * 8\n"
        "def length(prompts, responses, rows):\n    return [shared.lengths[text] for text in responses]\n"
        "def log(row):\n    shared.log.append(row)\n"
    )
    flags = ["--reward", f"{file}:greedy", f"{file}:length", "--judge", f"{file}:length", "--log", f"{file}:log"]
    status, _, err = run_stage(ppo, *ppo_flags(world, tmp_path / "out", *flags))
    assert status == 0, err
    assert (tmp_path / "math.py.runs").read_text() == "x"
    for row in read_rows(tmp_path / "out" / "samples.jsonl"):
        assert row["score"] == row["true_reward"] == len(row["response"]) and row["prompt"]
    rows = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert sys.modules["shared"].log == rows and len(rows) == 3


def test_a_function_that_lacks_memory_is_named_and_what_it_draws_or_switches_changes_no_run(tmp_path):
    (tmp_path / "mine.v2.py").write_text(
        "import torch\ntorch.manual_seed(9)\n"
        "def full(prompts, responses, rows):\n    raise ValueError('CUDA out of memory')\n"
        "def off(prompts, responses, rows):\n    torch.set_grad_enabled(False)\n    return [0.0]\n"
    )
    state, given = torch.get_rng_state(), (torch.zeros(1, 5), None, [{"prompt": "A fox."}], ["a"])
    with pytest.raises(common.UserError, match="full failed: ValueError: CUDA out of memory") as error:
        rewards.FunctionScorer(f"{tmp_path}/mine.v2.py:full")(*given)
    assert not common.is_out_of_memory(error.value)
    rewards.FunctionScorer(f"{tmp_path}/mine.v2.py:off")(*given)
    assert torch.is_grad_enabled() and torch.equal(state, torch.get_rng_state())


def test_one_reward_under_two_names_and_one_that_is_constant_but_for_rounding_are_refused(tmp_path):
    for other in (f"{tmp_path}/", f"{tmp_path}/x/.."):
        with pytest.raises(common.UserError, match="twice"):
            ppo.check_config(ppo.Config(reward=[str(tmp_path), other]))
    with pytest.raises(common.UserError, match="gives all responses the score 0.7"):
        rewards.mean_and_std(rewards.TokenScorer("x", None, 1), [0.7, 0.7 + 1e-8, 0.7 - 1e-8])


REWARD = '''
import multiprocessing, os, signal, subprocess, sys
calls = []
def length(text):
    return len(text)
def score(prompts, responses, rows):
    calls.append(None)
    if len(calls) == 1:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.map_async(length, responses).get(timeout=60) == [len(text) for text in responses]
    if len(calls) < 5 or os.path.exists("sent"):
        return [1.0] * len(responses)
    wait = [sys.executable, "-S", "-c", "print(flush=True); import time; time.sleep(0.5)"]
    program = subprocess.Popen(wait, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    program.stdout.readline()  # it has begun
    open("sent", "w").close()
    os.killpg(0, signal.SIGINT)  # as a terminal does: to the run and all that it has started
    return [float(program.wait() == 0)] * len(responses)
'''


def test_workers_can_import_a_function_and_a_ctrl_c_stops_the_run_but_no_program_of_the_function(
    world, tmp_path, run_stage, monkeypatch
):
    """Otherwise what these programs try would count as failed, in an iteration that is saved."""
    (tmp_path / "rewards.py").write_text(REWARD)  # as a module of the project is called
    monkeypatch.chdir(tmp_path)

    def run():
        os.setsid()
        flags = ppo_flags(world, "out", "--reward", "rewards.py:score", "--iterations", 4)
        status, _, err = run_stage(ppo, *flags)
        assert "to go on: " in err, err
        return [status]

    assert in_child(run) == 130
    rows = read_rows("out/metrics.jsonl")
    assert [row["score"] for row in rows] == [1.0] * 3  # an evaluation and two iterations
    umask = os.umask(0)
    os.umask(umask)
    for path in pathlib.Path("out/checkpoint-2").iterdir():
        assert path.is_dir() or path.stat().st_mode & 0o777 == 0o666 & ~umask  # others may read it
    status, out, err = run_stage(ppo, "--resume", "--output", "out")
    assert status == 0 and "resumed after 2" in out, err


# === Reward models ================================================================================
TEXTS = [("A fox meets a cub.", " The fox helps the cub."), ("An owl.", " It sings."), ("Oh?", "")]


def save_decoder(path, template=None, pad="<|pad|>", eos="<|end|>", **config):
    """Writes a one-label Llama with a tokenizer of its own; from elsewhere, if without a scale."""
    tokenizer = a_tokenizer(template, eos)
    tokenizer.pad_token = pad
    model = tiny_scalar(5, vocab_size=len(tokenizer), max_position_embeddings=128)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    del model.config.reward_mean, model.config.reward_std
    model.config.update(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model, tokenizer


def save_encoder(path, kind="bert"):
    """Writes a one-label BERT or RoBERTa with a tokenizer of words that joins pairs."""
    texts = [text for row in DEMONSTRATIONS for text in row.values()] + [" ".join(pair) for pair in TEXTS]
    words = " ".join(texts).lower().replace(".", " .").replace("?", " ?").split()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({*words})]
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * (kind == "bert")
    tokenizer = BertTokenizer(vocab={name: i for i, name in enumerate(names)}, model_input_names=inputs)
    make_config = transformers.BertConfig if kind == "bert" else transformers.RobertaConfig
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(make_config(
        vocab_size=len(names), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_labels=1, initializer_range=0.3, pad_token_id=0, max_position_embeddings=64,
    )).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model, tokenizer


def load(path, world, tokenizer=None, policy=None):
    """Returns the scorer of a folder, for the world's policy."""
    tokenizer = tokenizer or common.load_tokenizer(str(world / "sft"))
    policy = policy or common.load_causal_lm(str(world / "sft"), tokenizer)
    scorer = rewards.load_scorer(str(path), policy, tokenizer, 2, trust_remote_code=False)
    common.to_device(scorer.model, torch.device("cpu"), "auto")
    return scorer


def scores_of(scorer, prompts, responses):
    rows = [{"prompt": prompt} for prompt in prompts]
    return scorer(torch.zeros(1), None, rows, responses).tolist()


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_reads_prompt_and_response_as_a_pair_alone_and_in_a_batch(kind, world, tmp_path):
    model, tokenizer = save_encoder(tmp_path, kind)
    scorer = load(tmp_path, world)
    prompts, responses = zip(*TEXTS)
    scores = scores_of(scorer, prompts, responses)
    alone = []  # as a model card has it
    for prompt, response in TEXTS:
        alone.append(model(**tokenizer(prompt, response, return_tensors="pt")).logits.item())
    assert scores == pytest.approx(alone, abs=1e-5) and max(alone) - min(alone) > 1e-2
    assert scores_of(scorer, prompts[:1], responses[:1]) == pytest.approx(scores[:1], abs=1e-5)


CHAT = "<|start|><|im_start|>user\n{}<|im_end|>{}<|im_start|>assistant\n{}<|im_end|>"
ONE_LINE = CHATML.replace("<|im_end|>\n", "<|im_end|>")
SCALE = dict(reward_mean=0.25, reward_std=2.0)


@pytest.mark.parametrize("text, index, template, eos, pad, scale", [
    ("{}{}{}<|end|>", -1, None, "<|end|>", "<|pad|>", {}), ("{}{}{}<|end|>", -1, None, "<|end|>", None, {}),
    # With pad = EOS, transformers reads the token before EOS, and that head was trained there.
    ("{}{}{}<|end|>", -2, None, "<|end|>", "<|end|>", {}),
    (CHAT, -1, ONE_LINE, "<|end|>", "<|pad|>", {}),  # no EOS is added
    # Ours; ChatML puts a line feed after the EOS, and a forward pass of the whole text would read that.
    ("{}{}{}<|end|>", -1, None, "<|end|>", "<|pad|>", SCALE), (CHAT, -1, CHATML, "<|im_end|>", "<|pad|>", SCALE),
])
def test_a_decoder_of_other_tokens_is_read_where_it_was_trained(
    text, index, template, eos, pad, scale, world, tmp_path
):
    model, tokenizer = save_decoder(tmp_path, template, pad, eos, **scale)
    prompts, responses = zip(*TEXTS)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    expected = []
    for prompt, response in TEXTS:
        line_feed = "\n" if template == CHATML else ""
        whole = text.format(prompt, line_feed, response.strip() if template else response)
        hidden = model.model(torch.tensor([tokenizer(whole, add_special_tokens=False)["input_ids"]])).last_hidden_state
        expected.append(model.score(hidden[0, index]).item())
    if scale:
        expected = [(score - 0.25) / 2 for score in expected]
    scorer = load(tmp_path, world)
    if template:
        assert scores_of(scorer, chats, responses) == pytest.approx(expected, abs=1e-5)
    if not (template and scale):  # a template makes a plain prompt the user's message, but not for ours
        assert scores_of(scorer, prompts, responses) == pytest.approx(expected, abs=1e-5)


def test_only_ours_with_the_policys_tokens_template_and_ids_reads_tokens(world, tmp_path, capsys):
    scale = dict(reward_mean=0.0, reward_std=1.0)
    save_decoder(tmp_path / "ours", CHATML, **scale)
    save_decoder(tmp_path / "elsewhere", CHATML)
    small, big = (tiny_lm(vocab_size=len(a_tokenizer()) + more) for more in (0, 64))
    for name, template, policy, reads_tokens in (
        ("ours", CHATML, small, True), ("ours", HH, small, False), ("ours", CHATML, big, False),
        ("elsewhere", CHATML, small, False),
    ):
        tokenizer = a_tokenizer(template, "<|end|>")
        scorer = load(tmp_path / name, world, tokenizer, policy)
        assert scorer.reads_tokens == reads_tokens
        assert scorer.needs_scale == (name == "elsewhere")
        assert ("reads texts: responses are decoded" in capsys.readouterr().out) != reads_tokens


@pytest.mark.parametrize("family", ["granite", "cohere2", "mamba"])
def test_a_family_without_a_classifier_gets_one_that_saves_resumes_and_loads_as_others_do(
    family, world, tmp_path, run_stage, monkeypatch
):
    torch.manual_seed(0)
    config = zoo.FAMILIES[family][1](transformers)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "lm")
    AutoTokenizer.from_pretrained(world / "sft").save_pretrained(tmp_path / "lm")
    flags = flags_of("reward_model", world, "--epochs", 1, "--model", tmp_path / "lm")
    assert run_stage(reward_model, *flags, "--output", tmp_path / "whole")[0] == 0
    stopped(monkeypatch, run_stage, "reward_model", tmp_path / "parts", flags, 2)
    assert run_stage(reward_model, "--resume", "--output", tmp_path / "parts")[0] == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")
    made, _ = common.load_classifier(str(tmp_path / "whole"))  # transformers 5.17 has no Auto class for it
    model = type(made).from_pretrained(tmp_path / "whole").eval()
    assert model.num_labels == 1 and model.config.reward_std > 0
    tokens = torch.arange(5, 20)[None]
    raw = model.score(model.base_model(tokens).last_hidden_state[0, -1]).item()
    if family != "mamba":  # whose output transformers' own forward pass of a classifier can't take
        assert model(tokens).logits.item() == pytest.approx(raw, abs=1e-5)
    scorer = load(tmp_path / "whole", world)
    assert scorer.reads_tokens
    score = scorer(tokens, torch.ones_like(tokens).bool(), None, None).item()
    assert score == pytest.approx((raw - model.config.reward_mean) / model.config.reward_std, abs=1e-4)


# === In a run =====================================================================================
def test_rewards_are_summed_one_from_elsewhere_gets_a_scale_and_the_critic_starts_from_the_first_of_ours(
    world, tmp_path, run_stage
):
    model, tokenizer = save_encoder(tmp_path / "rm")
    (tmp_path / "rule.py").write_text("def short(prompts, texts, rows):\n    return [-len(t) / 100 for t in texts]\n")
    flags = ppo_flags(world, tmp_path / "out", "--response-length", 12, "--overwrite", "--reward")
    flags += [f"{tmp_path / 'rule.py'}:short", tmp_path / "rm"]
    status, out, err = run_stage(ppo, *flags)
    assert status == 0 and "the critic starts from the policy" in out, err
    raw = {}
    for row in read_rows(tmp_path / "out" / "samples.jsonl"):
        inputs = tokenizer(row["prompt"], row["response"].strip(), return_tensors="pt")
        raw[row["score"] + len(row["response"]) / 100] = model(**inputs).logits.item()
    low, high = min(raw), max(raw)
    std = (raw[high] - raw[low]) / (high - low)
    mean = raw[low] - std * low
    for score, value in raw.items():  # one scale for all
        assert score == pytest.approx((value - mean) / std, abs=1e-3)
    assert f"mean {mean:.3f} and std {std:.3f}" in out
    first = read_rows(tmp_path / "out" / "metrics.jsonl")[1]
    assert abs(first["score_parts"][1]) < 1  # 8 responses like those that were measured
    assert sum(first["score_parts"]) == pytest.approx(first["score"], abs=1e-5)
    status, out, err = run_stage(ppo, *flags, world / "reward_model")
    assert status == 0 and "starts from the policy" not in out, err
    first = read_rows(tmp_path / "out" / "metrics.jsonl")[1]
    assert len(first["score_parts"]) == 3 and sum(first["score_parts"]) == pytest.approx(first["score"], abs=1e-5)


def test_reward_models_that_cannot_be_used_are_refused_in_one_line(world, tmp_path, run_stage):
    tokenizer = AutoTokenizer.from_pretrained(world / "sft")
    tiny_scalar(vocab_size=len(tokenizer), max_position_embeddings=8).save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    model, _ = save_encoder(tmp_path / "labels")
    model.config.num_labels = 2
    model.config.save_pretrained(tmp_path / "labels")
    model, _ = save_encoder(tmp_path / "cut")
    model.bert.save_pretrained(tmp_path / "cut")
    save_decoder(tmp_path / "begun")
    (tmp_path / "begun" / "args.json").write_text('{"written": [], "finished": false}')
    for name, words in (
        ("short", "do not fit the 8 positions of"), ("labels", "has 2 labels; a reward model has one"),
        ("cut", "is no trained reward model"),
        ("begun", f"is not finished; --resume --output {tmp_path / 'begun'} continues it"),
    ):
        refused(run_stage(ppo, *ppo_flags(world, tmp_path / "out", "--reward", tmp_path / name)), "ppo", words)
    assert not (tmp_path / "out").exists()


# === What is not here =============================================================================
def test_without_peft_one_line_names_it(world, tmp_path, run_stage, monkeypatch):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(world / "sft")}))
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    for stage, module in STAGES.items():
        flags = [*flags_of(stage, world), "--output", tmp_path / "out"]
        refused(run_stage(module, *flags, "--lora-rank", 2), stage, "--lora-rank", "peft")
        flag = "--policy" if stage == "ppo" else "--model"
        refused(run_stage(module, *flags, flag, adapter), stage, f"adapter {adapter}", "peft")
    assert not (tmp_path / "out").exists()


def test_code_that_comes_with_a_model_is_run_only_if_asked(world, tmp_path, run_stage):
    folder, ran = tmp_path / "own", tmp_path / "ran"
    tiny_lm(vocab_size=320, max_position_embeddings=128).save_pretrained(folder)
    AutoTokenizer.from_pretrained(world / "sft").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own_llama"}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    flags = flags_of("sft", world, "--epochs", 1, "--model", folder, "--output", tmp_path / "out")
    refused(run_stage(sft, *flags), "sft", "code of its own", "--trust-remote-code")
    assert not ran.exists()
    status, _, err = run_stage(sft, *flags, "--trust-remote-code")
    assert status == 0 and ran.exists(), err


def test_a_hub_id_that_cannot_be_reached_is_announced_and_the_hubs_words_are_kept(monkeypatch, capsys):
    def refuse(path, **options):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access.")

    monkeypatch.setattr(common.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(common.UserError) as error:
        common.load_tokenizer("x/y")
    assert "x/y can't be loaded: You are trying to access a gated repo." in str(error.value)
    assert "x/y is no folder here: looking for it on the" in capsys.readouterr().out
