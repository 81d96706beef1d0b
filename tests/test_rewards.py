"""Reward models from elsewhere, sums of rewards, the hub, code that comes with a model, TensorBoard."""

import json
import shutil
import sys
import types

import pytest
import torch
import transformers
from conftest import DEMONSTRATIONS, read_rows, tiny_lm, tiny_scalar
from test_chat_and_formats import CHATML, a_tokenizer
from test_cli import command, ppo_flags, refused
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

import common
import ppo
import sft
from plumbing import scorers

CPU = torch.device("cpu")
TEXTS = [("A fox meets a cub.", " The fox helps the cub."), ("An owl.", " It sings and sings and sings."), ("A bear?", "")]


def save_decoder(path, template=None, pad="<|pad|>", seed=5):
    """A one-label Llama with a tokenizer of its own, as found on the hub: no scale in its config."""
    tokenizer = a_tokenizer(template, "<|end|>")
    tokenizer.pad_token = pad
    model = tiny_scalar(seed, vocab_size=len(tokenizer), max_position_embeddings=128)
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    del model.config.reward_mean, model.config.reward_std
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model, tokenizer


def save_encoder(path, kind="bert"):
    """A one-label BERT or RoBERTa of random weights with a word-level tokenizer that joins pairs."""
    words = sorted({word for text in TEXTS + [tuple(row.values()) for row in DEMONSTRATIONS] for word in " ".join(text).lower().replace(".", " .").replace("?", " ?").split()})
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", *(["token_type_ids"] if kind == "bert" else []), "attention_mask"]
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **special)
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=1, initializer_range=0.3, pad_token_id=0)
    config = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[kind](max_position_embeddings=64, **sizes)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model, tokenizer


def scorer(path, world, microbatch_size=32):
    policy_tokenizer = common.load_tokenizer(str(world / "sft"))
    policy = common.load_causal_lm(str(world / "sft"), policy_tokenizer)
    loaded = scorers.load_scorer(str(path), policy, policy_tokenizer, microbatch_size, trust_remote_code=False)
    common.place(loaded.model, CPU, "auto")
    return lambda prompts, responses: loaded(torch.zeros(1), None, [{"prompt": prompt} for prompt in prompts], responses)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_reads_prompt_and_response_as_a_pair_alone_and_in_a_batch(kind, world, tmp_path):
    model, tokenizer = save_encoder(tmp_path / "rm", kind)
    reward = scorer(tmp_path / "rm", world, microbatch_size=2)
    prompts, responses = zip(*TEXTS)
    scores = reward(prompts, responses).tolist()
    alone = [model(**tokenizer(p, r, return_tensors="pt")).logits.item() for p, r in TEXTS]  # as a model card says
    assert scores == pytest.approx(alone, abs=1e-5) and max(alone) - min(alone) > 1e-2
    assert reward([TEXTS[0][0]], [TEXTS[0][1]]).tolist() == pytest.approx(scores[:1], abs=1e-5)


@pytest.mark.parametrize("pad", ["<|pad|>", None, "<|end|>"])
def test_a_decoder_with_other_tokens_reads_what_its_own_forward_reads_whatever_its_pad(pad, world, tmp_path):
    """With pad = EOS, transformers' forward reads the token before EOS, and that head was trained there."""
    model, tokenizer = save_decoder(tmp_path / "rm", pad=pad)
    scores = scorer(tmp_path / "rm", world)(*zip(*TEXTS)).tolist()
    for (prompt, response), score in zip(TEXTS, scores):
        ids = tokenizer(prompt)["input_ids"] + tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
        read = -2 if pad == "<|end|>" else -1
        by_hand = model.score(model.model(torch.tensor([ids])).last_hidden_state[0, read]).item()
        assert score == pytest.approx(by_hand, abs=1e-5)


