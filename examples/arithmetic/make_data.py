"""Write the sums: `python examples/arithmetic/make_data.py [FOLDER]`, the same bytes every time.

Each pair of two-digit numbers is one sum, in one order. The "human" who demonstrates them adds tens
and ones apart, and gets about half of the sums wrong: a slip by one in either, or, more often than
not, a carry forgotten. Who only imitates this human forgets it too.

    demonstrations.jsonl   prompt, completion  `2 7 + 5 8 =`, ` 7 0 + 1 5 = 7 5`, right or wrong
    prompts.jsonl          prompt, answer      the same sums with the answer, which no policy sees
    heldout_prompts.jsonl  prompt, answer      other sums, in neither order in another file

Digits stand apart so that each is a token of its own: the tokenizer that `sft.py` trains would
make one of every number, and the tiny model would have to learn thousands of sums by heart.
"""

import argparse
import itertools
import json
import pathlib
import random

NUM_HELDOUT = 495  # of 4095 sums
SLIPS = 0.15  # share of tens, and of ones, that are one too many or too few
FORGOTTEN_CARRIES = 0.6  # above a half, so even the likeliest answer to such a sum is wrong


def spell(number):
    """A number as its digits: `1 5`."""
    return " ".join(str(number))


def write_prompt(a, b):
    return f"{spell(a)} + {spell(b)} ="


def write_completion(rng, a, b):
    """The human's working and answer: ` 7 0 + 1 5 = 8 5` for 27 + 58, were it always right."""
    tens, ones = a // 10 + b // 10, a % 10 + b % 10
    if rng.random() < SLIPS:
        tens += rng.choice([-1, 1])
    if rng.random() < SLIPS:
        ones = abs(ones + rng.choice([-1, 1]))
    total = 10 * tens + ones
    if ones > 9 and rng.random() < FORGOTTEN_CARRIES:
        total -= 10
    return f" {spell(10 * tens)} + {spell(ones)} = {spell(total)}"


def make_data(seed=0):
    """All rows of the three files: {file name: [row, ...]}."""
    rng = random.Random(seed)
    pairs = itertools.combinations_with_replacement(range(10, 100), 2)
    sums = [rng.sample(pair, 2) for pair in pairs]  # in one of its two orders
    rng.shuffle(sums)
    held_out, training = sums[:NUM_HELDOUT], sums[NUM_HELDOUT:]
    ask = lambda sums: [{"prompt": write_prompt(a, b), "answer": a + b} for a, b in sums]
    return {
        "heldout_prompts.jsonl": ask(held_out),
        "demonstrations.jsonl": [
            {"prompt": write_prompt(a, b), "completion": write_completion(rng, a, b)}
            for a, b in training
        ],
        "prompts.jsonl": ask(training),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = pathlib.Path(__file__).parent
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=here, help="where to write")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in make_data().items():
        (folder / name).write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())


if __name__ == "__main__":
    main()
