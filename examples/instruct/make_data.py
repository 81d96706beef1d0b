"""Write chat prompts with instructions that a program can check: `make_data.py [FOLDER]`.

Each prompt is a request about a topic and two instructions on the form of the answer. The same
bytes are written every time.

    prompts.jsonl            512 rows: 48 topics, 7 kinds of instruction
    heldout_prompts.jsonl     96 rows: 16 other topics, mostly other values, the same 7 kinds
    new_kinds_prompts.jsonl   64 rows: those topics; one instruction is of a kind that occurs in no
                              other file, the other one of the 7 kinds
"""

import argparse
import json
import pathlib
import random

REQUESTS = (
    "Tell me about {}.", "Describe {} to a child.", "Why do people like {}?",
    "What is special about {}?",
)
TOPICS = [
    "the moon", "bread", "trains", "bees", "snow", "chess", "the sea", "cats", "old books", "rain",
    "bicycles", "mountains", "honey", "dogs", "whales", "clouds", "apples", "castles", "tea",
    "the violin", "deserts", "lighthouses", "frogs", "volcanoes", "kites", "owls", "cheese",
    "rainbows", "bridges", "spiders", "the piano", "forests", "soap", "elephants", "maps",
    "pancakes", "thunder", "penguins", "gardens", "museums", "glass", "horses", "stars", "islands",
    "soup", "windmills", "turtles", "wind",
]
HELDOUT_TOPICS = [
    "rivers", "balloons", "coffee", "foxes", "clocks", "dolphins", "salt", "libraries", "mirrors",
    "butterflies", "ice cream", "caves", "the drum", "sheep", "lemons", "airports",
]
# Of each kind: the sentence, its values in training prompts and its values in held-out prompts.
KINDS = {
    "words": ("Use at most {} words.", [8, 10, 12, 15, 20], [9, 14, 18]),
    "sentences": ("Write exactly {} sentences.", [2, 3], [2, 3]),
    "include": (
        'Use the word "{}".',
        ["bright", "friend", "music", "small", "travel", "winter", "color", "story", "water"],
        ["quiet", "future", "market", "golden"],
    ),
    "avoid": ('Do not use the word "{}".', ["the", "and", "is", "of", "it"], ["a", "in", "are"]),
    "begin": ('Begin with the word "{}".', ["Well", "Honestly", "Sure", "Today"], ["Maybe"]),
    "end": ('End with the words "{}".', ["that is all", "thank you"], ["good night"]),
    "lowercase": ("Use lowercase letters only.", [None], [None]),
}
NEW_KINDS = {
    "capitals": ("Use CAPITAL LETTERS only.", [None], [None]),
    "question": ("End with a question mark.", [None], [None]),
}
CONFLICTS = (
    {"lowercase", "begin"}, {"lowercase", "capitals"}, {"end", "sentences"}, {"end", "question"},
)


def write_row(rng, topics, first_kinds, is_held_out):
    """Returns a row; its first instruction has one of `first_kinds`, the second one of KINDS."""
    while True:
        kinds = [rng.choice(first_kinds), rng.choice(list(KINDS))]
        if len({*kinds}) == 2 and {*kinds} not in CONFLICTS:
            break
    sentences = [rng.choice(REQUESTS).format(rng.choice(topics))]
    instructions = []  # [kind, value] each
    for kind in kinds:
        sentence, training, held_out = (KINDS | NEW_KINDS)[kind]
        value = rng.choice(held_out if is_held_out else training)
        instructions.append([kind, value])
        sentences.append(sentence.format(value))
    prompt = [{"role": "user", "content": " ".join(sentences)}]
    return {"prompt": prompt, "instructions": instructions}


def write_rows(rng, number, topics, first_kinds, is_held_out):
    """Returns `number` rows with different prompts."""
    rows = {}
    while len(rows) < number:
        row = write_row(rng, topics, first_kinds, is_held_out)
        rows[row["prompt"][0]["content"]] = row
    return list(rows.values())


def make_data(seed=0):
    """Returns all rows: {file name: [row, ...]}."""
    rng = random.Random(seed)
    return {
        "prompts.jsonl": write_rows(rng, 512, TOPICS, list(KINDS), False),
        "heldout_prompts.jsonl": write_rows(rng, 96, HELDOUT_TOPICS, list(KINDS), True),
        "new_kinds_prompts.jsonl": write_rows(rng, 64, HELDOUT_TOPICS, list(NEW_KINDS), True),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default="ckpt/instruct")
    folder = pathlib.Path(parser.parse_args().folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in make_data().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_bytes(text.encode())
        print(f"wrote {folder / name}, {len(rows)} rows")


if __name__ == "__main__":
    main()
