"""Model classes of weft's own, for kinds of models that transformers has no class for; written and read in its way."""

from __future__ import annotations

from weft.nets.cross import CrossNetwork, CrossNetworkConfig
from weft.nets.flow import FlowOutput, FlowTransformer, FlowTransformerConfig

__all__ = ["CrossNetwork", "CrossNetworkConfig", "FlowOutput", "FlowTransformer", "FlowTransformerConfig"]
