"""The table of PEFT's types of adapters: a new one is a class of `Kind`, and its place here."""

from weft.store.peft.generated import Fourier, Vera
from weft.store.peft.kind import Kind
from weft.store.peft.lora import Lora
from weft.store.peft.lycoris import Loha, Lokr
from weft.store.peft.sides import Ia3, Oft
from weft.store.peft.sparse import Shira
from weft.store.peft.tokens import Cpt, PrefixTuning, PromptTuning
from weft.store.peft.vectors import LnTuning

KINDS: dict[str, Kind] = {
    kind.peft_type: kind
    for kind in (
        Lora(), Vera(), Fourier(), Loha(), Lokr(), Shira(), Ia3(), Oft(), LnTuning(), PromptTuning(), PrefixTuning(), Cpt(),
    )
}  # fmt: skip
"""By `peft_type`."""
