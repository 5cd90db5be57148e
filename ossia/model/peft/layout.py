"""How a file holds the adapters of experts: told from its keys, its shapes and what it says itself, and made ours.

PEFT's format names no layout. These exist; each was read in the code that writes it, and run (tests/golden/adapters/):

| layout | B's columns, A's rows | written by | told by |
|---|---|---|---|
| rank-major | B (out, r E), expert fastest; A (E r, in) | PEFT, Ossia, Unsloth from 2026.9.6 | nothing else fits |
| expert-major | B (out, E r), rank fastest; A (E r, in) | Unsloth 2026.2 to 2026.9.5 | nothing, see below |
| the same, transposed | in and out the other way round | PEFT 0.19.0 on transformers 5, from 0.19.1 on 4 | shapes |
| listed | a pair for each expert, `experts.gate_up_projs.3` | Unsloth's 4-bit experts | keys |
| apart | a pair for each expert, `experts.3.gate_proj` and `.up_proj` | Tinker's cookbook | keys |

Both orders of B have one shape, a square matrix has one shape both ways round, and Unsloth marks its files only since
2026.9.6: where nothing decides, it is an error that names the readings, never a guess.
Letters: E experts, r rank, O out, D in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from ossia.errors import AdapterError
from ossia.model.arch import Arch
from ossia.model.lora import LoraSpec, Site, sites
from ossia.model.peft.config import Form, PeftConfig
from ossia.model.weights import split_gate_up

PREFIX = "base_model.model."

LayoutName = Literal["rank-major", "expert-major", "rank-major-transposed", "expert-major-transposed"]
LAYOUTS: Mapping[LayoutName, str] = {
    "rank-major": "as PEFT has it today",
    "expert-major": "as Unsloth before 2026.9.6 trained it",
    "rank-major-transposed": "as PEFT 0.19.0 wrote it, and later ones on transformers 4",
    "expert-major-transposed": "as Unsloth before 2026.9.6 trained it on such a PEFT",
}
_UNSLOTH_ORDERS = {"rank_major": False, "grouped_by_expert": True}
_UNSLOTH_FLAT, _UNSLOTH_DETAIL = "lora_B_layout", "unsloth_fused_expert_lora"


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to store experts; what isn't an expert is stored alike everywhere.

    expert_major  the targets whose B has its columns expert after expert
    """

    form: Form = "stacked"
    transposed: bool = False
    expert_major: frozenset[str] = frozenset()

    def __str__(self) -> str:
        """In words, for whoever reads the adapter."""
        if self.form == "listed":
            return "one pair of tensors for each expert, as Unsloth's 4-bit experts have it"
        if self.form == "apart":
            return "one pair of tensors for each expert, gate and up by themselves, as Tinker's cookbook has it"
        of = f" (of {', '.join(sorted(self.expert_major))})" if self.expert_major else ""
        return f"{self.name}{of}, {LAYOUTS[self.name]}"

    @property
    def name(self) -> LayoutName:
        """What the user calls it, where experts are stacked."""
        if self.transposed:
            return "expert-major-transposed" if self.expert_major else "rank-major-transposed"
        return "expert-major" if self.expert_major else "rank-major"


@dataclass(frozen=True, slots=True)
class Stored:
    """One adapted matrix in a file: the names and shapes of its tensors there, and how they become our A and B."""

    site: Site
    shapes: Mapping[str, tuple[int, ...]]
    convert: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]


# --- what a file holds in a layout ------------------------------------------------------------------------------------


def stem(site: Site, targets: Mapping[str, tuple[int, float]]) -> str:
    """The name of a site's tensors in a file that stacks experts, up to `.lora_A.weight`."""
    if site.num_experts is None:
        return PREFIX + site.module
    owner = site.module.removesuffix(f".{site.target}")
    inner = site.target == "gate_up_proj" and "down_proj" in targets
    return f"{PREFIX}{owner}.base_layer" if inner else PREFIX + owner


