"""Published shapes of the models that the named recipes use, so that a dry run needs no hub."""

from transformers import LlamaConfig

SHAPES = {
    "llama2-13b": LlamaConfig(
        hidden_size=5120,
        intermediate_size=13_824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        vocab_size=32_000,
        max_position_embeddings=4096,
    ),
    "llama2-70b": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=32_000,
        max_position_embeddings=4096,
    ),
    "llama31-70b": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128_256,
        max_position_embeddings=131_072,
    ),
}
