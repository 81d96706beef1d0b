"""What --reward and --judge may name: functions, reward models of ours and from elsewhere, sums."""

import json
import os
import sys

import pytest
import torch
import transformers
import zoo
from conftest import DEMONSTRATIONS, read_rows, tiny_lm, tiny_scalar
from test_chat_and_formats import CHATML, HH, a_tokenizer
from test_cli import ppo_flags, refused
from test_resume import STAGES, contents, flags_of, in_child, stopped
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import PreTrainedTokenizerFast

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
    "{0: 1.0, 1: 2.0, 2: 3.0}": None, "{1.0, 2.0, 3.0}": None, "[float('nan')] * 3": None,
    "[1e300] * 3": None, "[1 / 0] * 3": None, "sys.exit(0)": None, "later()": None,
}


@pytest.mark.filterwarnings("ignore:coroutine")
def test_numbers_in_any_form_count_as_they_are_and_all_else_is_refused_by_name(tmp_path):
    code = "import numpy, sys, torch\nfrom fractions import Fraction\n"
    code += "async def later(): return [1, 2, 3]\n"
    for number, value in enumerate(VALUES):
        code += f"def f{number}(prompts, responses, rows): return {value}\n"
    (tmp_path / "values.py").write_text(code)
    rows = [{"prompt": "A fox."}, {"prompt": "An owl."}, {"prompt": "A bear."}]
    for number, (value, expected) in enumerate(VALUES.items()):
        scorer = rewards.FunctionScorer(f"{tmp_path}/values.py:f{number}")
        if expected is None:
            with pytest.raises(common.UserError, match=f"values.py:f{number} (failed|returned)"):
                scorer(torch.zeros(3, 5), None, rows, ["a", "bc", ""])
        else:
            scores = scorer(torch.zeros(3, 5), None, rows, ["a", "bc", ""])
            assert scores.tolist() == expected and not scores.requires_grad, value
            assert scores.dtype == torch.float32


def test_a_file_runs_once_for_all_flags_and_its_functions_cannot_change_what_the_run_sees(
    world, tmp_path, run_stage
):
    (tmp_path / "shared.py").write_text("lengths, log = {}, []\n")
    (tmp_path / "math.py").write_text(  # it is called like a library's module
        "import math, shared\nassert math.sqrt(4) == 2\n"
        "open(f'{__file__}.runs', 'a').write('x')\n"
        "def greedy(prompts, responses, rows):\n"
        "    shared.lengths.update({text: len(text) for text in responses})\n"
        "    prompts.clear(), responses.clear(), rows[0].clear(), rows.clear()\n"
        "    return [0.0] * 8\n"
        "def length(prompts, responses, rows):\n"
        "    return [shared.lengths[text] for text in responses]\n"
        "def log(row):\n    shared.log.append(row)\n"
    )
    file = tmp_path / "math.py"
    flags = ["--reward", f"{file}:greedy", f"{file}:length", "--judge", f"{file}:length"]
    flags = ppo_flags(world, tmp_path / "out", *flags, "--log", f"{file}:log")
    status, _, err = run_stage(ppo, *flags)
    assert status == 0, err
    assert (tmp_path / "math.py.runs").read_text() == "x"
    for row in read_rows(tmp_path / "out" / "samples.jsonl"):
        assert row["score"] == row["true_reward"] == len(row["response"]) and row["prompt"]
    rows = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert sys.modules["shared"].log == rows and len(rows) == 3


