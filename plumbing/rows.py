"""JSON Lines files to checked rows, and rows to the token ids that each stage learns from.

A row is a dialogue in one of the accepted formats; a value is a string or a chat, which is a list
of messages {"role": ..., "content": ...}. What is dropped is counted and told, never cut.
"""

import collections
import contextlib
import gzip
import json
import os
import random
import zlib

import common
from common import UserError


# === Files to rows ================================================================================
class Row(dict):
    """A data row; `path` and `line` say where it stands, `unread` names keys that nothing reads."""

    unread = ()


def read_rows(paths, formats):
    """The rows of some JSON Lines files, .jsonl or .jsonl.gz, each a `Row`.

    Each row has all keys of one of the formats; its other keys are kept as they are.

    Raises:
        UserError: no such file, no rows, or a row that does not fit, by file and line.
    """
    chat = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]
    form = lambda keys: json.dumps({key: chat if key == "messages" else "..." for key in keys})
    example = " or ".join(map(form, formats))
    rows = []
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path} is given twice")
        number_before, blank = len(rows), None
        try:
            with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        blank = blank or number  # at the end of a file it is none
                        continue
                    row, problem = _parse_row(line, formats)
                    if problem or blank:
                        where = f"{path} line {blank or number} {'is empty' if blank else problem}"
                        raise UserError(f"{where}; write lines like {example}")
                    rows.append(row)
                    row.path, row.line = path, number
        except (OSError, EOFError, ValueError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"can't read {path}: {reason}") from None
        if len(rows) == number_before:
            raise UserError(f"{path} has no rows; a line is like {example}")
    return rows


