"""Datasets: Axolotl's prompt strategies as formats of Ossia's, with its column names; and what Harmony's head says."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ossia.axolotl.draft import Draft, Fate
from ossia.axolotl.training import is_grpo
from ossia.config.yaml_lines import KeyPath, dotted
from ossia.harmony.chat import KEYS, THINKING

_EFFORTS = ("low", "medium", "high")
_CHAT = ("chat_template", "chat_template.default", "sharegpt", "sharegpt.load_role")
_FILES = ("json", "parquet", "csv", "text", "arrow")  # names of loaders, with the files in `data_files`
_TEXT = ("completion", "pretrain")
# Which speakers stand for which role, by format.
_ROLES: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "sharegpt": {
            "user": ("human", "user"),
            "assistant": ("gpt", "assistant", "function_call"),
            "system": ("system",),
            "tool": ("tool", "observation"),
        },
        "messages": {name: (name,) for name in ("user", "assistant", "system", "developer", "tool")},
    }
)
_LEFT = (  # what only prompters read that Ossia has no like of
    *("field", "conversation", "input_transform", "input_format", "field_human", "field_model", "logprobs_field"),
    *("temperature", "text_column", "skip", "field_instruction", "field_input", "field_output", "format"),
    *("no_input_format", "system_prompt", "system_format", "field_chosen", "field_rejected"),
)
_OWN_COLUMNS = ("tools", "developer", "system", "reasoning_effort", "current_date")


def map_data(draft: Draft) -> None:
    """`data`, `eval.data` and `harmony`."""
    sources = _sources(draft, "datasets", ("data",)) + _sources(draft, "pretraining_dataset", ("data",))
    tests = [] if is_grpo(draft) else _sources(draft, "test_datasets", ("eval", "data"))
    if is_grpo(draft) and draft.get("test_datasets"):
        draft.skip(("test_datasets",), "`rl.eval_tasks` holds tasks out")
    if sources:
        draft.recipe["data"] = sources
    if tests:
        draft.recipe["eval"] = {"data": tests}
    if any(one.get("format") == "messages" for one in sources):
        names = ", ".join(_OWN_COLUMNS)
        draft.remarks.append(
            f"rows are also read by their columns {names}, where they have such, which Axolotl leaves aside: "
            "`ossia data RECIPE` shows every sample as it is trained"
        )
    _harmony(draft)


def _sources(draft: Draft, key: str, place: KeyPath) -> list[dict[str, Any]]:
    """The sources of one of Axolotl's lists of datasets."""
    given = draft.get(key)
    if given is None:
        return []
    if isinstance(given, str):  # `pretraining_dataset: owner/name`
        if key != "pretraining_dataset":
            draft.refuse((key,), "expected a list of datasets; write `data`")
            return []
        draft.tell((key,), (*place, 0, "path"), given)
        return [{"path": given, "format": "text"}]
    if not isinstance(given, list):
        draft.refuse((key,), "expected a list of sections, each with a `path`; write `data`")
        return []
    found: list[dict[str, Any]] = []
    for number in range(len(given)):
        if isinstance(given[number], dict):
            found += _Source(draft, (key, number), place, len(found)).sources()
        else:
            draft.refuse((key,), "expected a list of sections, each with a `path`; write `data`")
    return found