REWARD = '''
import multiprocessing, os, signal, subprocess, sys
calls = []
def length(text):
    return float(len(text))
def score(prompts, responses, rows):
    calls.append(None)
    if len(calls) == 1:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            lengths = pool.map_async(length, responses).get(timeout=60)
            assert lengths == [len(text) for text in responses]
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
    (tmp_path / "reward_with_workers.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)

    def run():
        os.setsid()
        spec = "reward_with_workers.py:score"
        flags = ppo_flags(world, "out", "--reward", spec, "--iterations", 4)
        status, _, err = run_stage(ppo, *flags)
        assert "to go on: " in err, err
        return [status]

    assert in_child(run) == 130
    rows = read_rows("out/metrics.jsonl")
    assert [row["score"] for row in rows] == [1.0] * 3  # an evaluation and two iterations
    assert os.path.isdir("out/checkpoint-2")
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
    """Writes a one-label BERT or RoBERTa with a word-level tokenizer that joins pairs."""
    texts = [text for row in DEMONSTRATIONS for text in row.values()] + [" ".join(x) for x in TEXTS]
    words = " ".join(texts).lower().replace(".", " .").replace("?", " ?").split()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({*words})]
    vocabulary = {word: i for i, word in enumerate(names)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_input_names=inputs if kind == "bert" else inputs[::2],
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
    )
    torch.manual_seed(0)
    make_config = transformers.BertConfig if kind == "bert" else transformers.RobertaConfig
    model = AutoModelForSequenceClassification.from_config(make_config(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=1, initializer_range=0.3, pad_token_id=0,
        max_position_embeddings=64,
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


def read_by_hand(model, ids, index=-1):
    """Returns a decoder's head at one token of a text."""
    return model.score(model.model(torch.tensor([ids])).last_hidden_state[0, index]).item()


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


@pytest.mark.parametrize("pad", ["<|pad|>", None, "<|end|>"])
def test_a_decoder_from_elsewhere_reads_what_its_own_forward_reads_whatever_its_pad(
    pad, world, tmp_path
):
    """With pad = EOS, transformers reads the token before EOS, and that head was trained there."""
    model, tokenizer = save_decoder(tmp_path, pad=pad)
    scores = scores_of(load(tmp_path, world), *zip(*TEXTS))
    for (prompt, response), score in zip(TEXTS, scores, strict=True):
        ids = tokenizer(prompt)["input_ids"] + tokenizer(response)["input_ids"]
        ids.append(tokenizer.eos_token_id)
        expected = read_by_hand(model, ids, -2 if pad == "<|end|>" else -1)
        assert score == pytest.approx(expected, abs=1e-5)


def test_a_template_makes_a_plain_prompt_the_users_message(world, tmp_path):
    model, tokenizer = save_decoder(tmp_path, CHATML.replace("<|im_end|>\n", "<|im_end|>"))
    scorer = load(tmp_path, world)
    chat = [{"role": "user", "content": TEXTS[0][0]}]
    scores = scores_of(scorer, [chat, TEXTS[0][0]], [TEXTS[0][1]] * 2)
    text = "<|start|><|im_start|>user\nA fox meets a cub.<|im_end|><|im_start|>assistant\n"
    text += "The fox helps the cub.<|im_end|>"  # no EOS is added
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert scores == pytest.approx([read_by_hand(model, ids)] * 2, abs=1e-5)


@pytest.mark.parametrize("template", [None, CHATML])
def test_our_reward_model_of_other_tokens_is_read_where_it_was_trained(template, world, tmp_path):
    """ChatML puts a line feed after the EOS; a forward pass of the whole text would read that."""
    eos = "<|im_end|>" if template else "<|end|>"
    model, tokenizer = save_decoder(tmp_path, template, eos=eos, reward_mean=0.25, reward_std=2.0)
    prompt, response = TEXTS[0]
    text = prompt + response + eos
    if template:
        text = f"<|start|><|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        text += response.strip() + eos
        prompt = [{"role": "user", "content": prompt}]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    score = scores_of(load(tmp_path, world), [prompt], [response])
    assert score == pytest.approx([(read_by_hand(model, ids) - 0.25) / 2], abs=1e-5)


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
    flags = flags_of("reward_model", world, "--epochs", 1)
    flags[flags.index("--model") + 1] = tmp_path / "lm"
    assert run_stage(reward_model, *flags, "--output", tmp_path / "whole")[0] == 0
    stopped(monkeypatch, run_stage, "reward_model", tmp_path / "parts", flags, 2)
    assert run_stage(reward_model, "--resume", "--output", tmp_path / "parts")[0] == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "parts")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    assert model.num_labels == 1 and model.config.reward_std > 0
    tokens = torch.arange(5, 20)[None]
    raw = model.score(model.base_model(tokens).last_hidden_state[0, -1]).item()
    if family != "mamba":  # whose output transformers' own forward pass of a classifier can't take
        assert model(tokens).logits.item() == pytest.approx(raw, abs=1e-5)
    scorer = load(tmp_path / "whole", world)
    assert scorer.reads_tokens
    score = scorer(tokens, torch.ones_like(tokens).bool(), None, None)[0].item()
    mean, std = model.config.reward_mean, model.config.reward_std
    assert score == pytest.approx((raw - mean) / std, abs=1e-4)


# === In a run =====================================================================================
def test_a_reward_model_from_elsewhere_gets_a_scale_and_the_critic_starts_from_the_policy(
    world, tmp_path, run_stage
):
    model, tokenizer = save_encoder(tmp_path / "rm")
    flags = ppo_flags(world, tmp_path / "out", "--reward", tmp_path / "rm", "--response-length", 12)
    status, out, err = run_stage(ppo, *flags)
    assert status == 0 and "the critic starts from the policy" in out, err
    raw = {}
    for row in read_rows(tmp_path / "out" / "samples.jsonl"):
        inputs = tokenizer(row["prompt"], row["response"].strip(), return_tensors="pt")
        raw[row["score"]] = model(**inputs).logits.item()
    low, high = min(raw), max(raw)
    std = (raw[high] - raw[low]) / (high - low)
    mean = raw[low] - std * low
    for score, value in raw.items():  # one scale for all
        assert score == pytest.approx((value - mean) / std, abs=1e-3)
    assert f"mean {mean:.3f} and std {std:.3f}" in out
    evaluation = read_rows(tmp_path / "out" / "metrics.jsonl")[0]
    assert abs(evaluation["score"]) < 0.6  # 24 responses like those that were measured


def test_several_rewards_are_summed_and_the_critic_starts_from_the_first_model(
    world, tmp_path, run_stage
):
    file = tmp_path / "rule.py"
    file.write_text("def short(prompts, texts, rows):\n    return [-len(t) / 100 for t in texts]\n")
    scores = []
    model, rule = world / "reward_model", f"{file}:short"
    for names in ([model], [rule], [rule, model]):
        flags = ppo_flags(world, tmp_path / "out", "--overwrite", "--reward", *names)
        status, out, err = run_stage(ppo, *flags)
        assert status == 0 and ("starts from the policy" in out) == (len(scores) == 1), err
        row = read_rows(tmp_path / "out" / "metrics.jsonl")[1]
        assert len(row["score_parts"]) == len(names)
        assert sum(row["score_parts"]) == pytest.approx(row["score"], abs=1e-5)
        samples = read_rows(tmp_path / "out" / "samples.jsonl")
        scores.append(torch.tensor([row["score"] for row in samples if row["iteration"] == 0]))
    alone, rule, both = scores
    assert torch.allclose(alone + rule, both, atol=1e-5) and rule.abs().max() > 0.01


def test_reward_models_that_cannot_be_used_are_refused_in_one_line(world, tmp_path, run_stage):
    tokenizer = AutoTokenizer.from_pretrained(world / "sft")
    model = tiny_scalar(vocab_size=len(tokenizer), max_position_embeddings=8)
    model.save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    model, _ = save_encoder(tmp_path / "labels")
    model.config.num_labels = 2
    model.config.save_pretrained(tmp_path / "labels")
    model, _ = save_encoder(tmp_path / "cut")
    model.bert.save_pretrained(tmp_path / "cut")
    save_decoder(tmp_path / "begun")
    (tmp_path / "begun" / "args.json").write_text('{"written": [], "finished": false}')
    for name, words in (
        ("short", "do not fit the 8 positions of"),
        ("labels", "has 2 labels; a reward model has one"), ("cut", "is no trained reward model"),
        ("begun", f"is not finished; --resume --output {tmp_path / 'begun'} continues it"),
    ):
        flags = ppo_flags(world, tmp_path / "out", "--reward", tmp_path / name)
        refused(run_stage(ppo, *flags), "ppo", words)
    assert not (tmp_path / "out").exists()


# === What is not here =============================================================================
def test_without_peft_one_line_names_it(world, tmp_path, run_stage, monkeypatch):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(world / "sft")}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
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
    flags = [*flags_of("sft", world, "--epochs", 1), "--output", tmp_path / "out"]
    flags[flags.index("--model") + 1] = folder
    refused(run_stage(sft, *flags), "sft", "code of its own", "--trust-remote-code")
    assert not ran.exists()
    status, _, err = run_stage(sft, *flags, "--trust-remote-code")
    assert status == 0 and ran.exists(), err


def test_a_hub_id_that_cannot_be_reached_is_announced_and_the_hubs_words_are_kept(
    monkeypatch, capsys
):
    def refuse(path, **options):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access.")

    monkeypatch.setattr(common.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(common.UserError) as error:
        common.load_tokenizer("x/y")
    assert "x/y can't be loaded: You are trying to access a gated repo." in str(error.value)
    assert "x/y is no folder here: looking for it on the" in capsys.readouterr().out