def test_a_decoder_with_a_template_reads_a_plain_prompt_as_the_users_message(world, tmp_path):
    template = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    model, tokenizer = save_decoder(tmp_path / "rm", template)
    reward = scorer(tmp_path / "rm", world)
    plain = reward(*zip(*TEXTS[:2])).tolist()
    chats = [[{"role": "user", "content": prompt}] for prompt, _ in TEXTS[:2]]
    assert reward(chats, [response for _, response in TEXTS[:2]]).tolist() == plain
    text = "<|start|><|im_start|>user A fox meets a cub.<|im_end|><|im_start|>assistant The fox helps the cub.<|im_end|>"  # as its card has it: no EOS is added
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    by_hand = model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()
    assert plain[0] == pytest.approx(by_hand, abs=1e-5)


def test_a_reward_model_from_elsewhere_gets_a_scale_and_the_critic_starts_from_the_policy(world, tmp_path, run_stage):
    model, tokenizer = save_encoder(tmp_path / "rm")
    status, out, err = run_stage(ppo, *ppo_flags(world, tmp_path / "out", "--reward", tmp_path / "rm", "--explain", "--response-length", 12))
    assert status == 0, err
    assert f"{tmp_path / 'rm'} reads texts: responses are decoded and encoded for it" in out
    assert "the critic starts from the policy, with a head of zeros" in out and "scores are taken by mean" in out
    mean, deviation = (float(word) for word in out[out.index("taken by mean") :].split()[3:7:3])
    for row in read_rows(tmp_path / "out" / "samples.jsonl"):
        raw = model(**tokenizer(row["prompt"], row["response"].strip(), return_tensors="pt")).logits.item()
        assert row["score"] == pytest.approx((raw - mean) / deviation, rel=0.02, abs=0.02)
    assert abs(read_rows(tmp_path / "out" / "metrics.jsonl")[0]["score"]) < 0.6  # 24 of the like of those measured
    critic, policy = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out" / "critic", world / "sft"))
    assert critic["vocab_size"] == policy["vocab_size"] != model.config.vocab_size


def test_a_reward_model_with_the_policys_tokens_from_elsewhere_is_read_by_its_own_forward(world, tmp_path, run_stage):
    model = AutoModelForSequenceClassification.from_pretrained(world / "reward_model")
    del model.config.reward_mean, model.config.reward_std
    model.save_pretrained(tmp_path / "rm")
    AutoTokenizer.from_pretrained(world / "reward_model").save_pretrained(tmp_path / "rm")
    status, out, _ = run_stage(ppo, *ppo_flags(world, tmp_path / "out", "--reward", tmp_path / "rm"))
    assert status == 0 and "scores are taken by mean" in out and "starts from the policy" in out and "of 48 responses" in out


@pytest.mark.parametrize("template", [None, "chatml"])
def test_a_reward_model_that_this_project_made_for_other_tokens_is_read_where_it_was_trained(template, world, tmp_path):
    """ChatML puts a line feed behind the EOS; a forward of the whole text would read that."""
    model, tokenizer = save_decoder(tmp_path / "rm", CHATML if template else None)
    tokenizer.eos_token = "<|im_end|>" if template else "<|end|>"
    tokenizer.save_pretrained(tmp_path / "rm")
    model.config.reward_mean, model.config.reward_std, model.config.eos_token_id = 0.25, 2.0, tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "rm")
    prompt, response = TEXTS[0]
    if template:
        prompt = [{"role": "user", "content": prompt}]
    ids = sum(common.encode(tokenizer, prompt, response.strip() if template else response), [])
    assert ids[-1] == tokenizer.eos_token_id
    by_hand = (model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item() - 0.25) / 2
    assert scorer(tmp_path / "rm", world)([prompt], [response]).item() == pytest.approx(by_hand, abs=1e-5)


def test_a_reward_function_cannot_change_what_the_run_sees(world, tmp_path, run_stage):
    (tmp_path / "greedy.py").write_text(
        "def greedy(prompts, responses, rows):\n    out = [float(len(r)) for r in responses]\n    responses.clear()\n    prompts.clear()\n"
        "    for row in rows:\n        row.clear()\n    rows.clear()\n    return out\nagain = greedy\n"
    )
    reward = f"{tmp_path / 'greedy.py'}:greedy"
    status, _, err = run_stage(ppo, *ppo_flags(world, tmp_path / "out", "--reward", reward, f"{tmp_path / 'greedy.py'}:again", "--iterations", 2))
    assert status == 0, err
    for row in read_rows(tmp_path / "out" / "samples.jsonl"):
        assert row["score"] == 2 * len(row["response"]) and row["prompt"]


