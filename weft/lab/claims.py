"""What the claim of a paper is tried on (the lab), and what comes out: numbers, intervals, a verdict a lab model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, Literal

from weft.engine import get
from weft.engine.run import Chain, Step, code_version
from weft.error import ConflictError, OptionError
from weft.lab import merging, multitask, rewording
from weft.lab.decoding import changed
from weft.lab.probing import halfway, probed
from weft.lab.reading import read
from weft.lab.recalling import forgotten, recalled
from weft.lab.restoring import restored
from weft.lab.subjects import installed
from weft.lab.trial import Among, Arm, Rates, Subject, Trial
from weft.lab.tuning import gained, untouched
from weft.lab.verdicts import Claim, Finding, finding, overall
from weft.store.cache import Cache, default

Steps = Sequence[tuple[str, Mapping[str, Any]]]
"""Methods with their options, one after another."""
Merge = tuple[str, Mapping[str, Any]]
"""A merge, or a probe, with its options."""
Run = Callable[[Trial], Arm]
SEEDS = 3
"""A claim is tried on at least this many."""


class Lab:
    """Where claims are tried: lab models, their texts and a cache, so that what two claims share is computed once."""

    def __init__(
        self,
        subjects: Sequence[Subject] | None = None,
        *,
        cache: Cache | None = None,
        seeds: int = SEEDS,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        """`subjects`: the lab models, if not those installed. `rates`: what earlier proofs found. Errors: OptionError for too few seeds."""
        if seeds < SEEDS:
            raise OptionError("too few seeds", where="seeds", got=seeds, want=f"at least {SEEDS}", fix="use more seeds")
        held = cache or Cache(default())
        code = code_version("lab", "learn")
        here = subjects if subjects is not None else installed()
        self.trials = {s.name: Trial.seeds(s, seeds, held, code, Rates(rates or {})) for s in here}

    def only(self, model: str) -> Lab:
        """The same lab with one of its models. Errors: ConflictError if it is not in this lab."""
        return self._with({model} & set(self.trials), model)

    def without(self, models: Collection[str], where: str) -> Lab:
        """The same lab with models left out. Errors: ConflictError if none is left."""
        return self._with(set(self.trials) - set(models), where)

    def _with(self, models: Collection[str], where: str) -> Lab:
        if not models:
            got = f"a lab of {', '.join(self.trials)}"
            want = "a model that the claim is about, and known answers hold on"
            fix = "weft prove --known tells what holds; --model chooses others"
            raise ConflictError("no lab model is left for this claim", where=where, got=got, want=want, fix=fix)
        made = copy(self)
        made.trials = {name: trials for name, trials in self.trials.items() if name in models}
        return made

    def compare(
        self,
        *,
        ours: Steps,
        baseline: Steps,
        floor: Steps | None = None,
        factor: float = 1.0,
        at: Sequence[str] = ("*",),
    ) -> Claim:
        """Holds if `ours` is less than `factor` times as far from the original as `baseline`, and nearer than `floor`.

        Each chain rewrites every Linear but the output head, of these those that match `at`, from dense evidence; distances are
        on held-out texts.
        """
        given = {"ours": ours, "baseline": baseline} | ({"floor": floor} if floor is not None else {})
        chains = {arm: _chain(steps) for arm, steps in given.items()}
        runs = {arm: partial(Trial.rewritten, chain=c, at=at) for arm, c in chains.items()}
        arms = {arm: _describe(c) for arm, c in chains.items()}
        methods = [s.method for c in chains.values() for s in c]
        return self._judge(runs, arms, methods, factor, "less")

    def allocate(
        self,
        *,
        ours: str,
        baseline: str,
        share: float,
        baseline_share: float | None = None,
        among: Among = "roundings",
        **options: Any,
    ) -> Claim:
        """Holds if search `ours`, within `share` of the bytes, leaves the model closer than `baseline` does.

        Both choose among roundings to 2 to 8 bits, within a share of the bfloat16 bytes, or among sparsities by `wanda`, within
        a share of the model's own. `baseline_share`: another budget for the baseline. `options` are those of `ours`.
        """
        given = {"ours": (Step.of(ours, **options), share), "baseline": (Step.of(baseline), baseline_share or share)}
        runs = {arm: partial(Trial.allocated, search=step, share=b, among=among) for arm, (step, b) in given.items()}
        of = "bfloat16" if among == "roundings" else "the model"
        arms = {arm: f"{step.describe()} within {b:.0%} of {of}" for arm, (step, b) in given.items()}
        return self._judge(runs, arms, [ours, baseline, "rtn" if among == "roundings" else "wanda"], 1.0, "less")

    def tune(self, *, ours: Steps, baseline: Steps, share: float) -> Claim:
        """Holds if what `ours` makes trainable gains, on another domain, at least `share` of what `baseline` gains.

        The gain is the untuned score minus the tuned one on test documents; it has to be one. Both arms take the same
        steps and choose from the same learning rates. Rewrites of weights go to every Linear but the output head, other
        methods to all that they are for.
        """
        runs, arms, methods = _both(gained, ours, baseline)
        return self._judge({**runs, "floor": untouched}, arms | {"floor": "untuned"}, methods, share, "more")

    def probe(self, *, ours: Steps, baseline: Steps, probe: Merge, number: str, against: Merge | None = None) -> Claim:
        """Holds if a probe's number, over weights, is larger after tuning `ours` than after `baseline`, which gains no less.

        The arm that gains more at its best rate takes fewer steps, until it gains what the other does. `against`: another probe for it.
        """
        ours_, theirs = _chain(ours), _chain(baseline)
        look, other = (Step.of(p[0], **p[1]) for p in (probe, against or probe))
        runs: dict[str, Run] = {
            "ours": partial(probed, chain=ours_, other=theirs, below=True, probe=look, number=number),
            "baseline": partial(probed, chain=theirs, other=ours_, below=False, probe=other, number=number),
        }
        arms = {"ours": _describe(ours_), "baseline": _describe(theirs), "probe": f"{number}, by {look.describe()}"}
        arms |= {"probe of the baseline": other.describe()} if against else {}
        methods = [s.method for s in (*ours_, *theirs, look)]
        return self._judge(runs, arms, methods, 1.0, "more")

    def halfway(self, *, probe: tuple[str, Mapping[str, Any]], number: str) -> Claim:
        """Holds if another domain is predicted better half way to a tuned model where a probe chose weights to keep little of their change.

        These are the tenth whose number is largest, and what they keep is a tenth; the baseline is half way everywhere. On lab models that
        write text. Errors: ConflictError if there is none.
        """
        look = Step.of(probe[0], **probe[1])
        runs: dict[str, Run] = {
            "ours": partial(halfway, probe=look, number=number),
            "baseline": partial(halfway, probe=None, number=number),
        }
        arms = {"ours": f"trimmed by {number} of {look.describe()}", "baseline": "half way everywhere"}
        return self._writers()._judge(runs, arms, [look.method, "full", "task_arithmetic", "ties"], 1.0, "less")

    def decode(self, *, ours: Mapping[str, Any], baseline: Mapping[str, Any], factor: float) -> Claim:
        """Holds if `generate`, told `ours`, changes less than `factor` times the tokens of greedy decoding that it changes told `baseline`.

        On lab models that write text. Errors: ConflictError if there is none.
        """
        lab = self._writers()
        given = {"ours": ours, "baseline": baseline}
        runs: dict[str, Run] = {arm: partial(changed, how=how) for arm, how in given.items()}
        arms = {arm: ", ".join(f"{k}={v}" for k, v in how.items()) for arm, how in given.items()}
        return lab._judge(runs, arms, [], factor, "less")

    def read(self, *, ours: Steps) -> Claim:
        """Holds if long texts are predicted better where what `ours` makes trainable learns each chunk after it was read, window alike.

        On lab models that write text. Errors: ConflictError if there is none.
        """
        lab, chain = self._writers(), _chain(ours)
        runs: dict[str, Run] = {
            arm: partial(read, chain=chain, learns=learns) for arm, learns in (("ours", True), ("baseline", False))
        }
        arms = {"ours": f"{_describe(chain)}, learning", "baseline": "the window alone"}
        return lab._judge(runs, arms, [s.method for s in chain], 1.0, "less")

    def restore(self, *, ours: Steps, baseline: Steps) -> Claim:
        """Holds if `ours`, tuned for a few steps on texts like those that distances are measured on, ends nearer to the original.

        Both arms choose from the same learning rates by distances; one in which nothing trains is as it is.
        """
        return self._judge(*_both(restored, ours, baseline), 1.0, "less")

    def reword(self, *, ours: Steps, baseline: Steps) -> Claim:
        """Holds if what `ours` makes trainable gains, on wordings of prompts that it never saw, at least what `baseline` gains.

        The model has learnt the task in reference words before; the arms train on other wordings, at the best of the same rates.
        """
        lab, (runs, arms, methods) = self.only(multitask.MODEL), _both(rewording.gained, ours, baseline)
        runs, arms = {**runs, "floor": rewording.nothing}, arms | {"floor": "no adapter"}
        return lab._judge(runs, arms, methods, 1.0, "more")

    def recall(self, *, ours: Steps, baseline: Steps) -> Claim:
        """Holds if what `ours` makes trainable gains more than `baseline` on tokens behind the window, and more than nothing.

        A model reads texts a segment at a time; only a branch may carry something from one to the next. Both arms take the same steps on
        the same tokens and choose from the same learning rates. On lab models that write text. Errors: ConflictError if there is none.
        """
        lab, (runs, arms, methods) = self._writers(), _both(recalled, ours, baseline)
        runs, arms = {**runs, "floor": forgotten}, arms | {"floor": "untuned"}
        return lab._judge(runs, arms, methods, 1.0, "more")

    def _writers(self) -> Lab:
        """The same lab with the models that write text."""
        return self._with({n for n, trials in self.trials.items() if not trials[0].subject.embeds}, "a decoder")

    def merge(
        self,
        *,
        ours: Merge,
        baseline: Merge | Literal["mean", "best"],
        members: merging.Members,
        share: float = 1.0,
        count: int | None = None,
        tuned: Steps = (),
        search: Literal["greedy", "cma"] | None = None,
        smoothing: float = 0.0,
        noisy: bool = False,
    ) -> Claim:
        """Holds if merge `ours` gains, on the members' tasks, at least `share` of what `baseline` gains, and more than nothing.

        Members are tuned from the lab model, all linear layers of it or what `tuned` makes trainable: on different tasks, on mixtures
        of all but one, on names and on texts (views), or on one with different seeds or rates; `count` of them. The baseline is another
        merge, the mean member, or the best one, which other examples choose; they also choose the weights of ours where there is a
        `search`. Tasks count alike. `smoothing`: that of the labels on which members of ours alone are tuned. `noisy`: merges are tested on
        prompts with stray characters.
        Errors: ConflictError if no lab model has tasks for such members.
        """
        lab = self._with({n for n in self.trials if merging.able(n, members, count)}, "tasks to merge members of")
        steps = {
            arm: Step.of(m[0], **m[1])
            for arm, m in {"ours": ours, "baseline": baseline}.items()
            if isinstance(m, tuple)
        }

        def on(run: Callable[[Trial, Sequence[merging.Of]], Arm]) -> Run:
            return lambda trial: run(trial, merging.members(trial, members, count))

        way, apart = _chain(tuned), {"search": search, "smoothing": smoothing}
        runs = {
            arm: on(partial(merging.gained, step, way=way, noisy=noisy, **(apart if arm == "ours" else {})))
            for arm, step in steps.items()
        }
        if not isinstance(baseline, tuple):
            runs["baseline"] = on(partial(merging.mean if baseline == "mean" else merging.best, way=way))
        runs["floor"] = on(lambda trial, of: merging.nothing(trial, merging.disturbed(of) if noisy else of))
        arms = {"ours": "", "baseline": f"the {baseline} member", "floor": "untuned"}
        arms |= {arm: f"{step.describe()} of members with other {members}" for arm, step in steps.items()}
        arms |= {arm: f"{said}, tuned by {_describe(way)}" for arm, said in arms.items() if way and arm != "floor"}
        arms |= {"ours": f"{arms['ours']}, their weights by {search}"} if search else {}
        arms |= {"ours": f"{arms['ours']}, labels smoothed by {smoothing:g}"} if smoothing else {}
        return lab._judge(runs, arms, [s.method for s in steps.values()], share, "more")

    def patch(self, *, ours: Merge, baseline: Merge, blocks: float, share: float) -> Claim:
        """Holds if a member that is patched by merge `ours` gains, on noisy prompts of its task, `share` of what `baseline` gives it, and
        more than nothing.

        What patches it was tuned on another task, its prompts noisy, beside a member without noise. Ours goes to the first share of the
        blocks, the baseline to all. Errors: ConflictError if no lab model has two tasks.
        """
        lab = self._with({n for n in self.trials if merging.able(n, "tasks", 2)}, "two tasks to merge members of")
        steps = {arm: Step.of(m[0], **m[1]) for arm, m in {"ours": ours, "baseline": baseline}.items()}
        runs: dict[str, Run] = {
            arm: partial(merging.patched, step=step, share=blocks if arm == "ours" else 1.0)
            for arm, step in steps.items()
        }
        runs["floor"] = merging.unpatched
        arms = {"ours": f"{steps['ours'].describe()} in {blocks:.0%} of the blocks", "floor": "unpatched"}
        arms["baseline"] = f"{steps['baseline'].describe()} in all blocks"
        return lab._judge(runs, arms, [s.method for s in steps.values()], share, "more")

    @property
    def tasks(self) -> str:
        """What `multitask` trains at once, with commas."""
        return ",".join(multitask.TASKS)

    @property
    def new_task(self) -> str:
        """The task that comes later."""
        return multitask.NEW

    def multitask(self, *, ours: Steps, baseline: Steps, share: float, before: Steps = ()) -> Claim:
        """Holds if what `ours` makes trainable gains, on a mixture of tasks, at least `share` of what `baseline` gains.

        Chains that name adapters as tasks train by task, others one adapter for all. With `before`, that was trained on the mixture, in
        both arms, and the arms learn a new task from few examples. Both choose from the same learning rates.
        Errors: ConflictError if no lab model has several tasks.
        """
        chains, first = {"ours": _chain(ours), "baseline": _chain(baseline)}, _chain(before)
        runs: dict[str, Run] = {a: partial(multitask.gained, chain=c, before=first) for a, c in chains.items()}
        after = f" after {_describe(first)}" if first else ""
        arms = {arm: _describe(c) + after for arm, c in chains.items()} | {"floor": "untuned"}
        methods = [s.method for c in (*chains.values(), first) for s in c]
        floor = partial(multitask.nothing, new=bool(first))
        return self.only(multitask.MODEL)._judge({**runs, "floor": floor}, arms, methods, share, "more")

    def _judge(
        self,
        runs: Mapping[str, Run],
        arms: dict[str, str],
        methods: Sequence[str],
        factor: float,
        side: Literal["less", "more"],
    ) -> Claim:
        found: list[Finding] = []
        for trials in self.trials.values():
            trials[0].rates.used.clear()
            made = {arm: [run(t) for t in trials] for arm, run in runs.items()}
            found.append(finding(trials[0], made, factor, side))
        rule = f"ours {'<' if side == 'less' else '>='} {'' if factor == 1 else f'{factor:g} x '}baseline"
        if "floor" in runs:
            rule += f" and ours {'<' if side == 'less' else '>'} floor"
        used = {n: get(n).fingerprint() for n in methods}
        seeds = len(next(iter(self.trials.values())))
        return Claim(overall([f.verdict for f in found]), rule, arms, used, seeds, tuple(found))


def _both(run: Callable[..., Arm], ours: Steps, baseline: Steps) -> tuple[dict[str, Run], dict[str, str], list[str]]:
    """Of two chains, what runs each, what is said of it, and their methods."""
    chains = {"ours": _chain(ours), "baseline": _chain(baseline)}
    runs: dict[str, Run] = {arm: partial(run, chain=c) for arm, c in chains.items()}
    return runs, {arm: _describe(c) for arm, c in chains.items()}, [s.method for c in chains.values() for s in c]


def _chain(steps: Steps) -> Chain:
    return tuple(Step.of(name, **options) for name, options in steps)


def _describe(chain: Chain) -> str:
    return " then ".join(s.describe() for s in chain)
