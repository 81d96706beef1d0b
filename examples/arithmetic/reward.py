r"""A verifiable reward: PPO learns to add, paid 1 for a right answer and 0 for any other.

A tiny model first imitates `demonstrations.jsonl`, whose human slips and forgets to carry, and so
gets about half of the sums wrong itself. PPO then needs no reward model: the rows of
`prompts.jsonl` hold the answers, and the function below compares. `score` in the `eval` rows of
metrics.jsonl is the share of right answers to sums that occur in no training file.

    python sft.py --data examples/arithmetic/demonstrations.jsonl --output ckpt/arithmetic_sft \
        --epochs 8
    python ppo.py --policy ckpt/arithmetic_sft --prompts examples/arithmetic/prompts.jsonl \
        --eval-prompts examples/arithmetic/heldout_prompts.jsonl \
        --reward examples/arithmetic/reward.py:correct --output ckpt/arithmetic_ppo \
        --batch-size 256 --iterations 50 --kl-coef 0

    --epochs 8         the form of an answer is learned early, its digits late
    --batch-size 256   right or wrong is one bit: more responses make the gradient less noisy
    --iterations 50    the score still rises after 30
    --kl-coef 0        the score is the aim itself, not a proxy that can be hacked

PPO does more here than make the likeliest answer likelier: the SFT policy's likeliest one is wrong
for most sums with a carry, the PPO policy's right for nearly all. Only the answer is judged, so now
and then a right one follows working that is wrong. A warning that the critic explains nothing may
come; with answers this short, PPO learns with little more than a mean as its baseline.
"""


def correct(prompts, responses, rows):
    """1.0 for each response whose answer, what follows its last `=`, is the row's, else 0.0."""
    answers = ["".join(response.rpartition("=")[2].split()) for response in responses]
    return [float(answer == str(row["answer"])) for answer, row in zip(answers, rows, strict=True)]
