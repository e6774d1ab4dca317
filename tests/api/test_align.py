"""Merges of models whose vocabularies differ: rows go by token, what is lost is said, and what cannot be aligned is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build_tiny
from torch import Tensor, nn
from typer.testing import CliRunner

import weft
from weft.cli.app import build
from weft.error import ConflictError, OptionError, PathError, WeftError
from weft.expr import terms_of
from weft.model import expressions, weave

FIRST = ["<end>", "<pad>", "<unk>", "the", "cat", "sat", "on", "mat", "red", "hill"]
SECOND = ["<pad>", "<end>", "cat", "<unk>", "dog", "hill", "the", "sat", "bird", "on", "mat", "ran"]
LOST, LACKING = ["bird", "dog", "ran"], ["red"]
FAMILIES = ("llama", "llama-tied", "bert-mlm")


def words(tokens: list[str], before: str = "Whitespace") -> Any:
    """A tokenizer that gives these words their places."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    plain.pre_tokenizer = getattr(pre_tokenizers, before)()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")


def made(where: Path, tokens: list[str], family: str, seed: int, rows: int = 0, **how: Any) -> nn.Module:
    """A model of these words, from a folder; with more rows than words, if asked."""
    ends = {"pad_token_id": tokens.index("<pad>")}
    plain = build_tiny(family, seed=seed, vocab_size=rows or len(tokens), **ends)
    weft.save(weave(plain), where, tokenizer=words(tokens, **how))
    return weft.load(where)


