"""What there is: the verbs in the order of the recipe, each with the first line of its own documentation."""

import ast
import pathlib
import shutil
import sys
import textwrap

from moe_embed import fields

VERBS = (
    "doctor", "plan", "prepare", "filter", "train", "import_hf", "upcycle", "mine", "soup", "worth",
    "evaluate", "mteb_benchmark", "paper_table", "report", "embed", "export", "serve",
)  # fmt: skip


def table(width: int) -> str:
    """An entry a verb, of the file's docstring, in lines of at most `width`."""
    folder, indent = pathlib.Path(__file__).parent, " " * 18
    trees = {name: ast.parse((folder / f"{name}.py").read_text("utf-8")) for name in VERBS}
    lines = {name: ast.get_docstring(tree).splitlines()[0].removeprefix(f"{name}: ") for name, tree in trees.items()}
    entry = lambda name: textwrap.fill(f"  {name:16}{lines[name]}", width, subsequent_indent=indent)  # noqa: E731
    return "\n".join(map(entry, VERBS))


def main(argv: list[str]) -> int:
    """Print the table: exit 0 where nothing else was asked for, else 2 and one sentence."""
    if argv in ([], ["--help"], ["-h"]):
        print(
            f"python -m moe_embed.VERB --help shows the flags of a verb:\n\n{table(shutil.get_terminal_size().columns)}"
        )
        return 0
    if argv[0] in VERBS:
        said = f"a verb is a module of its own: python -m moe_embed.{argv[0]}"
    else:
        said = f"{argv[0]} is no verb of python -m moe_embed.VERB{fields.did_you_mean(argv[0], VERBS)}"
    print(f"error: {said}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