class _Source:
    """One dataset on its way to one source, or to one for each of its files."""

    def __init__(self, draft: Draft, path: KeyPath, place: KeyPath, number: int) -> None:
        self.draft, self.path, self.place, self.number = draft, path, place, number
        self.values: dict[str, Any] = {}

    def get(self, name: str) -> Any:
        return self.draft.get(*self.path, name)

    def put(self, name: str, key: str, value: Any, words: str = "") -> None:
        """A key of the dataset became `key` of the source, `columns.FIELD` included."""
        section, _, inner = key.partition(".")
        if inner:
            self.values.setdefault(section, {})[inner] = value
        else:
            self.values[section] = value
        where = (*self.place, self.number, *key.split("."))
        self.draft.notes[where] = name.replace("/", ".")
        self.draft.tell((*self.path, *name.split("/")), where, value, words)

    def skip(self, name: str, why: str) -> None:
        self.draft.skip((*self.path, *name.split("/")), why)

    def refuse(self, name: str, instead: str) -> None:
        self.draft.refuse((*self.path, *name.split("/")), instead)

    def sources(self) -> list[dict[str, Any]]:
        paths = self._paths()
        self._format()
        self._messages()
        self._training()
        self._rest()
        first: KeyPath = (*self.place, self.number)
        own = {key[len(first) :]: note for key, note in self.draft.notes.items() if key[: len(first)] == first}
        for offset in range(len(paths)):
            self.draft.notes |= {(*self.place, self.number + offset, *key): note for key, note in own.items()}
        return [{"path": path, **self.values} for path in paths]

    def _paths(self) -> list[str]:
        path, files = self.get("path"), self.get("data_files")
        files = [files] if isinstance(files, str) else files
        key = (*self.place, self.number, "path")
        if not isinstance(path, str) or not path:
            self.draft.remarks.append(f"`{dotted(self.path)}` has no `path`, so it gives no rows")
            self.refuse("type", "a dataset without a `path`; write its source under `data`")
            return []
        self.skip("ds_type", "the file's name says what is in it: .jsonl, .json or .parquet")
        if files and path in _FILES:
            self.draft.notes[key] = "data_files"
            self.draft.tell((*self.path, "data_files"), key, files[0] if len(files) == 1 else list(files))
            self.skip("path", f"`{path}` only says how the files are read")
            return [str(file) for file in files]
        if files:
            self.refuse("data_files", f"download these files of {path} and name them in `path`, or their folder")
        self.draft.notes[key] = "path"
        self.draft.tell((*self.path, "path"), key, path)
        return [path]

    def _format(self) -> None:
        kind = self.get("type")
        if isinstance(kind, dict):
            self._own_prompter(kind)
            return
        name = kind if isinstance(kind, str) else ""
        first = name.partition(":")[0].partition(".")[0]
        if is_grpo(self.draft) and self.place == ("data",):
            if kind is not None:
                self.refuse(
                    "type",
                    f"{name} turns rows into prompts by code; write rows with a `prompt` (text or messages) and the "
                    "columns that the reward takes",
                )
        elif name in _CHAT or (not name and self.get("field_messages")):
            self._chat(name)
        elif first == "alpaca" and "chat" not in name:
            self.put("type", "format", "alpaca", "the columns instruction, input and output, as a Harmony conversation")
        elif first in _TEXT:
            self.put("type", "format", "text", "the whole text is trained, <|endoftext|> ends it")
            column = "text_column" if self.get("text_column") else "field"
            if self.get(column) == "text":
                self.skip(column, "the column that the format reads")
            elif isinstance(self.get(column), str):
                self.put(column, "columns.text", self.get(column))
        elif not name:
            if kind is None:
                self.draft.remarks.append(
                    f"`{dotted(self.path)}` has no `type`: the format is recognised from its rows"
                )
        else:
            self.refuse(
                "type",
                "the recipe has no `format`, so the rows' own is recognised; allowed are messages, sharegpt, alpaca, "
                "prompt (with completion), text, and tokens (ids with weights): turn the rows into one of these",
            )

    def _own_prompter(self, kind: dict[str, Any]) -> None:
        """A prompter written in the config: its columns are those of the format alpaca."""
        self.values["format"] = "alpaca"
        fields = {"instruction": "instruction", "input": "input", "output": "output", "system": "system"}
        for name, field in fields.items():
            column = kind.get(f"field_{name}")
            if column == field:
                self.skip(f"type/field_{name}", "the column that the format alpaca reads")
            elif isinstance(column, str) and column:
                self.put(f"type/field_{name}", f"columns.{field}", column)
        if kind.get("system_prompt"):
            self.put("type/system_prompt", "developer", str(kind["system_prompt"]), "developer instructions in Harmony")
        for name in ("format", "no_input_format", "system_format"):
            if kind.get(name):
                self.skip(f"type/{name}", "Harmony is the format: the columns become messages")

    def _chat(self, name: str) -> None:
        roles = self._mapping()
        sharegpt = roles.get("role") == "from" and roles.get("content") == "value"
        if not roles and name.startswith("sharegpt"):
            sharegpt = True
        form, field = ("sharegpt", "conversations") if sharegpt else ("messages", "messages")
        self.put("type", "format", form) if name else self.values.update(format=form)
        default = "conversations" if name.startswith("sharegpt") else "messages"
        column = self.get("field_messages")
        if column == field:
            self.skip("field_messages", f"the column that the format {form} reads")
        elif isinstance(column, str):
            self.put("field_messages", f"columns.{field}", column)
        elif default != field:
            self.values["columns"] = {field: default}
            self.draft.notes[(*self.place, self.number, "columns", field)] = "Axolotl's default (field_messages)"
        for prop, source in roles.items():
            self._property(prop, source, sharegpt)
        self._roles(form)

    def _mapping(self) -> dict[str, str]:
        """Which key of a message has its role, its content and other properties, where the config says so."""
        given = self.get("message_property_mappings")
        roles = {str(k): str(v) for k, v in given.items()} if isinstance(given, dict) else {}
        for prop in ("role", "content"):
            if isinstance(old := self.get(f"message_field_{prop}"), str):
                roles.setdefault(prop, old)
        return roles

    def _property(self, prop: str, source: str, sharegpt: bool) -> None:
        given = self.get("message_property_mappings")
        names = [f"message_property_mappings/{prop}"] if isinstance(given, dict) and prop in given else []
        names += [f"message_field_{prop}"] if self.get(f"message_field_{prop}") is not None else []
        ours = {"role": "from", "content": "value"} if sharegpt else {"role": "role", "content": "content"}
        for name in names:
            if ours.get(prop) == source or (prop == source and prop in KEYS):
                self.skip(name, f"`{source}` is where Ossia looks for it")
            elif prop in THINKING and source in THINKING:
                self.skip(name, f"thinking is read from {', '.join(THINKING)}")
            else:
                meant = ours.get(prop, prop)
                self.refuse(name, f"rename the key `{source}` of every message to `{meant}` in the data")

    def _roles(self, form: str) -> None:
        given = self.get("roles")
        for target, speakers in given.items() if isinstance(given, dict) else ():
            speakers = speakers if isinstance(speakers, list) else [speakers]
            strange = [str(one) for one in speakers if one not in _ROLES[form].get(str(target), ())]
            unused = form == "messages" and set(strange) <= {"human", "gpt"}  # Axolotl's own defaults
            if not strange or unused:
                self.skip(f"roles/{target}", "Ossia reads these speakers so")
            else:
                self.refuse(
                    f"roles/{target}", f"rename the role {', '.join(strange)} of the messages to {target} in the data"
                )

    def _messages(self) -> None:
        """What a message has besides its role and text."""
        if (thinking := self.get("field_thinking")) is not None:
            if thinking in THINKING:
                self.skip("field_thinking", f"a message's `{thinking}` is read as its thinking")
            else:
                self.refuse(
                    "field_thinking",
                    f"rename the key `{thinking}` of the messages to `thinking` in the data, or it is refused there",
                )
        self.skip("template_thinking_key", "Ossia writes thinking into the channel analysis itself")
        if (tools := self.get("field_tools")) == "tools":
            self.skip("field_tools", "the column that Ossia reads tools from")
        elif isinstance(tools, str):
            self.put("field_tools", "columns.tools", tools)
        if isinstance(system := self.get("field_system"), str):
            self.put("field_system", "columns.system", system) if system != "system" else self.skip(
                "field_system", "the column that Ossia reads"
            )
        if self.get("split_thinking"):
            self.refuse("split_thinking", "move what is between the thinking tags into the message's `thinking`")
        if self.get("drop_system_message"):
            self.refuse("drop_system_message", "take the system messages out of the data")
        template = self.get("chat_template")
        if template is not None:
            if str(template).startswith("tokenizer_default"):
                self.skip("chat_template", "Ossia writes Harmony, the template of gpt-oss, itself")
            else:
                self.refuse("chat_template", "gpt-oss speaks Harmony alone; leave it out")
        if self.get("chat_template_jinja") is not None:
            self.refuse("chat_template_jinja", "gpt-oss speaks Harmony alone; leave it out")

    def _training(self) -> None:
        roles = self.get("roles_to_train")
        flag = self.get("message_field_training")
        if isinstance(roles, list) and roles:
            strange = [str(role) for role in roles if role not in ("assistant", "gpt")]
            if strange:
                self.refuse("roles_to_train", f"only what the model says is trained, not {', '.join(strange)}")
            else:
                self.skip("roles_to_train", "every assistant turn is trained (`train.turns`: all)")
        elif roles == [] and flag is None:
            self.refuse("roles_to_train", "nothing would be trained; every assistant turn is, in the recipe")
        elif roles == []:
            self.refuse(
                "roles_to_train",
                "assistant messages are trained unless their `train` is false: write that beside the others",
            )
        if flag == "train":
            self.skip("message_field_training", "a message's `train` says so in Ossia too")
        elif flag is not None:
            self.refuse("message_field_training", f"rename the key `{flag}` of the messages to `train` in the data")
        if self.get("message_field_training_detail") is not None:
            self.refuse(
                "message_field_training_detail",
                "parts of a text have no mask of their own: split the text into parts with `train`, or give a `weight`",
            )
        for name in ("train_on_eos", "train_on_eot"):
            given = self.get(name)
            if given in ("turn", "all"):
                self.skip(name, "the token that ends a trained turn is trained with it, no other one")
            elif given is not None:
                self.refuse(
                    name, "the token that ends a trained turn is always trained; `train: {turns: last}` is near"
                )

    def _rest(self) -> None:
        split = self.get("split")
        if isinstance(split, str) and "[" in split:
            self.refuse("split", "a part of a split: take the rows that are meant into a file, or see `weight`")
        elif split == "train":
            self.skip("split", "the default")
        elif isinstance(split, str):
            self.put("split", "split", split)
        shards = self.draft.whole(*self.path, "shards")
        if shards and shards > 1:
            self.put("shards", "weight", round(1 / shards, 6), "as many rows, but others")
            self.skip("shards_idx", "as many rows, but others")
        elif shards is not None:
            self.skip("shards", "all rows are read")
        self.skip("preprocess_shards", "rows are read while training")
        self.skip("trust_remote_code", "no code of a dataset's is run")
        for name, instead in (
            ("name", "a dataset's configuration: download its files and name them in `path`"),
            ("revision", "download this revision and name its files in `path`"),
        ):
            if self.get(name) is not None:
                self.refuse(name, instead)
        for name in self.draft.get(*self.path):
            if name in ("field", "text_column") and self.values.get("format") == "text":
                continue
            if self.get(name) is not None and name in _LEFT:
                self.refuse(name, "bring the rows into the form that the format reads; docs/recipe.md, `data`")


