"""What a task's folder says of itself beside its texts: task.json, written by named_tasks, absent from a plain BEIR folder.

    {"task": "MIRACLRetrieval", "subset": "de", "split": "dev", "languages": ["deu-Latn"], "revision": "9c09abc...",
     "mteb_version": "2.26.24", "ignore_identical_ids": false}

It keeps with the data what a figure needs to be found again, and what is measured otherwise than the texts say. Write
{"ignore_identical_ids": true} beside BEIR's ArguAna, whose queries stand in the corpus: a query does not then find itself.
"""

import dataclasses
import json
import pathlib

from moe_embed import stored
from moe_embed.config import UserError

NAME = "task.json"
GROUPS = ("cqadupstack", "miracl")  # folders of tasks that count as one: BEIR's twelve forums, MIRACL's languages


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a task comes from, in mteb's words. The defaults are what a plain folder has."""

    task: str = ""
    subset: str = "default"  # a language of MIRACL, a forum of cqadupstack/
    split: str = "test"
    languages: tuple[str, ...] = ()  # "deu-Latn"; () where nobody said
    revision: str = "unknown"  # of the data
    mteb_version: str | None = None  # that gave the data
    ignore_identical_ids: bool = False  # a document of the query's own id is not counted among the found

    @property
    def name(self) -> str:
        """The task's name in tables: MIRACLRetrieval/de, cqadupstack/android, SciFact."""
        return self.task if self.subset == "default" else f"{self.task}/{self.subset}"


def of_folder(root: pathlib.Path) -> Origin:
    """What task.json in `root` says, the rest from the folder's name. UserError if it cannot be read."""
    name, group = root.name or root.resolve().name, root.resolve().parent.name
    plain = Origin(group, name) if group in GROUPS else Origin(name)
    path = root / NAME
    if not path.is_file():
        return plain
    try:
        said = stored.read_json(path)
        said |= {"languages": tuple(said["languages"])} if "languages" in said else {}
        origin = dataclasses.replace(plain, **said)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); it may hold {_fields()}.") from error
    wrong = [field.name for field in dataclasses.fields(Origin) if not _fits(getattr(origin, field.name), field)]
    if wrong:
        raise UserError(f"{path} has {wrong[0]}: {getattr(origin, wrong[0])!r:.60}; it may hold {_fields()}.")
    return origin


def write(root: pathlib.Path, origin: Origin) -> None:
    """Write task.json into a folder that is not yet in its place."""
    (root / NAME).write_text(json.dumps(dataclasses.asdict(origin), indent=1) + "\n", "utf-8")


def _fits(value, field: dataclasses.Field) -> bool:
    if field.name == "languages":
        return all(isinstance(language, str) for language in value)
    if field.name == "ignore_identical_ids":
        return isinstance(value, bool)
    return isinstance(value, str) or (value is None and field.name == "mteb_version")


def _fields() -> str:
    return ", ".join(field.name for field in dataclasses.fields(Origin))