def test_a_score_that_is_not_finite_is_refused(world, tmp_path, run_stage, monkeypatch):
    monkeypatch.setattr(common, "token_scores", lambda model, tokens, mask: torch.full(tokens.shape, float("nan")))
    refused(run_stage(ppo, *ppo_flags(world, tmp_path / "out")), "ppo", "a score is not finite")
    assert not (tmp_path / "out").exists()


def test_a_reward_model_with_fewer_positions_or_tokens_than_the_policy_is_no_traceback(world, tmp_path, run_stage):
    sizes = json.loads((world / "reward_model" / "config.json").read_text())
    for name, changes in (("short", {"max_position_embeddings": 8}), ("narrow", {"vocab_size": sizes["vocab_size"]})):
        tiny_scalar(**({"vocab_size": sizes["vocab_size"]} | changes)).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(world / "sft").save_pretrained(tmp_path / name)
    refused(run_stage(ppo, *ppo_flags(world, tmp_path / "out", "--reward", tmp_path / "short")), "ppo", "do not fit the model's 8 positions (LlamaForSequenceClassification)")
    tiny_lm(vocab_size=sizes["vocab_size"] + 64, max_position_embeddings=128).save_pretrained(tmp_path / "policy")
    AutoTokenizer.from_pretrained(world / "sft").save_pretrained(tmp_path / "policy")
    status, out, err = run_stage(ppo, *ppo_flags(world, tmp_path / "out", "--policy", tmp_path / "policy", "--reward", tmp_path / "narrow"))
    assert status == 0 and "narrow reads texts" in out, err  # the policy may sample ids that it does not embed


def test_several_rewards_are_summed_and_the_critic_starts_from_the_first_model(world, tmp_path, run_stage):
    (tmp_path / "rule.py").write_text("def short(prompts, responses, rows):\n    return [-len(r) / 100 for r in responses]\n")
    scores = []
    for i, reward in enumerate(([world / "reward_model"], [f"{tmp_path / 'rule.py'}:short"], [f"{tmp_path / 'rule.py'}:short", world / "reward_model"])):
        status, out, err = run_stage(ppo, *ppo_flags(world, tmp_path / f"out{i}", "--reward", *reward))
        assert status == 0 and ("starts from the policy" in out) == (i == 1), err  # only the rule has no model
        row = read_rows(tmp_path / f"out{i}" / "metrics.jsonl")[1]
        assert len(row["score_parts"]) == len(reward) and sum(row["score_parts"]) == pytest.approx(row["score"], abs=1e-5)
        scores.append([row["score"] for row in read_rows(tmp_path / f"out{i}" / "samples.jsonl") if row["iteration"] == 0])
    alone, rule, both = map(torch.tensor, scores)
    assert torch.allclose(alone + rule, both, atol=1e-5) and rule.abs().max() > 0.01


@pytest.mark.parametrize("change, fragments", [
    ({"num_labels": 2}, ["has 2 labels; a reward model has one"]), ({"cut": True}, ["is no trained reward model", "classifier"]),
])
def test_a_classifier_that_is_no_reward_model_is_refused(world, tmp_path, run_stage, change, fragments):
    model, tokenizer = save_encoder(tmp_path / "rm")
    if "num_labels" in change:
        AutoModelForSequenceClassification.from_config(transformers.BertConfig.from_pretrained(tmp_path / "rm", num_labels=2)).save_pretrained(tmp_path / "rm")
    else:
        model.bert.save_pretrained(tmp_path / "rm")
    refused(run_stage(ppo, *ppo_flags(world, tmp_path / "out", "--reward", tmp_path / "rm")), "ppo", *fragments)
    assert not (tmp_path / "out").exists()


