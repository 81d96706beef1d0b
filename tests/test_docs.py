"""The documentation against the code: paths, flags, functions, metrics, commands, equations."""

import calendar
import dataclasses
import posixpath
import re
import shlex
import shutil
import sys

import pytest
import torch
from conftest import ROOT
from test_cli import METRICS
from torch.distributed.run import get_args_parser
from transformers import AutoTokenizer, GraniteConfig

import common
import harness
import ppo
import reward_model
import rewards
import sft

sys.path.append(str(ROOT / "examples" / "beside_ppo"))
import best_of_n  # noqa: E402
import dpo  # noqa: E402

FILES = [ROOT / name for name in ("CONTRIBUTING.md", "AGENTS.md", "bench/README.md")]
FILES += [*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
README, FIRST = PAGES["README.md"], ("README.md", "docs/data.md", "docs/from_a_blog_post.md", "docs/running.md")
CHINESE = [page for page in PAGES if ".zh-CN" in page]
MORE_SOURCES = {  # English pages that a Chinese page draws on besides its own English edition
    "docs/from_a_blog_post.zh-CN.md": ("examples/beside_ppo/README.md", "examples/forks/README.md"),
}
FROM_PICTURES = {  # numbers that only a Chinese page reads off a picture
    "README.zh-CN.md": {"12"},  # the iteration at which hacking.png's orange true reward is highest
}
STAGES = {"sft.py": sft, "reward_model.py": reward_model, "ppo.py": ppo}
BESIDE = {"dpo.py": dpo, "best_of_n.py": best_of_n}
SCRIPTS = STAGES | {f"examples/beside_ppo/{name}": module for name, module in BESIDE.items()}
TEXTS = {page: PAGES[page] for page in FIRST} | {name: STAGES[name].__doc__ for name in STAGES}
OTHER_COMMANDS = (  # than those of SCRIPTS, whose flags are parsed
    "python3 -m venv", "pip install", "python -m pytest", "transformers serve", "transformers chat", "git apply",
    "--sampler-device", "torchrun", "bench/", "compare.py", "one_batch.py", "from datasets import", "import pipeline",
    "examples/instruct/", "head -n 192",
)
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def commands_of(page):
    """Returns the commands of a page's sh blocks, each one line, without comments and loops."""
    text = "\n".join(re.findall(r"```sh\n(.*?)```", PAGES[page], re.S)).replace("\\\n", " ")
    commands = []
    for line in text.splitlines():
        if not line.startswith(("for ", "done")):
            commands += re.split(r" && (?=python|git|pip|\.)", re.sub(r"\s+# .*", "", line))
    return [command.strip() for command in commands if command.strip()]


def blocks_of(page):
    """Returns the code blocks of a page without their comments, which are translated."""
    blocks = re.findall(r"^```(.*?)^```$", PAGES[page], re.M | re.S)
    return [re.sub(r"[ \t]*# .*", "", block) for block in blocks]


def links_of(page):
    """Returns the links of a page, those within the project as paths from its root, in English."""
    links = set(re.findall(r"\]\(([^)\s]+)\)", PAGES[page]))
    inside = {link for link in links if not link.startswith("https://")}
    paths = [posixpath.join(posixpath.dirname(page), link.replace(".zh-CN", "")) for link in inside]
    return links - inside | {posixpath.normpath(path) for path in paths}


def names_of(page):
    """Returns what stands in backticks on a page, outside of its code blocks."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)
    return {name.replace(".zh-CN", "") for name in re.findall(r"`([^`\n]+)`", text)}


def numbers_of(page):
    """Returns the numbers of a page without signs; months, and words up to twelve, count as numbers,
    and 26 万 is 0.26 (million), as the English pages have it.
    """
    text = re.sub(r"\]\([^)]*\)", "]", PAGES[page])
    for unit, millions in (("万", 0.01), ("亿", 100)):
        text = re.sub(rf"([\d.]+) {unit}", lambda found: f"{float(found[1]) * millions:g}", text)
    names = [(month, number) for number, month in enumerate(calendar.month_name[1:], 1)]
    for name, number in names + [(word, number) for number, word in enumerate(WORDS)]:
        text = re.sub(rf"\b{name}\b", str(number), text)
    return set(re.findall(r"\d+(?:[.,]\d+)*", text))


def flags_of(module):
    return {harness.flag_of(field.name) for field in dataclasses.fields(module.Config)}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file_and_every_command_fits_its_script(page):
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", PAGES[page]):
        assert link.startswith("https://") or ((ROOT / page).parent / link).exists(), link
    for link, anchor in re.findall(r"\]\((?!https:)([^)#\s]*)#([^)]*)\)", PAGES[page]):
        target = (ROOT / page).parent / link if link else ROOT / page
        headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M)
        assert anchor in {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings}, anchor
    for path in re.findall(r"`((?:docs|tests|examples|bench|data)/[\w./-]+\.\w+)`", PAGES[page]):
        assert (ROOT / path).exists(), path
    for command in commands_of(page):
        words = [word for word in shlex.split(command) if word != "..."]
        script = next((word for word in words if word in SCRIPTS), None)
        if script and "--sampler-device" not in command:
            cfg = harness.parse_args(SCRIPTS[script].Config, "", words[words.index(script) + 1 :])
            assert script != "ppo.py" or ppo.check_config(cfg)
        elif not script:
            assert command.startswith(". ") or any(x in command for x in OTHER_COMMANDS), command


@pytest.mark.parametrize("page", CHINESE)
def test_a_chinese_page_has_the_code_of_the_english_one_and_no_number_link_name_or_flag_of_its_own(page):
    """It is written in Chinese and may leave things out, but nothing in it may be out of date."""
    original = page.replace(".zh-CN", "")
    sources = (original, *MORE_SOURCES.get(page, ()))
    assert blocks_of(page) == blocks_of(original)
    assert links_of(page) <= {original}.union(*map(links_of, sources))  # to the other edition
    known = set().union(FROM_PICTURES.get(page, ()), *map(numbers_of, sources))
    assert numbers_of(page) - known == set()
    assert names_of(page) <= set().union(*map(names_of, sources))
    english = " ".join(" ".join(PAGES[source].split()) for source in sources)
    flag = r"(?<![\w-])--[a-z][a-z-]*"
    assert set(re.findall(flag, PAGES[page])) <= set(re.findall(flag, english))
    for sentence in re.findall(r"[A-Z][a-z]+(?: [a-z,']+)+[.!?]", PAGES[page]):
        assert sentence in english  # what a program prints stays English


@pytest.mark.parametrize("name", TEXTS)
def test_every_flag_in_the_text_exists_and_is_one_of_the_stage_it_is_given_to(name):
    known = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    known |= flags_of(sft) | flags_of(reward_model) | flags_of(ppo)
    known |= {"--help", "--table"}  # those of bench/fits.py
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", TEXTS[name])) <= known
    parts = r"python (sft|reward_model|ppo)\.py((?: +--[a-z-]+(?: +[^\s&|`-][^\s&|`]*)?)*)"
    for script, flags in re.findall(parts, TEXTS[name]):
        assert set(re.findall(r"--[a-z-]+", flags)) <= flags_of(STAGES[f"{script}.py"])


def mine(folder):
    """Writes the README's mine.py to a folder."""
    [code] = re.findall(r"```python\n(# mine.py\n.*?)```", README, re.S)
    (folder / "mine.py").write_text(code + "\n\ndef log(row):\n    print(row)\n")


def test_the_reward_function_of_the_readme_prefers_twenty_words(tmp_path):
    mine(tmp_path)
    scorer = rewards.FunctionScorer(f"{tmp_path / 'mine.py'}:brevity")
    scores = scorer(torch.zeros(1), None, [{"prompt": "A fox"}] * 3, ["word " * 20, "", "word " * 25])
    assert scores.tolist() == [0, -2, -0.5]


def test_the_line_that_samples_says_what_the_policy_says(world, tmp_path, monkeypatch, capsys):
    [command] = [command for command in commands_of("README.md") if "pipeline" in command]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "ppo").symlink_to(world / "sft")
    exec(shlex.split(command)[2], {})
    assert "Late at night, an owl meets a shy mouse on the windy hill." in capsys.readouterr().out