def _harmony(draft: Draft) -> None:
    template = draft.get("chat_template")
    if template is not None:
        if str(template).startswith("tokenizer_default"):
            draft.skip(("chat_template",), "Ossia writes Harmony, the template of gpt-oss, itself")
        else:
            draft.refuse(("chat_template",), "gpt-oss speaks Harmony alone; leave it out")
    if draft.get("chat_template_jinja") is not None:
        draft.refuse(("chat_template_jinja",), "gpt-oss speaks Harmony alone; leave it out")
    template_arguments(draft, ("chat_template_kwargs",))
    if message := draft.text("default_system_message"):
        for number, source in enumerate(draft.recipe.get("data", [])):
            source["developer"] = message
            draft.notes[("data", number, "developer")] = "default_system_message"
        words = "data.N.developer of every source: developer instructions for rows that bring none"
        draft.say(("default_system_message",), Fate.mapped, words)
    inputs = draft.flag("train_on_inputs")
    if inputs:
        draft.refuse(("train_on_inputs",), "only what the model says is trained, which is what it is asked for later")
    elif inputs is False:
        draft.skip(("train_on_inputs",), "only what the model says is trained")


def template_arguments(draft: Draft, path: KeyPath) -> None:
    """The template's arguments, which are the head of Harmony's system message."""
    given = draft.get(*path)
    for name, value in given.items() if isinstance(given, dict) else ():
        here = (*path, name)
        if name == "reasoning_effort" and value in _EFFORTS:
            draft.map(here, ("harmony", "reasoning_effort"), value)
        elif name == "model_identity" and isinstance(value, str):
            draft.map(here, ("harmony", "identity"), value)
        else:
            draft.refuse(here, "the head of Harmony's system message is the section `harmony`")