def logits(model: nn.Module, text: str) -> Tensor:
    """By the model's own tokenizer."""
    ids = torch.tensor([weft.tokenizer(model)(text)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> list[nn.Module]:
    """Two models of one family, of ten and twelve words."""
    given = (("first", FIRST, 0), ("second", SECOND, 1))
    return [made(tmp_path / name, tokens, request.param, seed) for name, tokens, seed in given]


@pytest.mark.filterwarnings("ignore:member")
def test_a_member_alone_says_what_it_said(pair: list[nn.Module]) -> None:
    """In the first one's order, with its tokenizer: the same logits of every token that both have."""
    alone = weft.combine(pair, "soup", weights=[0, 1], align="tokens")
    both = [t for t in FIRST if t in SECOND]
    text = "the cat sat on the mat hill"
    one, two = logits(alone, text), logits(pair[1], text)
    assert one.shape[-1] == len(FIRST) and two.shape[-1] == len(SECOND)
    here, there = ([tokens.index(t) for t in both] for tokens in (FIRST, SECOND))
    torch.testing.assert_close(one[..., here], two[..., there], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:member")
@pytest.mark.parametrize("name", ["soup", "ties"])
def test_rows_go_by_token(pair: list[nn.Module], name: str) -> None:
    """Of what both have the merge, of what the second has not the first one's; other weights are merged as ever; both stay as they are."""
    before = [weft.model.fingerprint(m) for m in pair]
    how: dict[str, Any] = {} if name == "soup" else {"base": pair[0], "density": 1.0}
    models = pair if name == "soup" else pair[1:]
    result = expressions(weft.combine(models, name, align="tokens", **how))
    one, two = (expressions(m) for m in pair)
    tables = [n for n, e in one.items() if e.shape != two[n].shape]
    assert len(tables) == (2 if "lm_head.weight" in one else 1)
    for n, e in result.items():
        a, b = one[n].dense(), two[n].dense()
        if n in tables:
            b = torch.stack([b[SECOND.index(t)] if t in SECOND else a[i] for i, t in enumerate(FIRST)])
        torch.testing.assert_close(e.dense(), (a + b) / 2 if name == "soup" else b, rtol=1e-4, atol=1e-5)
    assert [weft.model.fingerprint(m) for m in pair] == before


def test_what_is_lost_is_said(pair: list[nn.Module]) -> None:
    """By name, of whom, and whose tokens stand in."""
    said = weft.combined(pair, "soup", align="tokens").fallbacks
    assert said == [
        ("member 2", f"3 of its tokens are lost, which the result's tokenizer has not: {', '.join(map(repr, LOST))}"),
        ("member 2", f"1 of the result's tokens it has not: they are the first model's: {LACKING[0]!r}"),
    ]
    with pytest.warns(UserWarning, match="are lost"):
        weft.combine(pair, "soup", align="tokens")
    with pytest.raises(WeftError, match="other tokenizers"):
        weft.combine(pair, "soup")


def test_one_vocabulary_is_left_as_it_is(tmp_path: Path) -> None:
    """Nothing is said, and adapters on one base stay adapters; so they do beside a model of the same words in another order."""
    base = made(tmp_path / "base", FIRST, "llama", 0)
    members = [weft.fork(base) for _ in range(2)]
    for m in members:
        weft.apply(m, "lora", rank=2)
    found = weft.combined(members, "task_arithmetic", base=base, align="tokens")
    assert not found.fallbacks
    assert sum("adapter:merged" in terms_of(e) for e in expressions(found.model).values()) == 14


def test_rows_without_a_token_are_the_firsts(tmp_path: Path) -> None:
    """Tables may be wider than their tokenizers."""
    pair = [made(tmp_path / "a", FIRST, "llama", 0, rows=17), made(tmp_path / "b", SECOND, "llama", 1, rows=24)]
    result = expressions(weft.combined(pair, "soup", weights=[0, 1], align="tokens").model)
    one, two = (expressions(m)["lm_head.weight"].dense() for m in pair)
    rows = result["lm_head.weight"].dense()
    assert rows.shape[0] == 17 and torch.equal(rows[len(FIRST) :], one[len(FIRST) :])
    assert torch.equal(rows[FIRST.index("cat")], two[SECOND.index("cat")])


def test_quantized_members_are_aligned(tmp_path: Path) -> None:
    """By their values; the base of a member has tokens of its own as well."""
    base = made(tmp_path / "base", FIRST, "llama", 0)
    own, other = made(tmp_path / "own", SECOND, "llama", 1), made(tmp_path / "other", SECOND, "llama", 2)
    weft.apply(other, "rtn", bits=8, group=16)
    result = expressions(weft.combined([other], "task_arithmetic", base=[base, own], align="tokens", scale=1.0).model)
    for n in ("model.embed_tokens.weight", "lm_head.weight"):
        a, b, c = (expressions(m)[n].dense() for m in (base, own, other))
        learnt = [c[SECOND.index(t)] - b[SECOND.index(t)] if t in SECOND else torch.zeros(32) for t in FIRST]
        torch.testing.assert_close(result[n].dense(), a + torch.stack(learnt), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_aligned_is_refused(tmp_path: Path) -> None:
    """Other ways to cut texts, nothing in common, weights that may go by tokens elsewhere, no tokenizer, another family, data by row."""
    one = made(tmp_path / "one", FIRST, "llama", 0)
    cut = made(tmp_path / "cut", SECOND, "llama", 1, before="WhitespaceSplit")
    with pytest.raises(ConflictError, match=r"(?s)cut texts in other ways.*member 2.*pre_tokenizer"):
        weft.combine([one, cut], "soup", align="tokens")
    strange = made(tmp_path / "strange", ["<end>", "<pad>", "<unk>"], "llama", 1)
    place = tmp_path / "strange" / "tokenizer.json"
    held = json.loads(place.read_text())
    held["model"]["vocab"] = {f"~{t}": i for t, i in held["model"]["vocab"].items()} | {"<unk>": 99}
    held["added_tokens"] = []
    place.write_text(json.dumps(held))
    (tmp_path / "strange" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConflictError, match="nothing in common"):
        weft.combine([one, strange], "soup", align="tokens")
    wide = [made(tmp_path / f"wide{i}", t, "llama", i, rows=48) for i, t in enumerate((FIRST, SECOND))]
    with pytest.raises(ConflictError, match=r"(?s)may go by tokens too.*member 2: .*mlp"):
        weft.combine(wide, "soup", align="tokens")
    bare = weave(build_tiny("llama", vocab_size=12))
    with pytest.raises(PathError, match="no tokenizer"):
        weft.combine([one, bare], "soup", align="tokens")
    with pytest.raises(ConflictError, match="one family"):
        weft.combine([one, made(tmp_path / "bert", SECOND, "bert", 1)], "soup", align="tokens")
    with pytest.raises(OptionError, match="not aligned"):
        weft.combine([one, one], "fisher", align="tokens")


def test_the_command_aligns(tmp_path: Path) -> None:
    """The folder has the first one's tokenizer, transformers loads it, the manifest says how, and what is lost ends with 3."""
    from transformers import AutoModelForCausalLM

    for name, tokens, seed in (("first", FIRST, 0), ("second", SECOND, 1)):
        made(tmp_path / name, tokens, "llama", seed)
    argv = ["soup", str(tmp_path / "first"), str(tmp_path / "second"), "--out", str(tmp_path / "out"), "-q"]
    assert CliRunner().invoke(build(argv), argv).exit_code == 4
    argv += ["--align", "tokens"]
    done = CliRunner().invoke(build(argv), argv)
    assert done.exit_code == 3 and "3 of its tokens are lost" in done.stderr
    back = weft.load(tmp_path / "out")
    assert weft.tokenizer(back).get_vocab() == {t: i for i, t in enumerate(FIRST)} and back.config.vocab_size == 10
    assert json.loads((tmp_path / "out" / "weft.json").read_text())["merged"]["align"] == "tokens"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(plain(input_ids=ids).logits, back(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
