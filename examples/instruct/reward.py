"""A verifiable reward: which of its prompt's instructions does a text obey?

A row's "instructions" are pairs of a kind and a value, as make_data.py writes them, for example
["words", 10] for "Use at most 10 words.". README.md has the commands.
"""

import re

MIN_WORDS = 3  # a shorter text is no answer


def obeys(text, kind, value):
    """Returns whether a text obeys one instruction. Only two kinds look at upper and lower case.

    What the text is about is not checked: one that only obeys gets the full reward.
    """
    text = text.strip()
    words = re.findall(r"[a-z]+(?:['’-][a-z]+)*", text.lower())
    if len(words) < MIN_WORDS:
        return False
    if kind == "words":  # at most so many
        return len(words) <= value
    if kind == "sentences":  # exactly so many; the dot of an abbreviation counts as an end
        num_ends = len(re.findall(r"[.!?]['\")]?(?:\s|$)", text))
        return num_ends == value and text.rstrip("'\")").endswith((".", "!", "?"))
    if kind == "include":
        return value in words
    if kind == "avoid":
        return value not in words
    if kind == "begin":
        return words[0] == value.lower()
    if kind == "end":
        return " ".join(words).endswith(value)
    if kind == "lowercase":
        return text == text.lower()
    if kind == "capitals":
        return text == text.upper()
    if kind == "question":
        return text.rstrip("'\")").endswith("?")
    raise ValueError(f"unknown kind of instruction: {kind}")


def obeyed(prompts, responses, rows):
    """Returns the share of its prompt's instructions that each response obeys, from 0 to 1."""
    shares = []
    for response, row in zip(responses, rows, strict=True):
        kept = [obeys(response, kind, value) for kind, value in row["instructions"]]
        shares.append(sum(kept) / len(kept))
    return shares
