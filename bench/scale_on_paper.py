"""What a PPO iteration costs on many cards, computed: prints the tables of docs/scale.md.

    python bench/scale_on_paper.py

Nothing is measured. A time is FLOPs or bytes over a share of a datasheet's rate, and times are
added up also where they could overlap. For other cards change the constants.
"""

import dataclasses

import fits
import iteration

FLOPS = 0.4 * 989e12  # per second: dense bf16 of an H100 SXM
MEMORY = 0.6 * 3.35e12  # bytes per second, read
NVLINK = 0.8 * 450e9  # bytes per second, each way, of a card among the 8 of its node
NETWORK = 0.8 * 8 * 50e9  # of a node: 400 Gb/s for each card, and a ring through each adapter
DISK = 2e9  # bytes per second: one process writes
CARD = 0.92 * 80  # GB: 8 % stay free
BATCH, PROMPT, RESPONSE, MICRO, EPOCHS = 512, 512, 512, 8, 4
RECOMPUTED = 4 / 3  # --gradient-checkpointing: an update is 4 forwards, not 3
PASSING = {"1B": 6.4, "8B": 25.8}  # GB in backward beside weights, gradients, moments: fits.py
TIMED = [("1B", n, shard) for n in (1, 8, 64) for shard in (False, True) if n > shard]
TIMED += [("8B", 8, True), ("8B", 64, True)]  # copies of it don't fit
WAYS = {"copies": (False, False), "sharded, frozen whole": (True, False), "sharded": (True, True)}


class Rank:
    """One card's share of an iteration; counts of parameters are those of whole models."""

    def __init__(self, name, cards):
        self.name, self.cards = name, cards
        sizes = {"prompt_length": PROMPT, "response_length": RESPONSE, "ppo_epochs": EPOCHS}
        self.shape = dataclasses.replace(fits.MODELS[name], batch_size=BATCH // cards, **sizes)
        self.flops, self.trunk = iteration.matrix_flops(self.shape)
        self.embedding = self.shape.hidden * self.shape.vocabulary
        self.critic = self.trunk + self.embedding
        self.policy = self.critic + (0 if self.shape.tied else self.embedding)
        self.trained = self.policy + self.critic  # reference and reward model are as large

    def sent(self, num_bytes):
        """Seconds of an all-gather or reduce-scatter by ring; an all-reduce is one of each."""
        return num_bytes * (1 - 1 / self.cards) / (NVLINK if self.cards <= 8 else NETWORK)

    def step_bytes(self):
        """Read by a decoding step: weights once, and the key-value cache, half grown."""
        weights = 2 * self.critic  # trunk and LM head
        return weights, iteration.decoding_bytes(self.shape, self.trunk, 2) / RESPONSE - weights

    def seconds(self, shard):
        """Of an iteration, by phase; and of a checkpoint."""
        micro_batches, links_score = self.shape.batch_size // MICRO, 0
        links_update = EPOCHS * 2 * self.sent(4 * self.trained)
        if shard:  # all four models gathered for each pass in bf16, gradients scattered in float32
            links_score = self.sent(micro_batches * 2 * 2 * self.trained)
            links_update = self.sent(EPOCHS * micro_batches * (2 + 2 + 4) * self.trained)
        return {
            "whole weights": self.sent(2 * self.policy) if shard else 0,
            "rollout": self.flops["rollout"] / FLOPS + RESPONSE * sum(self.step_bytes()) / MEMORY,
            "score": self.flops["score"] / FLOPS, "score's links": links_score,
            "update": RECOMPUTED * self.flops["update"] / FLOPS, "update's links": links_update,
        }, 12 * self.trained / DISK  # weights and Adam's two moments

    def memory(self, shard, shard_frozen):
        """GB held in rollout and in update."""
        trained = self.trained / (self.cards if shard else 1)
        frozen = 2 * self.trained + 4 * self.embedding  # bf16, but for two embeddings: `place`
        frozen /= self.cards if shard_frozen else 1
        copy = 2 * (self.policy if shard else self.critic)  # in bf16, for decoding
        cache = self.step_bytes()[1] * (PROMPT + RESPONSE) / (PROMPT + RESPONSE / 2)
        held = 12 * trained + frozen  # weights and moments; gradients are there in the update only
        return (held + copy + cache) / 1e9, (held + 4 * trained) / 1e9 + PASSING[self.name]


def table(heads, rows):
    number = lambda x: f"{x:.{0 if x >= 100 else 1 if x >= 1 else 2}f}" if x else "-"
    show = lambda x: x if isinstance(x, str) else number(x)
    lines = heads, ["---"] * len(heads), *rows
    return "\n".join(f"| {' | '.join(map(show, line))} |" for line in lines)


def tables():
    """The tables of docs/scale.md: seconds by phase, milliseconds of a decoding step, GB."""
    phases, steps, memory = [], [], []
    for name, cards, shard in TIMED:
        seconds, saving = Rank(name, cards).seconds(shard)
        cells = "sharded" if shard else "copies", *seconds.values(), sum(seconds.values()), saving
        phases.append([name, f"{cards}", *cells])
    for cards in (1, 8, 64):
        steps.append([f"{cards}", f"{BATCH // cards}"])
        for name in ("1B", "8B"):
            weights, cache = (1e3 * size / MEMORY for size in Rank(name, cards).step_bytes())
            steps[-1] += [weights, cache, f"{weights / (weights + cache):.0%}"]
    for name, cards in (("1B", 1), ("1B", 8), ("8B", 1), ("8B", 8), ("8B", 64)):
        memory.append([name, f"{cards}"])
        for way in WAYS.values():
            rollout, update = Rank(name, cards).memory(*way)
            no = ", no" if max(rollout, update) > CARD else ""
            memory[-1].append(f"{rollout:.0f} / {update:.0f}{no}")
    parts = [f"{name} {part}" for name in ("1B", "8B") for part in ("weights", "cache", "share")]
    return [
        table(["policy", "cards", "way", *seconds, "iteration", "a checkpoint"], phases),
        table(["cards", "rows a card", *parts], steps), table(["policy", "cards", *WAYS], memory),
    ]


if __name__ == "__main__":
    print("\n\n".join(tables()))
