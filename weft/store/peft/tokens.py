"""Prompt tuning, prefix tuning and CPT: virtual tokens of a transformer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Generic, TypeVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from weft.error import ConflictError, WeftError
from weft.model import Branch, Context, Prefix, Prompt, branches, expressions, table_of, trunk
from weft.store.audit import Entry
from weft.store.peft.kind import FLOATS, Change, Found, Held, Kind, Reader, Written, heading
from weft.store.peft.settings import CONFIG, LIMIT, TENSORS, Settings, wrong

_NAME = "prompt_embeddings"
_Count = Annotated[int, Field(ge=1, le=1 << 31)]
Made = TypeVar("Made", bound=Branch)


class TokenSettings(Settings):
    """The settings of all virtual tokens."""

    task_type: str | None = None
    num_virtual_tokens: _Count
    token_dim: _Count
    num_transformer_submodules: _Count = 1
    num_attention_heads: _Count
    num_layers: _Count

    def odd(self) -> dict[str, Any]:
        towers = {"num_transformer_submodules": n} if (n := self.num_transformer_submodules) != 1 else {}
        return super().odd() | towers | ({"task_type": None} if self.task_type is None else {})


class Tokens(Kind, Generic[Made]):
    """Types of which a folder has one table, a row a virtual token."""

    branch: ClassVar[type[Branch]]
    order = 1
    settings = TokenSettings

    @abstractmethod
    def width(self, s: Any) -> int:
        """Numbers of a virtual token."""

    @abstractmethod
    def made(self, s: Any, at: str, name: str, table: Tensor) -> Made:
        """The branch of a table."""

    @abstractmethod
    def table(self, branch: Made) -> tuple[Tensor, dict[str, Any]]:
        """The table of a branch, and its own settings."""

    def read(self, model: nn.Module, s: TokenSettings, found: Mapping[str, Entry]) -> tuple[list[WeftError], Reader]:
        want, entry = f"one tensor {_NAME} [{s.num_virtual_tokens}, {self.width(s)}]", found.get(_NAME)
        problems: list[WeftError] = []
        if entry is None or len(found) > 1 or entry.shape != (s.num_virtual_tokens, self.width(s)):
            got = ", ".join(f"{n} {list(e.shape)}" for n, e in list(found.items())[:3]) or "0 tensors"
            problems.append(wrong(f"the tensors are not those of {self.peft_type}", TENSORS, got, want))
        elif entry.dtype not in FLOATS:
            problems.append(wrong("a tensor is of no numbers", _NAME, str(entry.dtype), "floats"))
        at = trunk(model)
        try:
            table_of(model, CONFIG, at)
        except ConflictError as e:
            problems.append(e)

        def make(tensors: Held, name: str) -> Change:
            return Change(branches=[self.made(s, at, name, tensors[_NAME].detach().clone())])

        return problems, make

    def find(self, model: nn.Module, only: str | None) -> Found:
        mine = [b for b in branches(model) if only in (None, b.name)]
        return Found(branches=mine, rest=dict(expressions(model)))

    def refusals(self, model: nn.Module, found: Found) -> list[WeftError]:
        problems: list[WeftError] = [
            self.no(b.key, b.describe(), self.branch.__name__, "weft.save keeps it")
            for b in found.branches
            if type(b) is not self.branch or not b.on
        ]
        if len(found.branches) > 1:
            got, fix = f"{len(found.branches)} branches", 'export one of them: adapter="NAME"'
            problems.append(self.no(found.branches[1].key, got, "one", fix))
        if heading(self.peft_type, model)["task_type"] is None:
            got, want = type(model).__name__, "a causal language model, or a model without a head"
            problems.append(self.no("task_type", got, want, "weft.save keeps it"))
        return problems

    def strange(self, found: Found) -> int:
        return sum(type(b) is not self.branch for b in found.branches)

    def write(self, model: nn.Module, found: Found) -> Written:
        table, settings = self.table(cast(Any, found.branches[0]))
        config = cast(Any, model).config
        common = {
            "num_virtual_tokens": len(table),
            "token_dim": config.hidden_size,
            "num_transformer_submodules": 1,
            "num_attention_heads": config.num_attention_heads,
            "num_layers": config.num_hidden_layers,
        }
        return Written({_NAME: table.detach()}, {**heading(self.peft_type, model), **common, **settings})


class PromptTuning(Tokens[Prompt]):
    """Vectors before the embedded input."""

    peft_type, method, branch = "PROMPT_TUNING", "prompt", Prompt
    note = "PEFT's outputs have those of the virtual tokens in front"
    idle = (
        "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    )  # fmt: skip

    def width(self, s: TokenSettings) -> int:
        return s.token_dim

    def made(self, s: TokenSettings, at: str, name: str, table: Tensor) -> Prompt:
        return Prompt(at=at, name=name, vectors=table)

    def table(self, branch: Prompt) -> tuple[Tensor, dict[str, Any]]:
        return branch.vectors, {"prompt_tuning_init": "RANDOM"}


class PrefixTuning(Tokens[Prefix]):
    """Keys and values of every layer: a row has, layer by layer, a token's keys of all heads, then its values."""

    peft_type, method, branch = "PREFIX_TUNING", "prefix", Prefix
    note = "keys and values of one size"
    idle = ("encoder_hidden_size", "prefix_projection", "init_weights")

    def width(self, s: TokenSettings) -> int:
        return 2 * s.num_layers * s.token_dim

    def made(self, s: TokenSettings, at: str, name: str, table: Tensor) -> Prefix:
        size = s.token_dim // s.num_attention_heads
        both = table.view(len(table), s.num_layers, 2, s.num_attention_heads, size)
        keys, values = both.permute(2, 1, 3, 0, 4).contiguous()
        return Prefix(at=at, name=name, keys=keys, values=values)

    def refusals(self, model: nn.Module, found: Found) -> list[WeftError]:
        problems = super().refusals(model, found)
        for b in found.branches:
            if isinstance(b, Prefix) and b.keys.shape != b.values.shape:
                got = f"{list(b.keys.shape)} and {list(b.values.shape)}"
                problems.append(self.no(b.key, got, "keys and values of one size", "weft.save keeps it"))
        return problems

    def table(self, branch: Prefix) -> tuple[Tensor, dict[str, Any]]:
        layers, heads, _, size = branch.keys.shape
        rows = torch.stack([branch.keys, branch.values]).permute(3, 1, 0, 2, 4).flatten(1)
        return rows, {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * size}