def stored(site: Site, spec: LoraSpec, layout: Layout) -> Stored:
    """A site as a file of this layout holds it."""
    rank, num_experts = spec.targets[site.target][0], site.num_experts
    if num_experts is None:
        return _pairs(site, [stem(site, spec.targets)], rank, site.fan_in, site.fan_out, tuple)
    owner = PREFIX + site.module.removesuffix(f".{site.target}")
    if layout.form == "listed":
        stems = [f"{owner}.{site.target}s.{expert}" for expert in range(num_experts)]
        return _pairs(site, stems, rank, site.fan_in, site.fan_out, partial(_from_list, site))
    if layout.form == "apart" and site.target == "gate_up_proj":
        stems = [f"{owner}.{expert}.{part}_proj" for part in ("gate", "up") for expert in range(num_experts)]
        return _pairs(site, stems, rank // 2, site.fan_in, site.fan_out // 2, _from_gate_and_up)
    if layout.form == "apart":
        stems = [f"{owner}.{expert}.{site.target}" for expert in range(num_experts)]
        return _pairs(site, stems, rank, site.fan_in, site.fan_out, partial(_from_list, site))
    ins, outs = (site.fan_out, site.fan_in) if layout.transposed else (site.fan_in, site.fan_out)
    convert = partial(_from_stack, site, layout)
    return _pairs(site, [stem(site, spec.targets)], rank * num_experts, ins, outs, convert)


def _pairs(
    site: Site,
    stems: Sequence[str],
    rank: int,
    ins: int,
    outs: int,
    convert: Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]],
) -> Stored:
    """Every A, then every B."""
    shapes = {f"{stem}.lora_A.weight": (rank, ins) for stem in stems}
    return Stored(site, shapes | {f"{stem}.lora_B.weight": (outs, rank) for stem in stems}, convert)


