"""Write bitsandbytes.npz: what bitsandbytes makes of a weight in nf4 and fp4, with plain and with quantized scales.

python tests/golden/make_bitsandbytes.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent


def weights() -> dict[str, Tensor]:
    """Four rows of 256: any, and one whose blocks of 64 have a greatest magnitude of eight significant bits."""
    rng = torch.Generator().manual_seed(11)
    w = torch.randn(4, 256, generator=rng) * torch.randn(4, 1, generator=rng).exp()
    parts = w.view(4, 4, 64)
    top, at = parts.abs().max(-1, keepdim=True)
    even = torch.where(torch.arange(64) == at, top.bfloat16().float() * parts.sign(), parts * 0.9)
    return {"any": w, "even": even.view(4, 256)}


def made() -> dict[str, np.ndarray]:
    """By kind, weight and scales: codes, scales, levels and values; of quantized scales all that they are made of."""
    import bitsandbytes.functional as F

    held = {f"{which}.weight": w for which, w in weights().items()}
    for kind in ("nf4", "fp4"):
        for which, w in weights().items():
            for twice in (False, True):
                data, state = F.quantize_4bit(w, quant_type=kind, blocksize=64, compress_statistics=twice)
                at = f"{kind}.{which}.{'twice' if twice else 'once'}"
                held |= {f"{at}.data": data.flatten(), f"{at}.scales": state.absmax, f"{at}.levels": state.code}
                held[f"{at}.values"] = F.dequantize_4bit(data, state)
                if twice:
                    held |= {f"{at}.offset": state.offset, f"{at}.scales.scale": state.state2.absmax}
                    held[f"{at}.scales.levels"] = state.state2.code
    return {k: t.numpy() for k, t in held.items()}


if __name__ == "__main__":
    np.savez_compressed(HERE / "bitsandbytes.npz", **made())
