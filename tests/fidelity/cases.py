"""The fidelity cases: preset, mix, seed, number of tokens, overrides of the preset's shape."""

PRESETS = ["llama-tiny", "llama3-tiny", "qwen2-tiny", "qwen3-tiny", "qwen3moe-tiny"]
TYPES = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K_M Q4_K_M Q5_K_M Q6_K IQ4_NL IQ4_XS MXFP4".split()

# Types that look weights up in grids, and mixes of them: one dense preset and one of experts.
GRID_PRESETS = ["llama3-tiny", "qwen3moe-tiny"]
GRID_TYPES = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ2_M IQ3_M".split()

# What the presets leave out: scaled rotary embedding, one KV head, widths that fill no tile,
# heads that rotate in part, long prompts.
SHAPES = [
    ("llama-tiny", "Q8_0", 11, 200, {"D": 320, "H": 5, "K": 1, "scaling": ["yarn", 4, 2048]}),
    ("llama-tiny", "F32", 12, 130, {"scaling": ["linear", 2.5, 4096]}),
    ("qwen2-tiny", "F32", 13, 96, {"scaling": ["yarn", 8, 32]}),
    ("llama3-tiny", "Q4_K_M", 14, 257, {"H": 8, "K": 8, "L": 2}),
    ("qwen3-tiny", "Q5_0", 15, 65, {"D": 160, "F": 352, "H": 3, "K": 3, "hd": 96}),
    ("qwen3moe-tiny", "Q8_0", 16, 150, {"E": 5, "used": 3, "EF": 96}),
    ("llama-tiny", "Q6_K", 17, 70, {"E": 4, "used": 2, "EF": 768}),
]


def cases():
    for i, preset in enumerate(PRESETS):
        for j, mix in enumerate(TYPES):
            yield preset, mix, 100 + i * 20 + j, 48, {}
    yield from SHAPES
    for i, preset in enumerate(GRID_PRESETS):
        for j, mix in enumerate(GRID_TYPES):
            yield preset, mix, 300 + i * 20 + j, 48, {}


def name(preset, mix, seed):
    return f"{preset}-{mix}-{seed}"


def tokens(seed, n):
    import numpy as np

    return [int(x) for x in np.random.default_rng(seed + 1000).integers(0, 500, n)]