def _from_stack(site: Site, layout: Layout, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    a, b = tensors
    first_Er = a.unflatten(0, (site.num_experts, -1))
    if site.target in layout.expert_major:
        second_E_r = b.unflatten(1, (site.num_experts, -1)).permute(1, 0, 2)
    else:
        second_E_r = b.unflatten(1, (-1, site.num_experts)).permute(2, 0, 1)
    if layout.transposed:
        first_Er, second_E_r = second_E_r.transpose(1, 2), first_Er.transpose(1, 2)
    return first_Er.contiguous(), _gate_first(site, second_E_r)


def _from_list(site: Site, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    half = len(tensors) // 2
    return torch.stack(tuple(tensors[:half])), _gate_first(site, torch.stack(tuple(tensors[half:])))


def _from_gate_and_up(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Two adapters of rank r on the halves of a matrix are one of rank 2r on the whole of it."""
    quarter = len(tensors) // 4
    gate_a, up_a, gate_b, up_b = (torch.stack(tuple(tensors[n * quarter : (n + 1) * quarter])) for n in range(4))
    none = torch.zeros_like(gate_b)
    gate_EOr, up_EOr = torch.cat((gate_b, none), dim=2), torch.cat((none, up_b), dim=2)
    return torch.cat((gate_a, up_a), dim=1), torch.cat((gate_EOr, up_EOr), dim=1)


def _gate_first(site: Site, b_EOr: Tensor) -> Tensor:
    return (split_gate_up(b_EOr) if site.target == "gate_up_proj" else b_EOr).contiguous()


# --- which layout a file has ------------------------------------------------------------------------------------------


def form_of(names: Sequence[str]) -> Form:
    """How experts are named in a file."""
    experts = [name.partition(".mlp.experts.")[2] for name in names if ".mlp.experts." in name]
    if any(name.startswith(("gate_up_projs.", "down_projs.")) for name in experts):
        return "listed"
    return "apart" if any(name[:1].isdigit() for name in experts) else "stacked"


@dataclass(frozen=True, slots=True)
class Found:
    """What a file says for itself: its tensors' shapes, and its config."""

    file: str
    shapes: Mapping[str, tuple[int, ...]]
    config: PeftConfig


def find_layout(found: Found, arch: Arch, spec: LoraSpec, said: LayoutName | None) -> Layout:
    """The layout of a file's experts.

    said    by the user, for a file that can be read in two ways
    Raises  AdapterError naming the readings where nothing decides; for `said` against what the file says
    """
    form = form_of(list(found.shapes))
    experts = [site for site in sites(arch, spec) if site.num_experts is not None]
    if form != "stacked" or not experts:
        if said is not None:
            what = "stores experts one by one" if experts else "adapts no experts"
            raise AdapterError(f"{found.file}: {what}, so it has one reading; leave --adapter-layout {said} out")
        return Layout(form)
    fitting = [turned for turned in (False, True) if _fits(found, experts, spec, Layout(transposed=turned))]
    marked = _marked(found, spec, arch)
    if said is not None:
        return _as_said(found, said, fitting, marked, spec)
    if len(fitting) == 2 and not _may_be_transposed(found):
        fitting = [False]
    unclear = {target for target in marked if marked[target] is None} if _from_unsloth(found.config) else set()
    known = frozenset(target for target, order in marked.items() if order)
    orders = [known, known | unclear] if unclear else [known]
    readings = [Layout("stacked", *one) for one in product(fitting or [False], orders)]
    if len(readings) > 1:
        raise _two_readings(found.file, readings)
    return readings[0]


def _fits(found: Found, experts: Sequence[Site], spec: LoraSpec, layout: Layout) -> bool:
    wanted = [item for site in experts for item in stored(site, spec, layout).shapes.items()]
    return all(found.shapes.get(name) == shape for name, shape in wanted)


def _marked(found: Found, spec: LoraSpec, arch: Arch) -> dict[str, bool | None]:
    """Of each target on experts: whether its B is expert-major; None where the file doesn't say."""
    targets = [target for target in ("gate_up_proj", "down_proj") if target in spec.targets]
    config = found.config.config
    places = [config, config.get("auto_mapping")]
    marks: dict[str, object] = {}
    for place in reversed([place for place in places if isinstance(place, dict)]):
        detail = place.get(_UNSLOTH_DETAIL)
        parameters = detail.get("parameters") if isinstance(detail, dict) else None
        if place.get(_UNSLOTH_FLAT) is not None:
            marks |= dict.fromkeys(targets, place[_UNSLOTH_FLAT])
        if isinstance(parameters, dict):
            marks |= {name: one.get(_UNSLOTH_FLAT) for name, one in parameters.items() if isinstance(one, dict)}
    orders: dict[str, bool | None] = {}
    for target in targets:
        one_order = spec.targets[target][0] == 1 or arch.num_experts == 1  # both readings are the same
        if one_order or marks.get(target) is None:
            orders[target] = False if one_order else None
        elif str(marks[target]) in _UNSLOTH_ORDERS:
            orders[target] = _UNSLOTH_ORDERS[str(marks[target])]
        else:
            raise AdapterError(
                f"{found.config.where}: `{_UNSLOTH_FLAT}` of {target} is {marks[target]!r}; allowed: "
                f"{', '.join(_UNSLOTH_ORDERS)}. Merge it with the program that wrote it and name the merged model"
            )
    return orders


def _from_unsloth(config: PeftConfig) -> bool:
    mapping = config.config.get("auto_mapping")
    return isinstance(mapping, dict) and bool(mapping.get("unsloth_fixed"))


def _may_be_transposed(found: Found) -> bool:
    """Whether it may come from a PEFT that turns parameters round: 0.19 or later, which leaves its version there.
    PEFT 0.17 and Ossia leave none."""
    version = found.config.config.get("peft_version")
    parts = version.split(".")[:2] if isinstance(version, str) else []
    if len(parts) < 2 or not all(part.isdigit() for part in parts):
        return False
    return tuple(map(int, parts)) >= (0, 19)


def _as_said(
    found: Found, said: LayoutName, fitting: list[bool], marked: Mapping[str, bool | None], spec: LoraSpec
) -> Layout:
    if said not in LAYOUTS:
        raise AdapterError(f"--adapter-layout {said}: no such layout; allowed: {', '.join(LAYOUTS)}")
    transposed, expert_major = said.endswith("-transposed"), said.startswith("expert-major")
    why = ""
    if fitting and transposed not in fitting:
        why = f"by their shapes its tensors are {'not ' if transposed else ''}transposed"
    elif clash := [t for t, order in marked.items() if order is not None and order != expert_major and _ranks(spec, t)]:
        why = f"its {found.config.where} says that {clash[0]} is {'expert' if marked[clash[0]] else 'rank'}-major"
    if why:
        raise AdapterError(f"{found.file}: {why}, not {said}; leave --adapter-layout out")
    majors = frozenset(t for t, order in marked.items() if (expert_major if order is None else order))
    return Layout("stacked", transposed, majors)


def _ranks(spec: LoraSpec, target: str) -> bool:
    return spec.targets[target][0] > 1


def _two_readings(file: str, readings: Sequence[Layout]) -> AdapterError:
    names = [reading.name for reading in readings]
    return AdapterError(
        "\n  ".join(
            [
                f"{file}: its experts can be read in {len(names)} ways, and nothing in it says which",
                *(f"{name}: {LAYOUTS[name]}" for name in names),
                "next: say it once, and make it an adapter in today's layout:",
                f"  ossia export MODEL --adapter ADAPTER --adapter-layout {names[-1]} --to peft --output NEW",
                "the wrong one is no better than an untrained adapter: compare held-out losses if you don't know",
            ]
        )
    )
