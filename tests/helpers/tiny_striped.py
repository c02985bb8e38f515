"""A tiny random StripedHyena, one Hyena and one attention layer, for tests that need a model and no quality."""

import torch

from stripedrag.model import StripedHyenaConfig, StripedHyenaForCausalLM


def tiny_striped(tokenizer, *, window_tokens):
    """The same weights every time, under the given tokenizer."""
    config = StripedHyenaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_layers=2,
        attn_layer_idxs=[1],
        num_attention_heads=2,
        max_seqlen=window_tokens,
        tie_embeddings=True,
        pad_token_id=2,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return StripedHyenaForCausalLM(config).eval()
