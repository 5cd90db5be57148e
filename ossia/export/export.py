"""Export, top to bottom: open the source, write it, read it back, compare it, and only then give it its name.

One entry of `_FORMATS` a folder that `Checkpoint.open` makes a model of again; beside them GGUF, a file, and the
adapter alone: PEFT's folder, or a GGUF LoRA.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ossia.config import RECIPE_IN_RUN, load_recipe
from ossia.data.pack import Pack
from ossia.disk import sync_to_disk
from ossia.errors import CheckpointError, DataError, Interrupted, MissingExtraError, StoppedError, UserError
from ossia.export.merge import Changes, write_merged
from ossia.export.source import Source, identity_of, open_source
from ossia.export.verify import (
    TOKENS_BY_LAYER,
    TOKENS_EACH,
    Agreement,
    PassingWeights,
    changed_model,
    compare,
    cost_by_layer,
    fixed_texts,
    held_out_texts,
)
from ossia.harmony import Vocabulary
from ossia.model.arch import Layout
from ossia.model.checkpoint import Checkpoint
from ossia.model.lora import Lora
from ossia.model.peft import LayoutName, load_adapter, save_adapter
from ossia.model.transformer import Transformer
from ossia.pieces import Journal
from ossia.pieces import Progress as Report

_FORMATS: dict[str, Layout] = {"hf-bf16": "bf16", "hf-mxfp4": "mxfp4"}
_FILES = ("gguf", "gguf-lora")
# How far an export may be from what was trained: KL divergence in nats, mean over the positions compared. A share of
# what training changed, between what rounding alone does to untrained routers and what nobody should deploy.
MAX_SHARE = 0.05
MIN_KL, MAX_KL = 0.002, 0.02
MIN_KL_ROUNDED = 0.01  # eight or four bits a weight cost more than bfloat16's rounding

_WRITTEN = "written; reading it back"
_WHEN_ROUNDED = "train with `qat: mxfp4` (docs/export.md), which learns to live with the rounding, or write hf-bf16"
_WHEN_NOT = "check that the base model is the one it was trained on, or try an earlier checkpoint"


def export_model(
    source: str,
    *,
    to: str,
    output: Path,
    adapter: str | None = None,
    adapter_layout: LayoutName | None = None,
    gguf_type: str | None = None,
    tokenizer: Path | None = None,
    max_kl: float | None = None,
    of_ranks: bool = False,
) -> Path:
    """Write a model as other programs load it, verified by reading it back.

    source     a run folder, or a model (a checkpoint's folder, or owner/name on the hub); for hf-bf16 and hf-mxfp4 a
               GGUF file of a gpt-oss too
    to         hf-bf16: a Hugging Face folder with everything merged, in bfloat16; hf-mxfp4: the same with experts in
               MXFP4, their own bytes where they weren't trained, else rounded; gguf: a file for llama.cpp, MXFP4
               experts that weren't trained as they are, the rest merged; peft: the adapter alone, as `peft` and vLLM
               load it; gguf-lora: the adapter alone as a file for llama.cpp
    output     a folder, for gguf and gguf-lora a file, that isn't there yet
    adapter    of a model: a run folder or an adapter's folder
    adapter_layout  how that one's experts are stored, where its file can be read in two ways: see `load_adapter`
    gguf_type  of gguf: what matrices are written as, "bf16" (None), "f16", "q8_0" or "f32"
    tokenizer  of a GGUF file: a checkpoint's folder or a tokenizer.json to take instead of the file's own
    max_kl     how far from what was trained it may be, nats, instead of the bound of `verify_export`
    of_ranks   of a run the newest whole checkpoint that several ranks have written, whatever else it holds
    Returns    the folder or file
    Raises     UserError for what can't be exported; CheckpointError if what was written isn't the model that
               was trained, see `verify_export`; MissingExtraError for gguf without its package. Nothing is left behind
               then. StoppedError where the disk is full: what is whole stays beside `output` under a hidden name, and
               the same call goes on from there, as after a kill or an interruption
    """
    if to not in (*_FORMATS, *_FILES, "peft"):
        raise UserError(f"--to {to}: no such format; allowed: {', '.join((*_FORMATS, *_FILES, 'peft'))}")
    if to != "gguf" and gguf_type is not None:
        raise UserError(f"--gguf-type {gguf_type} is for --to gguf; leave it out")
    if to in _FILES and find_spec("gguf") is None:
        raise MissingExtraError("writing GGUF needs the package gguf: pip install 'ossia[gguf]'")
    output = Path(output).expanduser()
    if output.exists() and (to in _FILES or not output.is_dir() or any(output.iterdir())):
        what = "name a new file" if to in _FILES else "name a new folder"
        raise CheckpointError(f"{output} exists already; {what} or remove it first")
    unverified = output.absolute().with_name(f".{output.name}.unverified")
    if to in _FILES and not unverified.parent.is_dir():
        raise CheckpointError(f"{unverified.parent} is no folder; make it first, or name another --output")
    if Path(source).suffix == ".gguf":
        if adapter is not None or adapter_layout is not None:
            raise UserError(f"{source} takes no --adapter; make a folder of it first, and put the adapter on that")
        _export_from_gguf(unverified, Path(source).expanduser(), output, to, tokenizer, max_kl)
        return output
    if tokenizer is not None:
        raise UserError("--tokenizer is for a GGUF file; any other model brings its own: leave it out")
    opened = open_source(source, adapter, _say, adapter_layout, of_ranks=of_ranks)
    with _kept_if_stopped(unverified, opened.identity(to=to, gguf_type=gguf_type)) as journal:
        if to == "peft":
            _export_adapter(unverified, opened, source)
        elif to == "gguf":
            _export_gguf(journal, opened, output.stem, gguf_type or "bf16", max_kl)
        elif to == "gguf-lora":
            _export_gguf_lora(unverified, opened, output.stem, source, max_kl)
        else:
            _export_folder(journal, opened, _FORMATS[to], max_kl)
        _name(unverified, output)
    return output


def merge_shards(run: Path, *, to: str | None = None, output: Path | None = None, max_kl: float | None = None) -> Path:
    """Write the newest whole checkpoint of a run whose weights were cut over ranks as a Hugging Face folder.

    to      hf-bf16 or hf-mxfp4; None: as the run's own result, bf16, or with `qat` what that rounds to
    output  None: RUN/merged
    The rest as `export_model`
    """
    if not (run / RECIPE_IN_RUN).is_file():
        raise UserError(f"{run}: no run folder, it holds no {RECIPE_IN_RUN}; name the `output` of the recipe")
    rounded = load_recipe(run / RECIPE_IN_RUN).qat is not None
    to = to or ("hf-mxfp4" if rounded else "hf-bf16")
    return export_model(str(run), to=to, output=output or run / "merged", max_kl=max_kl, of_ranks=True)


def _name(unverified: Path, output: Path) -> None:
    """Give an export its name. Raises StoppedError where something has taken that meanwhile."""
    try:
        if output.is_file():  # which the system would replace without a word
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        unverified.rename(output.absolute())
    except OSError as error:
        raise StoppedError(
            f"{output}: can't be named so: {error.strerror}\n"
            f"  kept: the verified export, {unverified}\n"
            "  next: remove what is there, and run the same command again"
        ) from error
    sync_to_disk(output.absolute().parent)


@contextmanager
def _kept_if_stopped(path: Path, identity: dict[str, str]) -> Iterator[Journal]:
    """The journal of a hidden place: both stay for the next try where a full disk or the user stopped the export."""
    with Journal.open(path, identity, _say) as journal:
        try:
            yield journal
        except StoppedError:
            raise
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; every tensor that is whole is kept in {path}\n"
                "  next: the same command goes on from there"
            ) from None
        except UserError:
            journal.remove(and_target=True)
            raise
        journal.remove(and_target=False)


def _export_folder(journal: Journal, source: Source, layout: Layout, max_kl: float | None) -> None:
    base, changes = source.base, source.changes
    with _bar() as report:
        write_merged(journal.target, base, changes, base.path, layout, report, journal.remark, journal)
    errors = journal.remarks
    rounded = bool(errors) and not changes.qat
    _say(_WRITTEN)
    if errors:
        _tell_rounding(source, journal.target, errors)
    verify_export(source, journal.target, _say, rounded=rounded, max_kl=max_kl)


def _export_from_gguf(
    target: Path, path: Path, output: Path, to: str, tokenizer: Path | None, max_kl: float | None
) -> None:
    """A GGUF file as a folder, compared with the file itself."""
    if to not in _FORMATS:
        raise UserError(f"--to {to}: of a GGUF file Ossia writes a folder alone; allowed: {', '.join(_FORMATS)}")
    if find_spec("gguf") is None:
        raise MissingExtraError("reading GGUF needs the package gguf: pip install 'ossia[gguf]'")
    from ossia.export.gguf.back import arch_of, require_readable, write_folder
    from ossia.export.gguf.file import GgufFile
    from ossia.export.gguf.read import gguf_model

    file, layout = GgufFile.open(path), _FORMATS[to]
    arch, unread = arch_of(file)
    require_readable(file, layout)
    _say(
        "a GGUF file can't say these, so they are gpt-oss's own: sliding and full layers in turn, "
        f"swiglu_limit {arch.swiglu_limit:g}, swiglu_alpha {arch.swiglu_alpha:g}, rope_scaling.truncate false"
    )
    if unread:
        _say(f"mind: not read, because gpt-oss has no such thing: {', '.join(unread)}")
    with _kept_if_stopped(target, identity_of(path, [path], to=to, tokenizer=str(tokenizer))) as journal:
        with _bar() as report:
            write_folder(journal, file, arch, layout, tokenizer=tokenizer, note=journal.remark, progress=report)
        if journal.remarks:
            worst = max(journal.remarks, key=journal.remarks.__getitem__)
            share = journal.remarks[worst]
            _say(f"rounded to bfloat16: {len(journal.remarks)} tensors, `{worst}` the most, by {share:.2%} of its norm")
        _say(_WRITTEN)
        folder = Checkpoint.open(target)
        packs = fixed_texts(Vocabulary.from_file(target))
        (found,) = compare(gguf_model(path, folder), [changed_model(PassingWeights(folder))], packs)
        _say(f"read back and compared with the GGUF file, on fixed texts: {found}")
        allowed = MIN_KL if max_kl is None else max_kl
        if not found.kl <= allowed:
            raise CheckpointError(
                f"the folder isn't the model in the GGUF file: {found}\n"
                f"  allowed: a KL divergence of {allowed:.2e} nats\n"
                "  next: look whether the file is whole, or allow it with --max-kl"
            )
        _name(target, output)


def _tell_rounding(source: Source, folder: Path, errors: Mapping[str, float]) -> None:
    """What it cost to round experts to MXFP4, a line a layer: of its weights, and of the answers where it alone is
    rounded."""
    if source.base.layout == "bf16":
        _say(f"{source.base.path}: its experts are in bf16, so all of them are rounded to MXFP4, trained or not")
    if source.changes.qat:
        _say("experts are written as training computed them (`qat: mxfp4`): rounding them costs nothing more")
        return
    _, packs = _texts_of(source, TOKENS_BY_LAYER)
    trained = changed_model(PassingWeights(source.base), source.changes)
    costs = cost_by_layer(trained, changed_model(PassingWeights(Checkpoint.open(folder))), packs)
    _say(
        "experts rounded to MXFP4: how far they are from what they were merged to (relative error of the weights), "
        "and the KL divergence, in nats, of what was trained with this layer alone as it is written:"
    )
    for layer, kl in enumerate(costs):
        prefix = f"model.layers.{layer}.mlp.experts."
        found = {name.removeprefix(prefix): error for name, error in errors.items() if name.startswith(prefix)}
        weights = ", ".join(f"{name} {error:.2%}" for name, error in found.items())
        _say(f"  layer {layer}: {weights}; KL {kl:.2e}")


def _export_gguf(journal: Journal, source: Source, name: str, kind: str, max_kl: float | None) -> None:
    from ossia.export.gguf.read import gguf_model
    from ossia.export.gguf.write import write_gguf

    path = journal.target
    with _bar() as report:
        write_gguf(journal, source.base, source.changes, name=name, dense=kind, progress=report)
    _say(_WRITTEN)
    min_kl = MIN_KL_ROUNDED if kind == "q8_0" else MIN_KL
    _judge(source, gguf_model(path, source.base), _say, min_kl, max_kl, _WHEN_NOT)
    _tell_of_yarn(source)


def _tell_of_yarn(source: Source) -> None:
    if not source.base.arch.rope_truncate:
        _say(
            "mind: llama.cpp rounds YaRN's range outwards, which no key of a GGUF file turns off; "
            "its logits differ a little from these, more at later positions"
        )


def _export_gguf_lora(path: Path, source: Source, name: str, given: str, max_kl: float | None) -> None:
    from ossia.export.gguf.lora import folded, read_gguf_lora, write_gguf_lora

    lora = _adapter_of(source, given)
    if factors := folded(lora.spec):
        each = ", ".join(f"{target} by {factor:g}" for target, factor in factors.items())
        _say(f"llama.cpp knows one alpha for a file, so the scaling of these is multiplied into their B: {each}")
    write_gguf_lora(path, source.base, lora, name=name)
    read = Changes(read_gguf_lora(path, source.base.arch), qat=source.changes.qat)
    _say(_WRITTEN)
    _judge(source, read, _say, MIN_KL, max_kl, _WHEN_NOT)
    _tell_of_yarn(source)


def _adapter_of(source: Source, given: str) -> Lora:
    if source.changes.lora is None:
        raise UserError(f"{given} brings no adapter: what is there is a model of its own, for --to hf-bf16 or gguf")
    if source.changes.qat:
        _say("mind: `qat: mxfp4` trained this adapter under rounding, and who loads it alone adds it unrounded")
    return source.changes.lora


def _export_adapter(path: Path, source: Source, given: str) -> None:
    lora, base = _adapter_of(source, given), source.base
    save_adapter(path, lora, base_model=given if source.recipe is None else source.recipe.model)
    read = load_adapter(path, base.arch, torch.device("cpu"), base=base)
    written, found = lora.trainable.tensors, read.trainable.tensors
    if read.spec != lora.spec or not all(torch.equal(found[name], tensor) for name, tensor in written.items()):
        raise CheckpointError(f"{path}: the adapter read back isn't the one that was written; is the disk failing?")
    _say(f"read back and compared with what was trained: {len(written)} tensors, the same bit for bit")


@contextmanager
def _bar() -> Iterator[Report]:
    """A progress bar over bytes where stderr is a terminal."""
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("write")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def verify_export(
    source: Source,
    folder: Path,
    say: Callable[[str], None],
    *,
    rounded: bool = False,
    max_kl: float | None = None,
) -> Agreement:
    """Compare an exported folder with what it was made from, on held-out texts of the run, or else on fixed ones.

    rounded  trained experts were rounded to MXFP4
    Raises   CheckpointError if the folder doesn't open, or its KL divergence from what was trained is over `max_kl`
             nats; None: over MAX_SHARE of that between base and trained, at least MIN_KL (MIN_KL_ROUNDED where
             `rounded`) and at most MAX_KL
    """
    min_kl, next_step = (MIN_KL_ROUNDED, _WHEN_ROUNDED) if rounded else (MIN_KL, _WHEN_NOT)
    exported = changed_model(PassingWeights(Checkpoint.open(folder)))
    return _judge(source, exported, say, min_kl, max_kl, next_step)


def _texts_of(source: Source, tokens_each: int = TOKENS_EACH) -> tuple[str, list[Pack]]:
    """What is compared: held-out texts of the run, or else fixed ones; in words, and as packs."""
    vocab, words = Vocabulary.from_file(source.base.path), "fixed texts"
    if source.recipe is not None:
        try:
            if packs := held_out_texts(source.recipe, vocab, tokens_each):
                return f"{sum(len(pack.sources) for pack in packs)} held-out texts", packs
        except (DataError, MissingExtraError) as error:
            words = f"fixed texts (the run's own can't be read: {str(error).splitlines()[0]})"
    return words, fixed_texts(vocab, tokens_each)


def _judge(
    source: Source,
    exported: Transformer | Changes,
    say: Callable[[str], None],
    min_kl: float,
    max_kl: float | None,
    next_step: str,
) -> Agreement:
    """Raises CheckpointError as `verify_export`, for a model, or for what it changes of the same base."""
    texts, packs = _texts_of(source)
    base = PassingWeights(source.base)
    trained = changed_model(base, source.changes)
    other = changed_model(base, exported) if isinstance(exported, Changes) else exported
    found, before = compare(trained, [other, changed_model(base)], packs)
    say(f"read back and compared with what was trained, on {texts}: {found}")
    allowed = min(max(MAX_SHARE * before.kl, min_kl), MAX_KL) if max_kl is None else max_kl
    if not found.kl <= allowed:  # written so that nan fails it
        raise CheckpointError(
            f"the exported model isn't the one that was trained: {found}\n"
            f"  allowed: a KL divergence of {allowed:.2e} nats, training itself made {before.kl:.2e}\n"
            f"  next: {next_step}, or allow it with --max-kl"
        )
    if source.changes and found.kl > MAX_SHARE * before.kl > 0:  # of the same weights rounding alone leaves 1e-11
        say(
            f"mind: training moved the model by a KL of only {before.kl:.2e} nats, and rounding the weights loses part "
            "of that; an adapter kept apart loses nothing"
        )
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr)