def test_code_that_comes_with_a_model_is_run_only_if_asked(world, tmp_path, run_stage):
    folder, ran = tmp_path / "own", tmp_path / "ran"
    tiny_lm(vocab_size=320, max_position_embeddings=128).save_pretrained(folder)
    AutoTokenizer.from_pretrained(world / "sft").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_llama", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnLM"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    flags = ["--model", folder, "--data", world / "sft.jsonl", "--eval-data", world / "sft.jsonl", "--output", tmp_path / "out", "--epochs", 1, "--device", "cpu"]
    refused(run_stage(sft, *flags), "sft", "code of its own", "--trust-remote-code")
    assert not ran.exists()
    status, _, err = run_stage(sft, *flags, "--trust-remote-code")
    assert status == 0 and ran.exists(), err


def test_an_id_that_is_no_folder_and_cannot_be_reached_says_both(tmp_path):
    run = command("sft.py", "--model", "someone/some-model", "--data", str(tmp_path / "x.jsonl"), cwd=tmp_path)
    assert run.returncode == 2 and "can't read" in run.stderr  # the data is looked at before the hub
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' * 20)
    run = command("sft.py", "--model", "someone/some-model", "--data", "x.jsonl", cwd=tmp_path)
    assert run.returncode == 2 and len(run.stderr.strip().splitlines()) == 1
    assert "sft.py: error: someone/some-model is no folder and can't be fetched: " in run.stderr
    assert "someone/some-model is no folder here: looking for it on the Hugging Face hub" in run.stdout


@pytest.mark.parametrize("message", [
    "You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/x/y.\n403 Client Error.",
    "x/y is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'\nIf this is a private repository, log in.",
])
def test_a_gated_or_missing_model_says_so_in_the_hubs_words(message, monkeypatch):
    def refuse(path, **options):
        raise OSError(message)

    monkeypatch.setattr(common.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(common.UserError) as error:
        common.load_tokenizer("x/y")
    assert str(error.value) == "x/y is no folder and can't be fetched: " + " ".join(message.splitlines()[:2]).rstrip(".")


def test_tensorboard_gets_the_numbers_of_metrics_jsonl(world, tmp_path, run_stage, monkeypatch):
    seen = {}

    class Writer:
        def __init__(self, folder):
            self.folder = folder
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(folder / "events", "a")  # an open file, as the real writer has

        def add_scalar(self, tag, value, step):
            seen[tag, step] = value
            self.file.write(f"{tag} {step}\n")

        def flush(self):
            self.file.flush()

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    flags = ppo_flags(world, tmp_path / "out", "--tensorboard", "--iterations", 3, "--save-every", 1)
    assert run_stage(ppo, *flags)[0] == 0
    for row in read_rows(tmp_path / "out" / "metrics.jsonl"):
        for key, value in row.items():
            if key not in ("split", "iteration", "score_parts") and value is not None:
                assert seen.pop((f"{row.get('split', 'train')}/{key}", row["iteration"])) == value
    assert not seen
    lines = (tmp_path / "out" / "tensorboard" / "events").read_text().splitlines()
    assert {line.split()[1] for line in lines} == {"0", "1", "2", "3"}  # all of it, over three checkpoints


def test_tensorboard_that_is_not_installed_is_named(world, tmp_path, run_stage, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused(run_stage(ppo, *ppo_flags(world, tmp_path / "out", "--tensorboard")), "ppo", "--tensorboard needs the package tensorboard; pip install tensorboard")
    assert not (tmp_path / "out").exists()


def test_a_reward_model_that_is_not_finished_is_refused(world, tmp_path, run_stage):
    shutil.copytree(world / "reward_model", tmp_path / "rm")
    for begun in ("written", "not yet"):  # a checkpoint beside files that are written; and nothing but flags
        shutil.copytree(tmp_path / "rm", tmp_path / begun)
        (tmp_path / begun / "args.json").write_text(json.dumps({"written": ["model.safetensors"] if begun == "written" else []}))
        (tmp_path / begun / "checkpoint-5" / "trainer_state").mkdir(parents=True)
        flags = ppo_flags(world, tmp_path / "out", "--reward", tmp_path / begun)
        refused(run_stage(ppo, *flags), "ppo", f"is not finished; --resume --output {tmp_path / begun} goes on with it")
        assert not (tmp_path / "out").exists()
