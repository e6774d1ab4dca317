"""Write gguf.npz: blocks that the gguf package (llama.cpp's) quantizes, and the values that it reads from them.

python tests/golden/make_gguf.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
WHOLE = {"Q4_0": (-8, 7), "Q4_1": (0, 15), "Q5_0": (-16, 15), "Q8_0": (-127, 127), "TQ1_0": (-1, 1), "TQ2_0": (-1, 1)}
"""Formats of whole numbers times a float16 scale, and their least and greatest number."""


def even(name: str, rng: np.random.Generator) -> np.ndarray:
    """Two rows of 256 on the format's own grid, whose scales have eight significant bits."""
    low, high = WHOLE[name]
    size = 256 if name.startswith("TQ") else 32
    numbers = rng.integers(low, high + 1, (2, 256 // size, size))
    numbers[..., 0], numbers[..., 1] = low, high
    scales = rng.integers(128, 256, (2, 256 // size, 1)) * 2.0 ** rng.integers(-14, -9, (2, 256 // size, 1))
    offset = rng.integers(0, 16, scales.shape) if name == "Q4_1" else 0
    return ((numbers - offset) * scales).reshape(2, 256).astype(np.float32)


def made() -> dict[str, np.ndarray]:
    """By format and kind of weight: the blocks [2 blocks bytes] and the values [2 256]."""
    from gguf import GGMLQuantizationType, dequantize, quantize

    rng, held = np.random.default_rng(7), dict[str, np.ndarray]()
    for name in (*WHOLE, "MXFP4"):
        kind = GGMLQuantizationType[name]
        weights = {"any": (rng.standard_normal((2, 256)) * np.exp(rng.standard_normal((2, 1)))).astype(np.float32)}
        if name in WHOLE:
            weights["even"] = even(name, rng)
        for which, w in weights.items():
            held[f"{name}.{which}.blocks"] = quantize(w, kind)
            held[f"{name}.{which}.values"] = dequantize(held[f"{name}.{which}.blocks"], kind)
            if which == "even":
                assert np.array_equal(held[f"{name}.even.values"], w), name
    blocks = rng.integers(0, 256, (2, 4, 36), dtype=np.uint8)  # the package reads NVFP4, and does not write it
    blocks[..., :4] = rng.integers(1, 127, (2, 4, 4))
    held["NVFP4.any.blocks"] = blocks.reshape(2, -1)
    held["NVFP4.any.values"] = dequantize(held["NVFP4.any.blocks"], GGMLQuantizationType.NVFP4)
    return held


if __name__ == "__main__":
    np.savez_compressed(HERE / "gguf.npz", **made())