class CptSettings(TokenSettings):
    """The settings of a CPT."""

    opt_projection_epsilon: Annotated[float, Field(gt=0, lt=LIMIT)] = 0.1


class Cpt(Tokens[Context]):
    """Vectors before the embedded input that may go only so far: the file has their sum, not where they began."""

    peft_type, method, branch, settings = "CPT", "cpt", Context, CptSettings
    note = "the sum of start and shift: what is read begins there, with the radius of input tokens"
    idle = (
        "cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask", "opt_weighted_loss_type", "opt_loss_decay_factor",
        "opt_projection_format_epsilon", "tokenizer_name_or_path",
    )  # fmt: skip

    def width(self, s: CptSettings) -> int:
        return s.token_dim

    def made(self, s: CptSettings, at: str, name: str, table: Tensor) -> Context:
        radius = s.opt_projection_epsilon * (s.token_dim / 2048) ** 0.5
        return Context(at=at, name=name, start=table, shift=torch.zeros_like(table), radius=radius)

    def table(self, branch: Context) -> tuple[Tensor, dict[str, Any]]:
        vectors = branch.tokens()
        epsilon = branch.radius / (vectors.shape[1] / 2048) ** 0.5
        ids = [0] * len(vectors)
        return vectors, {
            "cpt_token_ids": ids,
            "cpt_mask": [1] * len(ids),
            "cpt_tokens_type_mask": [2] * len(ids),
            "opt_projection_epsilon": epsilon,
            "opt_projection_format_epsilon": epsilon,
        }
