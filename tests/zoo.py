"""Tiny random configs of many model families: FAMILIES = {name: (kind, lambda transformers: config)}.

hidden 32, 2 layers where possible, vocabulary 320, EOS 1, pad 0, no BOS, weights of deviation about 0.3.
"""

VOCAB, EOS, PAD = 320, 1, 0
SPECIAL = dict(vocab_size=VOCAB, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None)
SIZES = dict(SPECIAL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64)
PLAIN = dict(SIZES, initializer_range=0.3)
GROUPED = dict(PLAIN, num_key_value_heads=2)
OPT = dict(SPECIAL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, max_position_embeddings=64, init_std=0.3)
MAMBA = dict(SPECIAL, hidden_size=32, num_hidden_layers=2, state_size=8, expand=2, conv_kernel=4, initializer_range=0.3)
MAMBA2 = dict(MAMBA, num_heads=8, head_dim=8, n_groups=2, chunk_size=4)
HYBRID = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=8, mamba_d_conv=4, mamba_chunk_size=4)  # Mamba 2 inside
DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=4)
LATENT = dict(kv_lora_rank=8, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
MIX = ["linear_attention", "full_attention"]

FAMILIES = {
    # --- attention
    "gpt2": ("attention", lambda t: t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, **SPECIAL)),
    "gpt_neox": ("attention", lambda t: t.GPTNeoXConfig(**PLAIN)),
    "gpt_bigcode": ("attention", lambda t: t.GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, **SPECIAL)),
    "opt": ("attention", lambda t: t.OPTConfig(word_embed_proj_dim=32, **OPT)),
    "opt_projected": ("attention", lambda t: t.OPTConfig(word_embed_proj_dim=16, do_layer_norm_before=False, **OPT)),
    "bloom": ("attention", lambda t: t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, **SPECIAL)),
    "falcon": ("attention", lambda t: t.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=48, max_position_embeddings=64, initializer_range=0.3, **SPECIAL)),
    "mpt": ("attention", lambda t: t.MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, initializer_range=0.3, **SPECIAL)),
    "llama_untied": ("attention", lambda t: t.LlamaConfig(tie_word_embeddings=False, **GROUPED)),
    "llama_tied": ("tied embeddings", lambda t: t.LlamaConfig(tie_word_embeddings=True, **GROUPED)),
    "mistral_window": ("attention", lambda t: t.MistralConfig(sliding_window=4, **GROUPED)),
    "qwen2": ("tied embeddings", lambda t: t.Qwen2Config(tie_word_embeddings=True, **GROUPED)),
    "qwen2_window": ("attention", lambda t: t.Qwen2Config(use_sliding_window=True, sliding_window=4, max_window_layers=1, **GROUPED)),
    "qwen3": ("attention", lambda t: t.Qwen3Config(head_dim=8, **GROUPED)),
    "gemma2": ("tied embeddings", lambda t: t.Gemma2Config(head_dim=8, sliding_window=4, **GROUPED)),
    "gemma3": ("tied embeddings", lambda t: t.Gemma3TextConfig(head_dim=8, sliding_window=4, **GROUPED)),
    "gemma3n": ("attention", lambda t: t.Gemma3nTextConfig(head_dim=8, sliding_window=4, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, laurel_rank=8, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0], layer_types=["sliding_attention", "full_attention"], **GROUPED)),
    "phi3": ("attention", lambda t: t.Phi3Config(original_max_position_embeddings=64, **GROUPED)),
    "cohere2": ("attention", lambda t: t.Cohere2Config(logit_scale=1.0, sliding_window=4, layer_types=["sliding_attention", "full_attention"], **GROUPED)),
    "starcoder2": ("attention", lambda t: t.Starcoder2Config(sliding_window=4, **GROUPED)),
    "olmo2": ("attention", lambda t: t.Olmo2Config(**GROUPED)),
    "glm4": ("attention", lambda t: t.Glm4Config(head_dim=8, **GROUPED)),
    "granite": ("attention", lambda t: t.GraniteConfig(embedding_multiplier=2.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.3, **GROUPED)),
    "smollm3": ("attention", lambda t: t.SmolLM3Config(no_rope_layers=[1, 0], **GROUPED)),
    # --- latent attention
    "deepseek_v3": ("latent attention", lambda t: t.DeepseekV3Config(**PLAIN, **LATENT, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1)),
    # --- state space
    "mamba": ("state space", lambda t: t.MambaConfig(time_step_rank=4, **MAMBA)),
    "mamba2": ("state space", lambda t: t.Mamba2Config(**MAMBA2)),
    "rwkv": ("state space", lambda t: t.RwkvConfig(hidden_size=32, num_hidden_layers=2, context_length=64, attention_hidden_size=32, intermediate_size=48, **SPECIAL)),
    "xlstm": ("state space", lambda t: t.xLSTMConfig(hidden_size=64, num_hidden_layers=2, num_heads=2, chunk_size=16, qk_dim_factor=1.0, autocast_kernel_dtype="float32", **SPECIAL)),
    # --- hybrid
    "jamba": ("hybrid", lambda t: t.JambaConfig(**GROUPED, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False)),
    "bamba": ("hybrid", lambda t: t.BambaConfig(**GROUPED, **HYBRID, attn_layer_indices=[1])),
    "falcon_h1": ("hybrid", lambda t: t.FalconH1Config(**GROUPED, **HYBRID, mamba_d_ssm=64)),
    "qwen3_next": ("hybrid", lambda t: t.Qwen3NextConfig(**GROUPED, **DELTA, head_dim=8, layer_types=MIX, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)),
    "qwen3_5": ("hybrid", lambda t: t.Qwen3_5TextConfig(**GROUPED, **DELTA, head_dim=8, layer_types=MIX)),
    "recurrent_gemma": ("hybrid", lambda t: t.RecurrentGemmaConfig(**SPECIAL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, lru_width=32, attention_window_size=64, block_types=["recurrent", "attention"], w_init_variance_scale=1.0)),
    "lfm2": ("hybrid", lambda t: t.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, conv_L_cache=3)),
    "minimax": ("hybrid", lambda t: t.MiniMaxConfig(**GROUPED, head_dim=8, layer_types=MIX, num_local_experts=4, block_size=4)),
    # --- mixture of experts
    "mixtral": ("mixture of experts", lambda t: t.MixtralConfig(**GROUPED, num_local_experts=4)),
    "qwen3_moe": ("mixture of experts", lambda t: t.Qwen3MoeConfig(**GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)),
    "olmoe": ("mixture of experts", lambda t: t.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2)),
    "gpt_oss": ("mixture of experts", lambda t: t.GptOssConfig(**GROUPED, head_dim=8, sliding_window=4, num_local_experts=4, num_experts_per_tok=2)),
    "phimoe": ("mixture of experts", lambda t: t.PhimoeConfig(**GROUPED, num_local_experts=4)),
    # --- multimodal, the text part that AutoModelForCausalLM takes or not
    "gemma3_multimodal": ("multimodal", lambda t: t.Gemma3Config(text_config=dict(head_dim=8, sliding_window=4, **GROUPED), vision_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=28, patch_size=14), mm_tokens_per_image=1, boi_token_index=310, eoi_token_index=311, image_token_index=312, eos_token_id=EOS)),
    "qwen2_vl": ("multimodal", lambda t: t.Qwen2VLConfig(text_config=dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2]), **GROUPED), vision_config=dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2), image_token_id=312, video_token_id=313, vision_start_token_id=310, vision_end_token_id=311)),
    "qwen3_vl": ("multimodal", lambda t: t.Qwen3VLConfig(text_config=dict(head_dim=8, rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1]), **GROUPED), vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0]), image_token_id=312, video_token_id=313, vision_start_token_id=310, vision_end_token_id=311)),
    "mistral3": ("multimodal", lambda t: t.Mistral3Config(text_config=dict(model_type="mistral", head_dim=8, **GROUPED), vision_config=dict(model_type="pixtral", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=28, patch_size=14), image_token_index=312)),
    # --- encoder-decoder and encoders, to be refused
    "t5": ("encoder-decoder", lambda t: t.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=PAD, eos_token_id=EOS)),
    "bart": ("encoder-decoder", lambda t: t.BartConfig(vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.3, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None)),
    "bert": ("encoder", lambda t: t.BertConfig(**PLAIN)),
}

NO_CAUSAL_LM = ["qwen2_vl", "qwen3_vl", "mistral3", "t5"]  # transformers has no causal LM for them
REFUSED = {  # transformers has one, but batches of texts are not read as each text alone, or it can't be driven token by token
    "rwkv": "reads the padding", "xlstm": "can't be read or sampled from", "recurrent_gemma": "reads the padding", "minimax": "can't be read or sampled from",
    "bart": "reads the padding", "bert": "lets tokens see later ones",
}
RUN = [name for name in FAMILIES if name not in [*NO_CAUSAL_LM, *REFUSED, "phimoe", "gemma3n"]]
