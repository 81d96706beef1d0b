"""Nothing goes wrong in silence: what of a row is not used, what a run reads, and what a user's code does to it."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, read_rows, tiny_lm, write_rows
from transformers import AutoTokenizer

import common
import ppo
import reward_model
import sft
import zoo
from plumbing import metrics, rows as rows_, scorers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = "{% for t in tools or [] %}TOOL {{ t['name'] }}\n{% endfor %}" + CHATML
user = lambda text: {"role": "user", "content": text}
assistant = lambda text, **more: {"role": "assistant", "content": text, **more}


@pytest.fixture
def chat_model(world, tmp_path):
    """chat_model(template) -> a folder with the tiny policy, its tokenizer and that template."""

    def make(template):
        shutil.copytree(world / "sft", tmp_path / "chat", dirs_exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "chat")
        model = tiny_lm(vocab_size=len(tokenizer))
        common.set_generation_defaults(model, tokenizer)
        model.save_pretrained(tmp_path / "chat")
        return tmp_path / "chat"

    return make


@pytest.fixture
def sft_says(tmp_path, run_stage):
    """sft_says(model, rows) -> what sft.py prints of these rows, at a learning rate of 0; an error is one line."""

    def run(model, rows):
        data = write_rows(tmp_path / "rows.jsonl", rows)
        flags = ["--model", model, "--data", data, "--eval-data", data, "--epochs", 1, "--lr", 0, "--output", tmp_path / "out", "--device", "cpu"]
        status, out, err = run_stage(sft, *flags)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return out if status == 0 else err

    return run


# === Rows =========================================================================================
@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_turns_marked_as_context_are_not_learned(mark, chat_model, sft_says):
    chat = [user("a fox?"), assistant("an owl", **mark), user("a cub?"), assistant("a lamb")]
    out = sft_says(chat_model(CHATML), [{"messages": chat}] * 12)
    assert "12 rows read, 12 examples used" in out
    table = [user("a fox?"), assistant("an owl", weight=None, train=None)]  # exported tables hold null
    assert "12 examples used" in sft_says(chat_model(CHATML), [{"messages": table}] * 12)
    assert "marked not to be learned" in sft_says(chat_model(CHATML), [{"messages": chat[:2]}, {"messages": chat}] * 6)
    assert "rows.jsonl line 1 has a message with 0.5 under 'weight'" in sft_says(chat_model(CHATML), [{"messages": [user("a"), assistant("b", weight=0.5)]}] * 3)


def test_tools_reach_the_template_or_it_is_said(chat_model, sft_says):
    rows = [{"tools": [{"name": "get_price"}], "messages": [user("a fox?"), assistant("an owl")]}] * 12
    tokenizer = AutoTokenizer.from_pretrained(chat_model(TOOLS))
    prompt, _ = common.encode(tokenizer, rows[0]["messages"][:1], "an owl", tools=rows[0]["tools"])
    assert "TOOL get_price" in tokenizer.decode(prompt)
    assert "nothing renders" not in sft_says(chat_model(TOOLS), rows)
    assert "12 with tools that nothing renders" in sft_says(chat_model(CHATML), rows)


STRIP = CHATML.replace("m['content']", "m['content'].split('</think>')[-1].strip()")


@pytest.mark.parametrize("template, reply, is_lost", [
    (STRIP, assistant("<think>so it is</think>\nan owl"), True), (CHATML, assistant("an owl", reasoning_content="so it is"), True),
    (CHATML, assistant("<think>so it is</think>\nan owl"), False), (STRIP, assistant("an  owl\n sees"), False),
])
def test_a_row_with_words_that_the_template_drops_is_refused(template, reply, is_lost, chat_model, sft_says):
    out = sft_says(chat_model(template), [{"messages": [user("a fox?"), reply]}] * 12)
    lost = "has words of the assistant (or its reasoning_content) that the template drops, from 'so it is an' on; leave them out"
    assert f"rows.jsonl line 1 {lost}\n" in out if is_lost else "12 examples used" in out


def test_a_role_that_the_template_leaves_for_the_response_is_told(chat_model, sft_says):
    rows = [{"messages": [user("a fox?"), assistant("an owl")]}] * 12
    closed = CHATML[: CHATML.index("{% if add_generation")]  # ignores add_generation_prompt
    assert "12 whose response begins with words of the template" in sft_says(chat_model(closed), rows)
    assert "begins with words" not in sft_says(chat_model(CHATML), rows)


def test_every_key_that_is_not_read_is_named(world, sft_says):
    out = sft_says(world / "sft", [{"text": "a fox", "prompt": "a lamb", "id": i} for i in range(12)])
    assert "keys that are not read: 'prompt', 'id'" in out
    assert "not read" not in sft_says(world / "sft", [{"text": "a fox"}] * 12)


def test_empty_replies_and_replies_to_nobody_are_counted(chat_model, sft_says):
    out = sft_says(chat_model(CHATML), [{"prompt": "a fox", "completion": " "}, {"messages": [assistant("hello"), user("a"), assistant("b")]}] * 6)
    assert "6 with an empty response" in out and "6 with a message of the assistant that answers nothing" in out


def test_a_blank_end_of_a_file_is_no_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n  \n')
    assert len(rows_.read_rows([str(tmp_path / "a.jsonl")], [("text",)])) == 1


def hold_out(rows, number=None):
    rows = [rows_.Row(row) for row in rows]
    return rows_.hold_out(sft.Config(), rows, number or 512, "--eval-data")


def test_rows_of_one_prompt_are_never_in_both_parts(capsys):
    pairs = [{"prompt": f"p{i % 20}", "chosen": f"a{i}", "rejected": "b"} for i in range(60)]
    training, held_out = hold_out(pairs)
    assert len(training) + len(held_out) == 60 and len(held_out) == 6
    assert not {row["prompt"] for row in training} & {row["prompt"] for row in held_out}
    assert capsys.readouterr().out == ""
    once = [{"text": f"t{i}"} for i in range(60)]
    training, held_out = hold_out(once + once)
    assert not {row["text"] for row in training} & {row["text"] for row in held_out}
    assert "60 of 120 rows are duplicates" in capsys.readouterr().out
    whole = [{"chosen": f"\n\nHuman: q{i % 30}\n\nAssistant: a{i}", "rejected": f"\n\nHuman: q{i % 30}\n\nAssistant: b"} for i in range(90)]
    training, held_out = hold_out(whole)
    assert len(held_out) >= 9 and "trained on too" not in capsys.readouterr().out


def test_one_prompt_for_all_rows_is_still_split_and_said(capsys):
    training, held_out = hold_out([{"prompt": "same", "completion": f"c{i}"} for i in range(50)])
    assert len(held_out) == 5 and len(training) == 45
    assert "5 of 5 held-out rows have a prompt that is trained on too" in capsys.readouterr().out


def test_few_pairs_all_won_are_not_certain():
    share, two_sigma = reward_model.accuracy(torch.ones(6), torch.zeros(6))
    assert share == 1 and 0.2 < two_sigma < 0.5  # Agresti and Coull: 2 sqrt(0.8 * 0.2 / 10)
    assert two_sigma == pytest.approx(2 * (0.8 * 0.2 / 10) ** 0.5)


# === Runs =========================================================================================
@pytest.fixture
def ppo_run(world, tmp_path, run_stage):
    """ppo_run(*flags) -> (status, out, err) of a short run in a copy of the world; the reward is mine.py."""
    for name in ("sft", "reward_model"):
        shutil.copytree(world / name, tmp_path / name)
    shutil.copy(world / "prompts.jsonl", tmp_path / "prompts.jsonl")
    (tmp_path / "mine.py").write_text("def f(prompts, responses, rows):\n    return [float(len(r)) for r in responses]\n")
    prompts = tmp_path / "prompts.jsonl"

    def run(*flags):
        return run_stage(
            ppo, "--policy", tmp_path / "sft", "--reward", tmp_path / "reward_model", f"{tmp_path / 'mine.py'}:f", "--prompts", prompts, "--eval-prompts", prompts,
            "--iterations", 2, "--batch-size", 8, "--minibatch-size", 8, "--response-length", 8, "--output", tmp_path / "out", "--device", "cpu", *flags,
        )

    return run


def change_weights(path):
    tensors = common.safetensors.torch.load_file(path / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].flip(0).contiguous()
    common.safetensors.torch.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


CHANGES = {
    "--policy": lambda folder: change_weights(folder / "sft"), "--reward": lambda folder: change_weights(folder / "reward_model"),
    "--reward, a function": lambda folder: (folder / "mine.py").write_text("def f(prompts, responses, rows):\n    return [1.0] * len(responses)\n"),
    "--prompts": lambda folder: (folder / "prompts.jsonl").write_text((folder / "prompts.jsonl").read_text().replace("fox", "dog")),
    "--policy, its template": lambda folder: (folder / "sft" / "chat_template.jinja").write_text("{{ messages }}"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_resumed_run_notices_what_has_changed_under_its_name(what, ppo_run, tmp_path):
    assert ppo_run()[0] == 0
    for path in tmp_path.rglob("*"):
        os.utime(path)  # a time stamp is no content
    text = (tmp_path / "prompts.jsonl").read_text()
    (tmp_path / "prompts.jsonl").write_text("\ufeff" + text.replace("\n", "\r\n") + "\n", encoding="utf-8")  # nor is its dress
    status, _, err = ppo_run("--resume", "--iterations", 3)
    assert status == 0, err
    CHANGES[what](tmp_path)
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    status, _, err = ppo_run("--resume", "--iterations", 4)
    assert status == 2 and what.split(",")[0] in err and "has changed since the run began" in err
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before


def test_a_users_code_draws_and_seeds_random_numbers_of_its_own_and_imports_its_own_neighbours(tmp_path):
    (tmp_path / "common.py").write_text("NAME = 'theirs'\n")
    (tmp_path / "mine.py").write_text(
        "import random, torch, common\ntorch.manual_seed(7)\nassert common.NAME == 'theirs'\ndef f(prompts, responses, rows):\n"
        "    import common as again\n    random.seed(1); torch.rand(3)\n    return [float(len(again.NAME))] * len(responses)\n"
    )
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    score = scorers.FunctionScorer(f"{tmp_path / 'mine.py'}:f")
    assert score(torch.zeros(2, 1), None, [{"prompt": "a"}] * 2, ["b"] * 2).tolist() == [6, 6]
    assert torch.equal(torch.rand(2), expected) and sys.modules["common"] is common


def test_an_error_of_a_reward_in_a_late_iteration_loses_no_iteration(ppo_run, tmp_path, capsys):
    """And the run that goes on ends with the numbers of one that never failed."""
    rows = lambda: [{k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in read_rows(tmp_path / "out" / "metrics.jsonl")]
    code = (tmp_path / "mine.py").read_text()
    assert ppo_run("--iterations", 5)[0] == 0
    expected = rows()
    flag = tmp_path / "calls"
    flag.write_text("0")
    (tmp_path / "mine.py").write_text(code.replace("    return", f"    n = int(open({str(flag)!r}).read()) + 1\n    open({str(flag)!r}, 'w').write(str(n))\n    assert n != 7\n    return"))
    status, _, err = ppo_run("--iterations", 5, "--overwrite", "--save-every", 100)
    assert status == 2 and "f() failed" in err and "3 iterations are saved: python ppo.py --resume" in err and err.strip().count("error:") == 1
    assert (tmp_path / "out" / "checkpoint-3").is_dir()
    status, _, err = ppo_run("--iterations", 5, "--resume")
    assert status == 0, err
    assert rows() == expected


@pytest.mark.parametrize("script", ["sft.py", "ppo.py"])
def test_a_reader_that_goes_away_is_no_error(script, world, tmp_path):
    flags = {"sft.py": ["--model", world / "sft", "--data", world / "sft.jsonl", "--eval-data", world / "sft.jsonl", "--epochs", 1],
             "ppo.py": ["--policy", world / "sft", "--reward", world / "reward_model", "--prompts", world / "prompts.jsonl", "--eval-prompts", world / "prompts.jsonl",
                        "--iterations", 2, "--batch-size", 8, "--minibatch-size", 8, "--response-length", 8]}[script]
    argv = [sys.executable, str(ROOT / script), *map(str, flags), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 0 and "Traceback" not in err and "Broken" not in err, err
    assert (tmp_path / "out" / "model.safetensors").exists()


# === Families =====================================================================================
def save_family(name, world, folder, **settings):
    torch.manual_seed(0)
    config = zoo.FAMILIES[name][1](transformers)
    for key, value in settings.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(world / "sft").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name, settings", [
    ("mixtral", dict(router_jitter_noise=0.5)), ("opt", dict(layerdrop=0.5)), ("gpt2", dict(resid_pdrop=0.5)), ("mixtral", dict(output_router_logits=True)),
    ("llama_tied", dict(return_dict=False)), ("phimoe", {}),  # whose routers are jittered by default
])
def test_what_a_config_makes_random_or_returns_is_put_right(name, settings, world, tmp_path):
    path = save_family(name, world, tmp_path / "lm", **settings)
    model = common.load_causal_lm(path, common.load_tokenizer(path))
    common.place(model, torch.device("cpu"), "float32", gradient_checkpointing=True)
    tokens, mask = common.pad([[5, 6, 7], [8, 9]], 0, "left")
    first, second = (common.forward(model, tokens, mask).logits for _ in range(2))
    assert model.training and torch.allclose(first[mask], second[mask], atol=1e-5)
    common.generate_responses(model, tokens, mask, 3, 1.0)


def test_a_model_that_draws_random_numbers_is_refused_whatever_they_are_called():
    model = tiny_lm()

    def noise(module, inputs, output):
        output.logits = output.logits + 0.01 * torch.randn_like(output.logits)

    model.register_forward_hook(noise)
    with pytest.raises(common.UserError, match="draws random numbers in its forward pass"):
        common.place(model, torch.device("cpu"), "float32")


def test_a_sampler_that_draws_from_another_distribution_ends_the_run_before_anything_is_learned(ppo_run, tmp_path, monkeypatch):
    sample = common.sample_tokens
    monkeypatch.setattr(common, "sample_tokens", lambda logits, *rest: sample(logits.roll(1, -1), *rest))
    status, out, err = ppo_run()
    assert status == 2 and "the sampler's log-probabilities are off by" in err and "can't be sampled token by token here" in err
    assert not [row for row in read_rows(tmp_path / "out" / "metrics.jsonl") if "split" not in row]
    monkeypatch.setattr(common, "sample_tokens", sample)
    assert ppo_run("--overwrite")[0] == 0
    gaps = [row["sampler_gap"] for row in read_rows(tmp_path / "out" / "metrics.jsonl") if "split" not in row]
    assert len(gaps) == 2 and all(0 <= gap < metrics.SAMPLER_GAP[False] for gap in gaps)


def test_a_shared_head_on_hidden_states_of_another_shape_is_refused(world, tmp_path):
    path = save_family("gemma3n", world, tmp_path / "lm")
    model = common.load_causal_lm(path, common.load_tokenizer(path))
    with pytest.raises(common.UserError, match="take --critic separate"):
        common.check_hidden_states(model)
    common.check_hidden_states(tiny_lm())


def test_a_reward_model_of_a_family_without_a_classifier_is_read_token_by_token_and_as_text(world, tmp_path):
    path = save_family("mamba", world, tmp_path / "lm")
    tokenizer = common.load_tokenizer(path)
    model, is_new = common.load_scalar_model(path, tokenizer)
    assert is_new and common.is_trunk(model)
    model.config.reward_mean, model.config.reward_std = 0.5, 2.0
    common.save_model(model, tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    again, is_new = common.load_scalar_model(str(tmp_path / "rm"), tokenizer)
    tokens, mask = common.pad([[5, 6, 7], [8, 9]], 0, "right")
    assert not is_new and torch.equal(common.text_scores(model, tokens, mask), common.text_scores(again, tokens, mask))
    with pytest.raises(common.UserError, match="is no causal LM"):
        common.load_causal_lm(str(tmp_path / "rm"), tokenizer)
    policy = common.load_causal_lm(path, tokenizer)
    options = {"trust_remote_code": False}
    by_token = scorers.load_scorer(str(tmp_path / "rm"), policy, tokenizer, 2, **options)
    assert isinstance(by_token, scorers.TokenScorer)
    rows = [{"prompt": "A fox meets a cub."}, {"prompt": "An owl meets"}]
    responses = [" The fox helps.", " a lamb."]
    encoded = [sum(common.encode(tokenizer, row["prompt"], text), []) for row, text in zip(rows, responses)]
    tokens, mask = common.pad(encoded, 0, "right")
    by_text = scorers.TextScorer(by_token.spec, by_token.model, tokenizer, 2)
    assert torch.allclose(by_text(tokens, None, rows, responses), by_token(tokens, mask, rows, responses), atol=1e-5)


def test_a_text_beyond_a_foreign_reward_models_context_is_cut_on_the_left_and_counted(world, capsys):
    from plumbing import cli

    tokenizer = AutoTokenizer.from_pretrained(world / "sft")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(world / "reward_model")
    model.config.max_position_embeddings = 12
    scorer = scorers.TextScorer("theirs", model, tokenizer, 4)
    rows = [{"prompt": "A fox meets a cub. " * 9}, {"prompt": "A fox"}]
    scores = scorer(torch.zeros(1), None, rows, [" The fox helps.", " It rains."])
    ids = sum(common.encode(tokenizer, rows[0]["prompt"], " The fox helps."), [])
    cut, mask = common.pad([ids[:1] + ids[-11:]], 0, "right")
    assert torch.allclose(scores[0], common.text_scores(model, cut, mask)[0], atol=1e-5) and scorer.num_cut == 1
    cli.at_end.pop(0)()
    out = capsys.readouterr()
    assert "theirs reads 12 tokens" in out.out + out.err and "1 texts were cut to fit theirs" in out.out


# === Runs that ruin themselves ====================================================================
def test_an_update_that_goes_too_far_and_a_target_that_is_missed_are_told(tmp_path):
    healthy = dict.fromkeys(("approx_kl_first", "kl", "kl_k3"), 0.0) | dict(ratio_first=1.0, eos_rate=1.0, response_length=20.0, score_std=1.0, explained_variance=0.5, grad_norm=1.0, critic_grad_norm=1.0, approx_kl=0.06, kl_target=6.0)
    assert not metrics.health_warnings([healthy] * 12)
    assert "--lr too high" in metrics.health_warnings([healthy | {"approx_kl": 0.64}])["overshoot"]
    far = healthy | {"kl": 9.5}
    assert "--kl-target" in metrics.health_warnings([far] * 10)["target"]
    assert not metrics.health_warnings([far] * 9) and not metrics.health_warnings([far | {"kl_target": None}] * 12)


@pytest.mark.parametrize("size, rate", [(0.3e6, 3e-4), (1e6, 5e-5), (5e6, 5e-5), (5e8, 1e-5), (7e9, 3e-6)])
def test_the_learning_rate_falls_with_the_size_of_the_model(size, rate):
    assert next(lr for limit, lr in ppo.LR_BY_SIZE if size < limit) == rate


def test_bf16_on_a_cpu_without_its_instructions_is_told(world, tmp_path, run_stage, monkeypatch):
    flags = ["--model", world / "sft", "--data", world / "sft.jsonl", "--eval-data", world / "sft.jsonl", "--epochs", 1, "--device", "cpu", "--dtype", "bf16"]
    for has_it in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": has_it})
        status, out, err = run_stage(sft, *flags, "--output", tmp_path / str(has_it))
        assert status == 0 and ("no bf16 instructions" in out) != has_it, err


# === What people see ==============================================================================
def test_half_characters_are_shown_by_name_and_defaults_by_their_place_in_the_project(world, capsys):
    tokenizer = AutoTokenizer.from_pretrained(world / "sft")
    ids = tokenizer("文", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1 and "\ufffd" not in "".join(metrics.piece(tokenizer, id) for id in ids)
    assert metrics.piece(tokenizer, tokenizer(" fox", add_special_tokens=False)["input_ids"][0]).startswith(" ")
    help_text = subprocess.run([sys.executable, str(ROOT / "ppo.py"), "--help"], capture_output=True, text=True).stdout
    assert "data/prompts.jsonl" in help_text.replace(os.sep, "/") and str(ROOT) not in help_text


def test_an_error_names_the_remedy_for_what_was_handed_over(world, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    shutil.copytree(world / "sft", tmp_path / "pickled")
    os.rename(tmp_path / "pickled" / "model.safetensors", tmp_path / "pickled" / "pytorch_model.bin")
    tokenizer = common.load_tokenizer(str(world / "sft"))
    for name, words in (("adapter", "names no base model"), ("pickled", "never read: save them as safetensors")):
        with pytest.raises(common.UserError, match=words):
            common.load_causal_lm(str(tmp_path / name), tokenizer)


# === What a first day's user did =================================================================
def empty(path):
    path.write_bytes(b"")


BROKEN = {
    "metrics.jsonl": (os.remove, "metrics.jsonl is gone or shorter"), "./metrics.jsonl": (empty, "metrics.jsonl is gone or shorter"),
    "checkpoint-2/trainer_state": (shutil.rmtree, "has lost its trainer_state"), "checkpoint-2/critic": (shutil.rmtree, "is damaged"),
    "checkpoint-2/model.safetensors": (lambda path: path.write_bytes(path.read_bytes()[:1000]), "is damaged"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_was_damaged_is_refused_and_left_as_it_is(name, ppo_run, tmp_path, monkeypatch):
    save = ppo.Run.save_if_due
    monkeypatch.setattr(ppo.Run, "save_if_due", lambda run, **kept: (setattr(run, "signal", 15 if run.step == 2 else None), save(run, **kept)))
    assert ppo_run("--iterations", 4)[0] == 128 + 15
    monkeypatch.setattr(ppo.Run, "save_if_due", save)
    break_it, words = BROKEN[name]
    break_it(tmp_path / "out" / name)
    before = {path: path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file()}
    status, _, err = ppo_run("--iterations", 4, "--resume")
    assert status == 2 and words in err and err.strip().count("\n") == 0, err
    assert before == {path: path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_another_stages_folder_is_called_that(ppo_run, tmp_path, run_stage):
    assert ppo_run()[0] == 0
    status, _, err = run_stage(sft, "--resume", "--output", tmp_path / "out")
    assert status == 2 and "flags of another stage or version" in err


def test_a_rewards_workers_end_with_their_pool_and_stop_no_run(world, tmp_path):
    (tmp_path / "pool.py").write_text(
        "import multiprocessing\ndef f(prompts, responses, rows):\n    with multiprocessing.get_context('fork').Pool(4) as pool:\n        return pool.map(len, responses)\n"
    )
    flags = ["--policy", world / "sft", "--reward", f"{tmp_path / 'pool.py'}:f", "--prompts", world / "prompts.jsonl", "--eval-prompts", world / "prompts.jsonl",
             "--iterations", 2, "--batch-size", 8, "--minibatch-size", 8, "--response-length", 8, "--output", tmp_path / "out", "--device", "cpu"]
    run = subprocess.run([sys.executable, str(ROOT / "ppo.py"), *map(str, flags)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "stopping after" not in run.stderr and "Traceback" not in run.stderr, run.stderr


def test_a_reward_that_closes_the_output_is_no_error(world, tmp_path):
    (tmp_path / "shut.py").write_text("import sys\ndef f(prompts, responses, rows):\n    sys.stdout.close()\n    return [1.0 * len(r) for r in responses]\n")
    flags = ["--policy", world / "sft", "--reward", f"{tmp_path / 'shut.py'}:f", "--prompts", world / "prompts.jsonl", "--eval-prompts", world / "prompts.jsonl",
             "--iterations", 1, "--batch-size", 8, "--minibatch-size", 8, "--response-length", 8, "--output", tmp_path / "out", "--device", "cpu"]
    run = subprocess.run([sys.executable, str(ROOT / "ppo.py"), *map(str, flags)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "Traceback" not in run.stderr and (tmp_path / "out" / "model.safetensors").exists(), run.stderr


def test_a_rewards_modes_of_torch_stay_its_own_and_a_generator_runs_among_them(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef f(prompts, responses, rows):\n    torch.set_grad_enabled(False)\n    torch.set_default_dtype(torch.float64)\n"
        "    for response in responses:\n        torch.manual_seed(1)\n        yield 1.0\ndef one(prompts, responses, rows):\n    return 1.0\n"
    )
    torch.manual_seed(3)
    state = torch.get_rng_state()
    ask = lambda name: scorers.FunctionScorer(f"{tmp_path / 'mine.py'}:{name}")(torch.zeros(2, 1), None, [{"prompt": "a"}] * 2, ["b"] * 2)
    assert ask("f").tolist() == [1, 1] and ask("f").dtype == torch.float32
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32 and torch.equal(torch.get_rng_state(), state)
    with pytest.raises(common.UserError, match=r"one\(\) returned a float, not a list of numbers"):
        ask("one")
    with pytest.raises(common.UserError, match="names no function in it; give file.py:function"):
        scorers.FunctionScorer(str(tmp_path / "mine.py"))


@pytest.mark.parametrize("flags, words", [
    (["--reward", "a.py:f", "a.py:f"], "--reward names one twice"), (["--kl-horizon", 300], "--kl-horizon is of eq. 8, which needs a --kl-target"),
])
def test_a_flag_that_would_count_twice_or_not_at_all_is_refused(flags, words, ppo_run):
    status, _, err = ppo_run(*flags)
    assert status == 2 and words in err


def test_a_mark_is_refused_under_its_own_name_and_alone_may_be_null():
    assert sft.is_learned(assistant("a", weight=None)) and sft.is_learned(assistant("a", train=True)) and not sft.is_learned(assistant("a", weight=1, train=False))
    with pytest.raises(ValueError, match="'false' under 'train'"):
        sft.is_learned(assistant("a", train="false"))


def test_layers_that_the_config_drops_and_an_eos_beyond_the_vocabulary_are_said(world, tmp_path, capsys):
    shutil.copytree(world / "sft", tmp_path / "lm")
    tokenizer = common.load_tokenizer(str(tmp_path / "lm"))
    common.load_causal_lm(str(tmp_path / "lm"), tokenizer)
    assert "no place for" not in capsys.readouterr().out
    config = transformers.AutoConfig.from_pretrained(tmp_path / "lm")
    config.num_hidden_layers -= 1
    config.save_pretrained(tmp_path / "lm")
    model = common.load_causal_lm(str(tmp_path / "lm"), tokenizer)
    assert "has weights that its config has no place for" in capsys.readouterr().out
    model.generation_config.eos_token_id = 99_999
    with pytest.raises(common.UserError, match="eos_token_id is .99999."):
        common.eos_token_ids(tokenizer, model)


def test_what_a_run_prints_fits_100_columns(world, tmp_path, run_stage):
    """But for paths, which are as long as they are, and warnings, which are one line each so that they can be searched for."""
    (tmp_path / "mine.py").write_text("def one(prompts, responses, rows):\n    return [1.0] * len(rows)\n")
    flags = ["--policy", world / "sft", "--reward", world / "reward_model", f"{tmp_path / 'mine.py'}:one", "--prompts", world / "prompts.jsonl", "--eval-prompts", world / "prompts.jsonl",
             "--judge", f"{tmp_path / 'mine.py'}:one", "--iterations", 1, "--batch-size", 8, "--minibatch-size", 4, "--response-length", 60, "--device", "cpu", "--output", tmp_path / "out"]
    status, out, err = run_stage(ppo, *flags)
    assert status == 0, err
    long = [line for line in out.splitlines() if len(line) > 100 and not line.startswith("warning") and str(tmp_path) not in line and str(world) not in line]
    assert not long and "python plot.py" in out, long
