"""TRL's PPO on the same checkpoints with the settings of `python ppo.py`: a method of compare.py.

    pip install trl==1.12.0        the last release with PPO; needed for this file only
    python examples/beside_ppo/trl_ppo.py --policy ckpt/sft --reward ckpt/reward_model --output out

TRL reads the reward model's raw score, so the scale of its config is put into the head first. One
learning rate serves policy and critic there, and no gradient is clipped; the optimizer, its epsilon
and all else that `ppo.Config` doesn't name are TRL's own. The policy is saved as a Hugging Face
folder.
"""

import argparse
import json
import os
import pathlib

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402

PROMPTS = pathlib.Path(__file__).resolve().parents[2] / "data" / "prompts.jsonl"


def with_scale(model):
    """Returns the reward model with its mean and standard deviation in its head."""
    mean, std = model.config.reward_mean, model.config.reward_std
    head = torch.nn.Linear(model.score.in_features, 1)
    with torch.no_grad():
        head.weight.copy_(model.score.weight / std)
        head.bias.fill_(-mean / std)
    model.score = head
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("policy", "reward", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--prompts", default=str(PROMPTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kl-coef", type=float, default=0.15)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--overwrite", action="store_true", help="is always so")
    args = parser.parse_args()
    transformers.set_seed(args.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.policy, padding_side="left")
    causal_lm = transformers.AutoModelForCausalLM
    classifier = transformers.AutoModelForSequenceClassification
    policy = causal_lm.from_pretrained(args.policy, dtype=torch.float32)
    lines = pathlib.Path(args.prompts).read_text(encoding="utf-8").splitlines()
    ids = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    prompts = datasets.Dataset.from_dict({"input_ids": ids})
    config = PPOConfig(
        output_dir=f"{args.output}_trl", seed=args.seed, learning_rate=3e-4,
        total_episodes=128 * args.iterations, per_device_train_batch_size=128,
        gradient_accumulation_steps=1, num_mini_batches=4, num_ppo_epochs=4,
        local_rollout_forward_batch_size=128, response_length=64, temperature=1.0,
        stop_token="eos", missing_eos_penalty=1.0, kl_coef=args.kl_coef, cliprange=0.2,
        cliprange_value=0.2, vf_coef=0.1, gamma=1.0, lam=0.95, whiten_rewards=False,
        gradient_checkpointing=False, num_sample_generations=0, save_strategy="no", report_to=[],
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy,
        ref_model=causal_lm.from_pretrained(args.policy, dtype=torch.float32),
        reward_model=with_scale(classifier.from_pretrained(args.reward, dtype=torch.float32)),
        value_model=with_scale(classifier.from_pretrained(args.reward, dtype=torch.float32)),
        train_dataset=prompts, eval_dataset=prompts.select(range(2)),
    )
    trainer.train()
    policy.save_pretrained(args.output)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
