"""Models that papers describe."""

from evermesh.parallelism.cost import ExpertShape, ModelShape


def gpt(hidden: int, layers: int, heads: int, vocabulary: int = 51_200) -> ModelShape:
    """A GPT: feed-forward blocks four times as wide, without gate."""
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=4 * hidden,
        vocabulary=vocabulary,
        gated=False,
        tied_embeddings=True,
    )


def llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocabulary: int = 128_256) -> ModelShape:
    """A LLaMA 3."""
    return ModelShape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        ffn=ffn,
        vocabulary=vocabulary,
    )


GPT_7B = gpt(4096, 32, 32)
GPT3 = gpt(12_288, 96, 128, 64_000)
"""As MegaScale trains it (arXiv 2402.15627, table 1)."""
MT_NLG = gpt(20_480, 105, 128, 51_200)
LLAMA3_8B = llama(4096, 32, 32, 8, 14_336)
LLAMA3_70B = llama(8192, 80, 64, 8, 28_672)
LLAMA3_405B = llama(16_384, 126, 128, 8, 53_248)
MIXTRAL_8X7B = ModelShape(
    hidden=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    ffn=14_336,
    vocabulary=32_000,
    experts=ExpertShape(layers=32, experts=8, active_ffn=2 * 14_336, top_k=2),
)
SMALL = ModelShape(hidden=256, layers=8, heads=8, kv_heads=4, head_dim=32, ffn=704, vocabulary=4096)
"""Small enough to try everything."""
