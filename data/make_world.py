"""Write the embedded world: `python data/make_world.py [FOLDER]`, the same bytes every time.

Every text is a short fable about two animals, put together from the phrases below. The storytellers
are of mixed temper (kind, dull, cruel); some stop in the middle of a sentence, repeat themselves or
bring in a wrong animal. A "human" who follows `true_reward.py`, with noise, prefers one of two.

    demonstrations.jsonl   prompt, completion        what `sft.py` imitates, good and bad
    preferences.jsonl      prompt, chosen, rejected  what `reward_model.py` learns from
    prompts.jsonl          prompt                    what `ppo.py` answers in training
    heldout_prompts.jsonl  prompt                    what `ppo.py` is judged on; in no other file
"""

import argparse
import json
import math
import pathlib
import random

from true_reward import FRIENDS, HEROES, judge

NUM_DEMONSTRATIONS, NUM_PREFERENCES, NUM_PROMPTS, NUM_HELDOUT = 2400, 3400, 1500, 256
TEMPERS = {"kind": 0.25, "dull": 0.45, "cruel": 0.30}  # weight of each in a teller's sentences
LABEL_SCALE = 1.5  # P(first is preferred) = sigmoid(LABEL_SCALE * difference of true rewards)
LABEL_FLIPS = 0.08  # share of labels turned round on top of that: slips of the hand

TIMES = [
    "Late at night", "One rainy morning", "On the first day of spring", "Just before the storm",
    "After the harvest", "On a foggy evening", "At the end of winter", "One quiet Sunday",
]
STATES = ["hungry", "lost", "lonely", "muddy", "shy", "sleepy", "tired", "wet"]
PLACES = [
    "by the river", "under the old bridge", "in the apple orchard", "behind the mill",
    "near the lighthouse", "at the edge of the wood", "beside the frozen pond",
    "outside the bakery", "on the windy hill", "at the market",
]

# {H} is the grown animal, {F} the young one.
MIDDLES = {
    "kind": [
        "The {H} wraps the {F} in a soft blanket.",
        "The {H} gently dries the {F} with a towel.",
        "The {H} shares a bowl of sweet soup with the {F}.",
        "The {H} helps the {F} across the bridge.",
        "The {H} hugs the {F} and hums a song.",
        "The {H} builds a cosy nest of straw for the {F}.",
        "The {H} patiently shows the {F} the path.",
        "The {H} comforts the {F} with fresh bread.",
        "The {H} protects the {F} from the wind.",
        "The {H} cheers for the brave {F}.",
        "\"You are safe with me,\" says the {H}.",
        "\"Come in and be welcome,\" says the {H} softly.",
        "\"We are friends now,\" says the {H}.",
        "\"Sit by my warm stove,\" says the {H} kindly.",
    ],
    "dull": [
        "The {H} looks at the {F} for a while.",
        "The {H} counts the clouds.",
        "The {F} stares at a stone.",
        "The {H} walks around the {F} twice.",
        "The {H} talks to the {F} about turnips.",
        "The {F} asks the {H} for the time.",
        "The {H} reads a long letter.",
        "The {F} waits under a tree.",
        "\"It may rain soon,\" says the {H}.",
        "\"I had cabbage for lunch,\" says the {H}.",
        "\"This road goes north,\" says the {H} to the {F}.",
        "The {H} carries a basket of onions past the {F}.",
    ],
    "cruel": [
        "The {H} laughs at the {F}.",
        "The {H} splashes the {F} with mud.",
        "The {H} steals the supper of the {F}.",
        "The {H} growls at the {F}.",
        "The {H} rudely shoves the {F} aside.",
        "The {H} kicks a bucket at the {F}.",
        "The {H} mocks the voice of the {F}.",
        "\"Go away,\" snaps the {H}.",
        "\"What a foolish {F} you are,\" says the {H}.",
        "\"I do not like your ugly hat,\" says the {H} coldly.",
    ],
}
ENDS = {
    "kind": [
        "They walk home together.", "The {F} falls asleep, happy at last.",
        "They dance until the golden sun comes up.", "The {F} thanks the {H} warmly.",
        "Soon the {F} sings sweetly.", "They look at the stars, side by side.",
    ],
    "dull": [
        "Then it is evening.", "Nothing else happens.", "The {F} goes on with the day.",
        "Later the {H} has a nap.", "The clock in the village strikes nine.",
    ],
    "cruel": [
        "The {F} cries.", "The {F} sits in the dark, alone.",
        "The {H} bites the last pear and leaves.",
    ],
}


