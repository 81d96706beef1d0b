"""The tiny model of the embedded world, from scratch: what `sft.py` trains without --model."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def train_tokenizer(texts, vocab_size=1024):
    """A byte-pair tokenizer learned from `texts`; its alphabet is bytes, so nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|pad|>", "<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = {"pad_token": "<|pad|>", "eos_token": "<|end|>"}  # pad is not EOS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_llama(tokenizer, width=96):
    """A Llama of 0.3 million random weights, enough for the embedded world.

    Weights start at deviation 1/sqrt(width). The usual 0.02 is made for widths of thousands; with
    it, this model needs far more steps to learn to copy the animals' names from the prompt.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=width**-0.5, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()
