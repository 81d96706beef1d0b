"""The documentation against the code: paths, flags, functions, metrics, commands, equations."""

import calendar
import dataclasses
import re
import shlex
import shutil
import sys

import pytest
from conftest import ROOT
from torch.distributed.run import get_args_parser
from test_cli import METRICS
from transformers import AutoTokenizer

import ppo
import reward_model
import sft
from plumbing import cli

sys.path.append(str(ROOT / "examples" / "beside_ppo"))
import best_of_n  # noqa: E402
import dpo  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
STAGES = {"sft": sft, "reward_model": reward_model, "ppo": ppo}
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("README*.md"), ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md"), ROOT / "bench" / "README.md")
}
DOCS = {name: PAGES[name] for name in ("README.md", "docs/data.md", "docs/running.md")}
DOCS |= {f"{name}.py": module.__doc__ for name, module in STAGES.items()}
SCRIPTS = {f"{name}.py": module for name, module in STAGES.items()} | {
    "examples/beside_ppo/dpo.py": dpo, "examples/beside_ppo/best_of_n.py": best_of_n
}
NOT_RUN = {  # command: why it is not run here; of the scripts' own commands, the flags are parsed all the same
    "python3 -m venv": "installs from the network", "pip install": "installs from the network", "python -m pytest": "is this",
    "from datasets import": "needs the network", "transformers serve": "a server", "transformers chat": "a server",
    "bench/": "takes minutes, see test_bench.py", "git apply": "see test_forks.py and test_sampling_ahead.py",
    "--sampler-device": "of a patch, see test_sampling_ahead.py", "torchrun": "see test_processes.py", "compare.py": "takes hours, see test_beside_ppo.py",
    "docs/one_batch.py": "takes half a minute, see test_one_batch.py",
    "from transformers import pipeline": "see test_the_line_that_samples_says_what_the_policy_says",
}


def commands_of(page):
    """The commands of a page's sh blocks, each one line; comments, `cd` and loops are left out."""
    text = "\n".join(re.findall(r"```sh\n(.*?)```", PAGES[page], re.S)).replace("\\\n", " ")
    lines = [re.sub(r"\s+# .*", "", line).strip() for line in text.splitlines()]
    return [part.strip() for line in lines if not line.startswith(("for ", "done")) for part in re.split(r" && (?=python|git|pip|\.)", line) if part.strip()]


KEPT = (  # numbers with their sign and %; s_chosen, V_{t+1}; Greek letters; operators
    r"(?:(?<![\w)])[-−])?\d+(?:[.,]\d+)*(?:e-?\d+)?%?|[A-Za-zΑ-ω]_[a-z0-9{+}]+|[Α-ω][₀-₉]?|[=±−+‖½²]"
)
MONTH = "|".join(calendar.month_name[1:])


def kept(text):
    """What a translation keeps of some prose: its links, code spans, numbers and symbols. Words may change their order."""
    text = text.replace(".zh-CN", "")
    links = sorted(re.findall(r"\]\(([^)#\s]*)", text))
    text = re.sub(r"(?<=\])\([^)]*\)", "", text)
    spans = {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)}
    text = re.sub(r"`[^`]+`", "", text)
    text = re.sub(rf"({MONTH}) (?=\d{{4}})", lambda match: f"{list(calendar.month_name).index(match[1])} ", text)
    return links, spans, sorted(re.findall(KEPT, text))


def pieces_of(page):
    """Each heading, table row, quote and code block, and the prose between: (its kind, what a translation keeps of it)."""
    pieces = []
    for text in re.split(r"(^```.*?^```$|^#+ [^\n]*|^\|[^\n]*|(?:^> [^\n]*\n)+)", PAGES[page], flags=re.M | re.S):
        kind = re.match(r"```|#+ |\||> |", text)[0]
        code = re.sub(r"(^|[ \t]+)# .*", "", text, flags=re.M) if kind == "```" else text.count("|")
        prose = "\n".join(re.findall(r"(?:^|\s)# (.*)", text)) if kind == "```" else text
        pieces.append((kind, code, *kept(prose)))
    return pieces


