"""PEFT's folders: adapter_model.safetensors and adapter_config.json. A file a family of types, and the table of them."""

from weft.store.peft.base import fingerprint_of_base
from weft.store.peft.export import export_peft
from weft.store.peft.kinds import KINDS

__all__ = ["KINDS", "export_peft", "fingerprint_of_base"]