def _parse_row(line, formats):
    """(the row, None), or (None, what is wrong with it)."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 at byte {error.start}"
    except (ValueError, RecursionError) as error:
        return None, f"is not JSON ({error})"
    if not isinstance(row, dict):
        return None, f"is a JSON {type(row).__name__}, not an object"
    fits = lambda keys: all(row.get(key) is not None for key in keys)
    keys = next(filter(fits, formats), None)
    if keys is None:
        named = [f"{key!r}" + (" (null)" if row[key] is None else "") for key in row]
        return None, f"has the keys {', '.join(named) or '(none)'}"
    # exported tables hold null under the keys of other formats
    empty = [key for key in set().union(*formats) if row.get(key, 0) is None]
    problems = filter(None, (_value_problem(key, row[key]) for key in keys))
    if "tools" in row and not isinstance(row["tools"] or [], list):
        return None, f"has a {type(row['tools']).__name__} under 'tools', not a list"
    row = Row({key: value for key, value in row.items() if key not in empty})
    row.unread = [key for key in row if key not in (*keys, "tools")]
    return row, next(problems, None)


def _value_problem(key, value):
    wanted = {"text": "a string", "messages": "a list of messages"}
    if isinstance(value, str) and key != "messages":
        texts = [value]
    elif isinstance(value, list) and value and key != "text":
        parts = ("role", "content")
        texts = [m.get(part) if isinstance(m, dict) else None for m in value for part in parts]
    else:
        kind = "an empty list" if value == [] else f"a {type(value).__name__}"
        return f"has {kind} under {key!r}, not {wanted.get(key, 'a string or a list of messages')}"
    if not all(isinstance(text, str) for text in texts):
        return f"has a list under {key!r} whose items are not all " + json.dumps(
            {"role": "...", "content": "..."}
        )
    if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
        return f"has half of a surrogate pair under {key!r}, which is not text"
    return None


def read_and_hold_out(cfg, formats, most):
    """(training rows, held-out rows) of --data: those of --eval-data, or some of the others."""
    rows = read_rows(cfg.data, formats)
    if cfg.eval_data is None:
        return hold_out(cfg, rows, most, "--eval-data")
    return rows, _say_shared(rows, read_rows(cfg.eval_data, formats))


def hold_out(cfg, rows, most, flag):
    """(training rows, held-out rows): a tenth, at most `most`; `flag` is another way to them.

    Rows of one prompt stay together: a held-out answer to a prompt that was trained on would say
    little, and the same row twice nothing.
    """
    number = min(most, len(rows) // 10)
    if number == 0:
        raise UserError(f"{len(rows)} rows are too few to hold some out; give some with {flag}")
    together = collections.defaultdict(list)
    for i, row in enumerate(rows):
        together[_prompt_of(row)].append(i)
    num_duplicates = len(rows) - len(set(map(json.dumps, rows)))
    if num_duplicates:
        print(f"  {num_duplicates} of {len(rows)} rows are duplicates of others")
    order, held_out = random.Random(cfg.seed).sample(range(len(rows)), len(rows)), {}
    for i in order:
        group = together[_prompt_of(rows[i])]
        if len(held_out) < number and len(group) <= number:  # not the one prompt of all rows
            held_out |= dict.fromkeys(group)
    if len(held_out) < number:
        held_out |= dict.fromkeys([i for i in order if i not in held_out][: number - len(held_out)])
    training = [rows[i] for i in order if i not in held_out]
    return training, _say_shared(training, [rows[i] for i in held_out])


def _prompt_of(row):
    """What a row asks, as a string: equal for rows that must not be in both parts of the data."""
    with contextlib.suppress(Exception):  # the row is none, or its pair was not checked
        return json.dumps(preference(row)[0])
    if "prompt" not in row and "messages" in row:
        return json.dumps(row["messages"][:-1])
    return json.dumps(row.get("prompt", row.get("text")))


def _say_shared(rows, held_out):
    """The held-out rows; it is said how many of their prompts are trained on too."""
    prompts = set(map(_prompt_of, rows))
    number = sum(_prompt_of(row) in prompts for row in held_out)
    if number:
        print(f"  {number} of {len(held_out)} held-out rows have a prompt that is trained on too")
    return held_out


# === Rows to token ids ============================================================================
def convert(rows, encode, what=None):
    """What `encode` makes of all rows, and a line that says how many were used and why not more.

    `encode(row)` yields examples, or a string: why there is one less. Its ValueError, worded to
    follow the place of the row, becomes a UserError. So does it if no example is left.
    """
    examples, dropped = [], collections.Counter()
    common.notes.clear()
    for row in rows:
        try:
            for example in encode(row):
                if isinstance(example, str):
                    dropped[example] += 1
                else:
                    examples.append(example)
        except ValueError as error:
            raise UserError(f"{row.path} line {row.line} {error}") from error
    reasons = "".join(f"; {number} dropped ({reason})" for reason, number in dropped.items())
    source = what or " ".join(dict.fromkeys(row.path for row in rows))
    if not examples:
        raise UserError(f"{source}: {len(rows)} rows read and none can be used{reasons}")
    noted = "".join(f"; {number} {what}" for what, number in common.notes.items())
    unread = collections.Counter(key for row in rows for key in row.unread)
    noted += f"; keys that are not read: {', '.join(map(repr, unread))}" if unread else ""
    print(f"  {source}: {len(rows)} rows read, {len(examples)} examples used{reasons}{noted}")
    return examples


def too_long(cfg, prompt_ids, *responses_ids):
    """Why an example is dropped, or None. It is not cut: a cut text teaches never to end."""
    if len(prompt_ids) > cfg.max_prompt_length:
        return f"prompt above --max-prompt-length {cfg.max_prompt_length}"
    if max(map(len, responses_ids), default=0) > cfg.response_length:
        return f"response above --response-length {cfg.response_length}"
    return None


# FORK: other prompt data become rows with a "prompt" here.
def load_prompts(cfg, tokenizer):
    """(rows of --prompts that fit, held-out ones), each with its token ids as `prompt_ids`."""

    def encode(row):
        row.unread = ()  # a reward function may read them
        row.prompt_ids, _ = common.encode(tokenizer, row["prompt"], tools=row.get("tools"))
        yield (too_long(cfg, row.prompt_ids) if row.prompt_ids else "empty") or row

    rows = convert(read_rows(cfg.prompts, [("prompt",)]), encode)
    if cfg.eval_prompts is None:
        return hold_out(cfg, rows, 128, "--eval-prompts")
    eval_rows = _say_shared(rows, read_rows(cfg.eval_prompts, [("prompt",)]))
    return rows, convert(eval_rows, encode, "held out")


# === Formats to dialogues =========================================================================
# FORK: other preferences become a prompt, a chosen and a rejected response here.
def preference(row):
    """(prompt, chosen, rejected) of a data row, as `common.encode` takes them.

    Without a "prompt", or where chosen and rejected are chats, they may be whole dialogues: then
    what both begin with is the prompt.
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("has a string as one response and messages as the other")
    if isinstance(chosen, str):
        return (prompt, chosen, rejected) if "prompt" in row else split_texts(chosen, rejected)
    if isinstance(prompt, list):
        whole = [chat[: len(prompt)] == prompt for chat in (chosen, rejected)]
        if not any(whole):
            chosen, rejected = prompt + chosen, prompt + rejected
        elif not all(whole):
            raise ValueError("has the prompt within one of the two responses and not the other")
    dialogues = split_chats(chosen, rejected)
    if isinstance(prompt, str) and prompt not in [message["content"] for message in dialogues[0]]:
        raise ValueError("has a string as the prompt that is no message of the two chats")
    return dialogues


def split_texts(chosen, rejected):
    """(common prompt, rest of chosen, rest of rejected) of two whole dialogues as strings.

    In the format of Anthropic's HH data the prompt ends with the last "Assistant:" that both have.
    Without one it ends before the word in which they part: cut within a word, or behind the space,
    the rest would have other tokens than in any other text.
    """
    opening, marker = os.path.commonprefix([chosen, rejected]), "\n\nAssistant:"
    if marker in opening:
        length = opening.rindex(marker) + len(marker)
    else:
        last_word = "" if opening[-1:].isspace() else (opening.split() or [""])[-1]
        length = len(opening[: len(opening) - len(last_word)].rstrip())
    return opening[:length], chosen[length:], rejected[length:]


def split_chats(chosen, rejected):
    """(common messages, rest of chosen, rest of rejected), each rest the assistant's to begin."""
    for rest in (chosen, rejected):
        if rest[-1]["role"] != "assistant":
            raise ValueError("has a chat that does not end with the assistant's message")
    length = 0
    for i, (one, other) in enumerate(zip(chosen, rejected)):
        answers = i and chosen[i - 1]["role"] != "assistant"
        if answers and one["role"] == other["role"] == "assistant":
            length = i
        if one != other:
            break
    if length == 0:
        raise ValueError(
            "has two chats that share no message which the assistant answers; put the prompt, as "
            "messages, into both or under 'prompt'"
        )
    return chosen[:length], chosen[length:], rejected[length:]
