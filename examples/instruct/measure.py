"""Measure which instructions policies obey on held-out prompts: `measure.py MODEL [FOLDER ...]`.

    python examples/instruct/measure.py MODEL ckpt/instruct_ppo --best-of 8 --output ckpt/table.json

Each policy writes one answer to each prompt of two files of make_data.py. The KL is measured from
MODEL. With --best-of N the table also has the best of N answers of MODEL, chosen by the reward.
Writes all numbers to --output and all texts beside it, and prints the table.
"""

import argparse
import collections
import json
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "beside_ppo")]
import best_of_n  # noqa: E402
import reward  # noqa: E402

import common  # noqa: E402
import harness  # noqa: E402
import ppo  # noqa: E402
from rewards import FunctionScorer  # noqa: E402

SCORER = f"{pathlib.Path(__file__).with_name('reward.py')}:obeyed"
FILES = {"heldout": "heldout_prompts.jsonl", "new_kinds": "new_kinds_prompts.jsonl"}


def summarize(rows, texts):
    """Returns the mean score, the share of texts that obey both instructions, words per text, and
    {kind: [obeyed, number]}; of new kinds each row has one, its first.
    """
    scores = reward.obeyed(None, texts, rows)
    kinds = collections.defaultdict(lambda: [0, 0])
    first = []
    for row, text in zip(rows, texts, strict=True):
        kept = [reward.obeys(text, kind, value) for kind, value in row["instructions"]]
        first.append(kept[0])
        for (kind, _), is_kept in zip(row["instructions"], kept):
            kinds[kind][0] += is_kept
            kinds[kind][1] += 1
    return {
        "score": statistics.fmean(scores),
        "first": statistics.fmean(first),
        "both": statistics.fmean(score == 1 for score in scores),
        "words": statistics.fmean(len(text.split()) for text in texts),
        "kinds": dict(kinds),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="MODEL, then policies")
    parser.add_argument("--data", default="ckpt/instruct", type=pathlib.Path)
    parser.add_argument("--best-of", default=1, type=int, metavar="N")
    parser.add_argument("--response-length", default=40, type=int)
    parser.add_argument("--temperature", default=0.7, type=float)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--output", default="ckpt/instruct/table.json", type=pathlib.Path)
    args = parser.parse_args()
    device = harness.pick_device("auto")
    sampling = {
        "response_length": args.response_length, "temperature": args.temperature,
        "seed": args.seed, "batch_size": 32, "microbatch_size": 32,
    }  # fmt: skip
    tokenizer = common.load_tokenizer(args.folders[0])
    ref_policy = common.load_causal_lm(args.folders[0], tokenizer).requires_grad_(False)
    common.to_device(ref_policy, device, "auto")
    rows = {}
    for name, file in FILES.items():
        rows[name] = harness.read_rows([str(args.data / file)], [("prompt",)])
        for row in rows[name]:
            row.prompt_ids, _ = common.encode(tokenizer, row["prompt"])
    table, texts = {}, {}
    for folder in args.folders:
        policy = common.load_causal_lm(folder, tokenizer).requires_grad_(False)
        common.to_device(policy, device, "auto")
        table[folder], texts[folder] = {}, {}
        for name in FILES:
            samples = ppo.evaluate(
                ppo.Config(**sampling), policy, ref_policy, tokenizer, [FunctionScorer(SCORER)],
                None, rows[name],
            )  # fmt: skip
            texts[folder][name] = [sample["response"] for sample in samples]
            kl = statistics.fmean(sample["kl"] for sample in samples)
            table[folder][name] = summarize(rows[name], texts[folder][name]) | {"kl": kl}
        print(folder, json.dumps(table[folder]), flush=True)
    if args.best_of > 1:
        best = table[f"best of {args.best_of}"] = {}
        cfg = best_of_n.Config(n=args.best_of, **sampling)
        for name in FILES:
            some, scores, _ = best_of_n.sample_all(
                cfg, ref_policy, tokenizer, [FunctionScorer(SCORER)], None, rows[name]
            )
            chosen = [each[k] for each, k in zip(some, scores.argmax(1).tolist(), strict=True)]
            best[name] = summarize(rows[name], chosen)
    args.output.write_text(json.dumps(table, indent=1) + "\n")
    args.output.with_suffix(".texts.json").write_text(json.dumps(texts, indent=1) + "\n")
    print("\n| | held-out prompts | both | new kinds | words | KL |\n|---|---|---|---|---|---|")
    for name, row in table.items():
        held_out, new = row["heldout"], row["new_kinds"]
        print(
            f"| {name} | {held_out['score']:.2f} | {held_out['both']:.2f} | {new['first']:.2f} | "
            f"{held_out['words']:.0f} | {held_out.get('kl', float('nan')):.2f} |"
        )


if __name__ == "__main__":
    main()