def test_the_lines_that_load_a_reward_model_elsewhere_give_its_score(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(world / "sft")
    config = GraniteConfig(  # a family without a classifier
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5
    )
    config.reward_mean, config.reward_std = 0.25, 2.0
    torch.manual_seed(0)
    common.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = common.load_scalar_model(str(tmp_path), tokenizer)
    for folder in (model, tokenizer):
        folder.save_pretrained(tmp_path / "ckpt" / "reward_model")
    [lines] = re.findall(r"```python\n(import torch\n.*?)```", PAGES["docs/running.md"], re.S)
    names = {"__name__": "elsewhere"}
    exec(lines, names)
    score = common.text_scores(model, names["ids"], torch.ones_like(names["ids"]).bool()).item()
    assert names["score"].item() == pytest.approx(score, abs=1e-5) and abs(score + 0.125) > 0.01


def test_the_readme_is_short_and_names_files_sizes_functions_and_metrics_that_are_so():
    assert len(README.splitlines()) <= 160
    table = README.partition("## The files")[2].partition("## Your own model")[0]
    sizes = re.findall(r"^\| `([^`]+)` \| (\d*) \|", table, re.M)
    sizes += re.findall(r"`(\w+\.py)` \((\d+)(?: lines)?\)", table)
    assert {"ppo.py", "rewards.py", "common.py", "harness.py"} <= {path for path, _ in sizes[-4:]}
    for path, size in sizes:
        assert (ROOT / path).exists(), path
        if size:
            actual = len((ROOT / path).read_text(encoding="utf-8").splitlines())
            assert abs(int(size) - actual) <= 0.05 * actual, (path, actual)
    formulas = README.partition("## From formula")[2].partition("\n## ")[0]
    pairs = re.findall(r"`(\w+)` in `(\w+\.py)`", formulas)
    assert len(pairs) >= 11 and all(callable(getattr(STAGES[file], name)) for name, file in pairs)
    inspected = README.partition("## What to inspect")[2].partition("## Afterwards")[0]
    named = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+|kl|score)`", inspected))
    assert named and named <= METRICS | {"reward_model"}
    command = "python -m pytest -q tests"
    assert f"`{command}`" in README and f"{command}\n" in (ROOT / ".ci" / "run").read_text()


def test_the_page_for_readers_of_blog_posts_names_functions_flags_and_equations_that_exist():
    table = PAGES["docs/from_a_blog_post.md"].partition("## From the post")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    elsewhere = re.findall(r"`(\w+)` in `(\w+)\.py`", table)
    assert {file for _, file in elsewhere} == {"common", "harness"}
    assert all(callable(getattr({"common": common, "harness": harness}[file], name)) for name, file in elsewhere)
    own = {name for row in rows for name in re.findall(r"`([a-zA-Z_]\w+)`", row[-1])}
    own -= {name for name, _ in elsewhere} | {"loss"}  # a variable
    assert len(own) >= 10 and all(callable(getattr(ppo, name)) for name in own), own
    named = {number for row in rows for number in re.findall(r"\((\d\w?)\)", row[1])}
    assert named == set(re.findall(r"^\((\d\w?)\) ", ppo.__doc__, re.M))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_numbered_equation_of_a_docstring_is_marked_where_it_is_computed(name):
    source = (ROOT / name).read_text(encoding="utf-8")
    numbers = set(re.findall(r"^\((\d\w?)\) ", SCRIPTS[name].__doc__, re.M))
    marked = set()
    for numbered in re.findall(r"[Ee]qs?\. ([\dab ,and-]+)", source[source.index("\n\n# ===") :]):
        for first, last in re.findall(r"(\d\w?)(?:-(\d))?", numbered):
            marked |= {str(n) for n in range(int(first[0]), int(last or first[0]) + 1)} | {first}
    assert numbers and numbers <= marked, numbers - marked


STARTS = tuple(f"python {name}" for name in STAGES)
RUN = dict.fromkeys(command for page in FIRST for command in commands_of(page) if command.startswith(STARTS))


@pytest.mark.parametrize("command", RUN)
def test_every_stage_command_of_the_first_pages_runs_at_reduced_size(
    command, world, tmp_path, run_stage, monkeypatch
):
    if "--lora-rank" in command:
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt").mkdir()
    for name in ("sft", "reward_model"):
        (tmp_path / "ckpt" / name).symlink_to(world / name)
    stage = shlex.split(command)[1].removesuffix(".py")
    rows = world / {"sft": "sft.jsonl", "reward_model": "pairs.jsonl", "ppo": "prompts.jsonl"}[stage]
    for name in ("demonstrations", "mine", "preferences", "prompts"):
        (tmp_path / f"{name}.jsonl").symlink_to(rows)
    mine(tmp_path)
    command = command.replace("examples/loggers.py:tensorboard", "mine.py:log")  # an own package
    words = [str(world / "sft") if "Qwen" in word else word for word in shlex.split(command)[2:]]
    if "--chat-template-kwargs" in words:
        shutil.copytree(world / "sft", tmp_path / "thinks")
        (tmp_path / "thinks" / "chat_template.jinja").write_text("{{ enable_thinking }}")
        words[words.index("--model") + 1] = "thinks"
    if stage == "ppo":
        data, held_out, more = "--prompts", "--eval-prompts", ["--iterations", 1, "--minibatch-size", 8]
    else:
        data, held_out, more = "--data", "--eval-data", ["--epochs", 1]
        more += [] if "--model" in words else ["--model", world / "sft"]
    more += [] if data in words else [data, rows]  # the tests' rows in place of the embedded ones
    words += ["--batch-size", 8, "--device", "cpu", "--output", "ckpt/out", "--response-length", 24]
    words += [held_out, rows, *more]
    status, _, err = run_stage(STAGES[f"{stage}.py"], *words)
    assert status == 0 and (tmp_path / "ckpt" / "out" / "model.safetensors").exists(), err