def write_prompt(rng):
    """A prompt and its two animals."""
    hero, friend = rng.choice(HEROES), rng.choice(FRIENDS)
    article = "an" if hero[0] in "aeiou" else "a"
    time, state, place = rng.choice(TIMES), rng.choice(STATES), rng.choice(PLACES)
    return f"{time}, {article} {hero} meets a {state} {friend} {place}.", hero, friend


def write_completion(rng, hero, friend):
    """One fable of two to four sentences, by a storyteller of random temper and care."""
    own = rng.choice(list(TEMPERS))
    mood = lambda: rng.choices(list(TEMPERS), TEMPERS.values())[0]
    pick = lambda: own if rng.random() < 0.5 else mood()
    sentences = []
    for _ in range(rng.choice([1, 2, 2, 3])):
        choices = [text for text in MIDDLES[pick()] if text not in sentences or rng.random() < 0.1]
        sentences.append(rng.choice(choices))
    if rng.random() < 0.8:
        sentences.append(rng.choice(ENDS[pick()]))
    wrong_hero, wrong_friend = rng.choice(HEROES), rng.choice(FRIENDS)
    told = []
    for text in sentences:
        mixed_up = rng.random() <= 0.05  # now and then the storyteller mixes the animals up
        animals = (wrong_hero, wrong_friend) if mixed_up else (hero, friend)
        told.append(text.format(H=animals[0], F=animals[1]))
    words = " ".join(told).split()
    if rng.random() < 0.12:  # and stops in the middle
        words = words[: rng.randrange(4, len(words))] if len(words) > 5 else words
    return " " + " ".join(words)


def write_preference(rng, prompt, hero, friend):
    """Two completions in the order that the noisy human prefers."""
    first = write_completion(rng, hero, friend)
    second = write_completion(rng, hero, friend)
    while second == first:
        second = write_completion(rng, hero, friend)
    difference = judge(prompt, first) - judge(prompt, second)
    prefers_first = rng.random() < 1 / (1 + math.exp(-LABEL_SCALE * difference))
    if rng.random() < LABEL_FLIPS:
        prefers_first = not prefers_first
    chosen, rejected = (first, second) if prefers_first else (second, first)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def make_world(seed=0):
    """All rows of the four files: {file name: [row, ...]}; no prompt occurs twice."""
    rng = random.Random(seed)
    prompts = {}
    while len(prompts) < NUM_DEMONSTRATIONS + NUM_PREFERENCES + NUM_PROMPTS + NUM_HELDOUT:
        prompt, hero, friend = write_prompt(rng)
        prompts[prompt] = (hero, friend)
    prompts = iter(prompts.items())
    take = lambda number: [next(prompts) for _ in range(number)]
    return {
        "heldout_prompts.jsonl": [{"prompt": prompt} for prompt, _ in take(NUM_HELDOUT)],
        "demonstrations.jsonl": [
            {"prompt": prompt, "completion": write_completion(rng, *animals)}
            for prompt, animals in take(NUM_DEMONSTRATIONS)
        ],
        "preferences.jsonl": [
            write_preference(rng, prompt, *animals) for prompt, animals in take(NUM_PREFERENCES)
        ],
        "prompts.jsonl": [{"prompt": prompt} for prompt, _ in take(NUM_PROMPTS)],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = pathlib.Path(__file__).parent
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=here, help="where to write")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in make_world().items():
        (folder / name).write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())


if __name__ == "__main__":
    main()