def english_of(page):
    """The English sentences of a page; of a Chinese page, what was left as some program printed it."""
    return set(re.findall(r"[A-Z][a-z]+(?: [a-z,']+)+[.!?]", " ".join(PAGES[page].split())))


def flags_of(module):
    return {"--" + field.name.replace("_", "-") for field in dataclasses.fields(module.Config)}


@pytest.mark.parametrize("name", DOCS)
def test_every_flag_in_the_text_exists(name):
    torchrun = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    known = {"--help", "--pretrain", "--table", "--check"}.union(  # OpenRLHF's, those of bench/fits.py
        torchrun, *map(flags_of, STAGES.values())
    )
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", DOCS[name].replace("--reward_pretrain", ""))) <= known


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", PAGES[page])
    for link in links:
        assert link.startswith("https://") or ((ROOT / page).parent / link).exists(), link
    assert page != "README.md" or len(links) > 8


@pytest.mark.parametrize("page", [page for page in PAGES if ".zh-CN" in page])
def test_a_chinese_page_has_the_code_numbers_symbols_and_links_of_the_english_one(page):
    original = page.replace(".zh-CN", "")
    ours, theirs = pieces_of(page), pieces_of(original)
    assert [piece[0] for piece in ours] == [piece[0] for piece in theirs]
    for piece, other in zip(ours, theirs):
        assert piece == other
    assert english_of(page) <= english_of(original)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_one_that_its_script_takes(page):
    for command in commands_of(page):
        assert command.split()[0] in ("python", "python3", ".", "pip", "git", "torchrun", "transformers"), command
        words = [word for word in shlex.split(command) if word != "..."]
        script = next((word for word in words if word in SCRIPTS), None)
        if script and "--sampler-device" not in command:
            module = SCRIPTS[script]
            cfg = cli.parse_args(module.Config, "", words[words.index(script) + 1 :])
            ppo.check_config(cfg) if module is ppo else cli.check_ranges(cfg)
        elif not script:
            assert command.startswith(". ") or any(word in command for word in NOT_RUN), command


RUN = [(page, command) for page in ("README.md", "docs/data.md", "docs/running.md") for command in commands_of(page)
       if shlex.split(command)[1] in STAGES or shlex.split(command)[1].removesuffix(".py") in STAGES]


@pytest.mark.parametrize("page, command", [(page, command) for page, command in RUN if not any(word in command for word in NOT_RUN)])
def test_every_command_of_the_first_pages_runs_at_reduced_size(page, command, world, tmp_path, run_stage, monkeypatch):
    """On the tests' files under the names of the page; models of the hub are the tests' policy."""
    if "--lora-rank" in command:
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt").mkdir()
    stage = shlex.split(command)[1].removesuffix(".py")
    rows = {"sft": "sft", "reward_model": "pairs", "ppo": "prompts"}[stage]
    for name in ("demonstrations", "mine", "preferences", "prompts"):
        (tmp_path / f"{name}.jsonl").symlink_to(world / f"{rows}.jsonl")
    for name in ("sft", "reward_model"):
        (tmp_path / "ckpt" / name).symlink_to(world / name)
    [function] = re.findall(r"```python\n(# mine.py\n.*?)```", README, re.S)
    (tmp_path / "mine.py").write_text(function)
    words = [str(world / "sft") if word.startswith("Qwen/") else word for word in shlex.split(command)[2:]]
    if "--chat-template-kwargs" in words:
        shutil.copytree(world / "sft", tmp_path / "thinks")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "thinks")
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}{% if enable_thinking %}<think>{% endif %}"
        tokenizer.save_pretrained(tmp_path / "thinks")
        words[words.index("--model") + 1] = str(tmp_path / "thinks")
    small = ["--batch-size", 8, "--device", "cpu", "--output", "ckpt/out", "--response-length", 24]
    small += {"ppo": ["--iterations", 1, "--minibatch-size", 8, "--eval-prompts", world / "prompts.jsonl"]}.get(stage, ["--epochs", 1, "--eval-data", world / f"{rows}.jsonl"])
    if len(words) < 3 and "--resume" not in words:  # on the embedded data: with the tests' files in place of them
        words += ["--prompts", "prompts.jsonl"] if stage == "ppo" else ["--data", "mine.jsonl"] + ["--model", str(world / "sft")] * (stage == "sft")
    if "--lora-rank" in words and stage == "reward_model":
        words += ["--model", str(world / "sft")]
    status, out, err = run_stage(STAGES[stage], *words, *small)
    assert status == 0 and (tmp_path / "ckpt" / "out" / "args.json").exists(), err


def test_the_line_that_samples_says_what_the_policy_says(world, tmp_path, monkeypatch, capsys):
    [command] = [command for command in commands_of("README.md") if "pipeline" in command]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "ppo").symlink_to(world / "sft")
    exec(shlex.split(command)[2], {})
    assert "Late at night, an owl meets a shy mouse on the windy hill." in capsys.readouterr().out


@pytest.mark.parametrize("name", DOCS)
def test_every_example_command_gives_its_stage_flags_that_it_has(name):
    commands = re.findall(r"python (sft|reward_model|ppo)\.py((?: +--[a-z-]+(?: +[^\s&|`-][^\s&|`]*)?)*)", DOCS[name])
    assert commands
    for script, flags in commands:
        assert set(re.findall(r"--[a-z-]+", flags)) <= flags_of(STAGES[script])


def test_every_file_the_readme_names_exists_with_about_the_lines_it_says():
    table = README[README.index("## The files") : README.index("Start with the main loop")]
    rows = re.findall(r"^\| `([^`]+)` \| (\d*) \|", table, re.M)
    assert len(rows) >= 6
    for path, lines in rows:
        assert (ROOT / path).exists(), path
        if lines:
            actual = len((ROOT / path).read_text(encoding="utf-8").splitlines())
            assert abs(int(lines) - actual) <= 0.05 * actual, (path, actual)


def test_every_function_of_the_formula_table_is_in_the_file_it_names():
    table = README[README.index("## From formula") : README.index("## The files")]
    pairs = re.findall(r"`(\w+)` in `(\w+)\.py`", table)
    assert len(pairs) >= 12
    for function, module in pairs:
        assert callable(getattr(STAGES[module], function)), function


def test_every_metric_the_readme_names_is_written():
    table = README[README.index("## What to inspect") : README.index("## Afterwards")]
    named = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+|kl|score)`", table))
    assert named and named <= METRICS | {"reward_model"}


def test_the_readmes_test_command_is_the_one_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "python -m pytest -q tests\n" in ci and "&& python -m pytest -q tests\n" in README


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_numbered_equation_of_a_docstring_is_marked_where_it_is_computed(name):
    source = (ROOT / name).read_text(encoding="utf-8")
    numbers = set(re.findall(r"^\((\d\w?)\) ", SCRIPTS[name].__doc__, re.M))
    code = source[source.index("\n\n# ===") :]
    marked = set()
    for numbered in re.findall(r"[Ee]qs?\. ([\dab ,and-]+)", code):
        for first, last in re.findall(r"(\d\w?)(?:-(\d))?", numbered):
            marked |= {str(n) for n in range(int(first[0]), int(last or first[0]) + 1)} | {first}
    assert numbers and numbers <= marked, numbers - marked


def test_no_source_line_is_longer_than_100_columns():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]:
        long = [i for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 100]
        assert not long, (path.name, long)


def test_stages_import_common_and_never_each_other():
    for name in STAGES:
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        imported = set(re.findall(r"^(?:import|from) (\w+)", source, re.M))
        assert "common" in imported and not imported & set(STAGES)
    assert not set(re.findall(r"^(?:import|from) (\w+)", (ROOT / "common.py").read_text(), re.M)) & set(STAGES)
