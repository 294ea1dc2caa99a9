"""Generate the reference pages from the code, so that they cannot differ from it.

mkdocs loads this file as a hook (`hooks:` in `mkdocs.yml`). Each page is a function that returns
Markdown, so that the pages can be tested without mkdocs.
"""

import ast
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "apecache"

PACKAGE_TITLES = {
    "data": "Sources of images and captions",
    "encoders": "Encoders",
    "extraction": "Extraction",
    "store": "Feature stores",
    "recipes": "Recipes",
    "train": "Training",
    "runs": "Runs",
    "evaluate": "Evaluation",
    "metrics": "Metrics",
    "search": "Search",
    "plan": "Planning",
    "sweeps": "Sweeps",
    "cluster": "Ray",
    "report": "Reports and the search page",
    "train.estimator": "scikit-learn estimator",
    "errors": "Errors",
}
"""Titles of the Python reference, in order. A package that is missing here comes last."""

RECIPE_SECTIONS = (
    ("Top level", "recipes/recipe.py", "Recipe"),
    ("`[image]` and `[text]`", "heads/head.py", "HeadSpec"),
    ("`[loss]`", "losses/spec.py", "LossSpec"),
    ("`[optimizer]`", "recipes/schedule.py", "OptimizerSpec"),
    ("`[schedule]`", "recipes/schedule.py", "ScheduleSpec"),
    ("`[augmentation]`", "recipes/recipe.py", "AugmentationSpec"),
    ("`[augmentation.image]`", "recipes/recipe.py", "ImageAugmentationSpec"),
    ("`[closed_form]`", "recipes/recipe.py", "ClosedFormSpec"),
    ("`[towers]`", "recipes/sections.py", "TowersSpec"),
    ("`[[towers.rules]]`", "recipes/sections.py", "Rule"),
    ("`[towers.image_adapter]` and `[towers.text_adapter]`", "recipes/sections.py", "AdapterSpec"),
    ("`[shared]`", "recipes/sections.py", "SharedSpec"),
    ("`[distillation]`", "recipes/sections.py", "DistillationSpec"),
)
"""Sections of a recipe: title, module, class."""


LAWS_INTRODUCTION = """# Claims of the papers

`benchmarks/laws` holds claims of four papers as TOML files: the recipes that a paper compares, the
published figures, and the smallest difference that counts. Each recipe is trained with several
seeds. A claim is called held, broken or not decided by a paired 95 % interval over seeds and
images, or not testable where its arms have hardly learnt or did not train alike.

Most of the committed runs were made on 1,000 images of Flickr8k with small towers and 80 steps.
Recalls are 1 to 6 %. Those of the papers are 20 to 75 %. At this size no claim about recalls is
testable. Only counts of parameters and operations are decided. Comparisons of heads and of a text
tower on cached image features were run again with all training images. Their losses are recorded.
"Runs with recorded losses" lists them with their CPU hours.

From a checkout:

```console
python -m benchmarks.laws
python -m benchmarks.laws --pairs pairs.tsv --image ENC --text ENC --only L1,L4 --budget 120 \\
  --work laws --out laws.html
```
"""


def cli_page() -> str:
    """Return the page of all commands with their arguments and options, from Typer."""
    from apecache_cli.app import app
    from typer.main import get_command

    group: Any = get_command(app)
    lines = [
        "# Command line",
        "",
        "This page is generated from the commands themselves. `apecache COMMAND --help` shows the",
        "same text. Every command has `--json` for machine-readable output.",
        "",
        *_option_tables(group.params),
    ]
    for name, command in group.commands.items():
        lines += ["", f"## apecache {name}", "", f"`{_usage(name, command)}`", ""]
        lines += [*_help(command.help or ""), ""]
        lines += _argument_table(command.params)
        lines += _option_tables(command.params)
    return "\n".join(lines) + "\n"


def _help(text: str) -> list[str]:
    """Return the help of a command as Markdown, its examples as code blocks."""
    lines: list[str] = []
    for paragraph in text.replace("\b", "").strip().split("\n\n"):
        if paragraph.strip().startswith("Example"):
            title, _, code = paragraph.strip().partition(":")
            lines += [f"{title}:", "", *(f"    {command}" for command in _commands(code))]
        else:
            lines.append(_escape(" ".join(paragraph.split())))
        lines.append("")
    return lines


def _commands(code: str) -> list[str]:
    """Return the commands of an example; a line that begins with no program continues one."""
    commands: list[str] = []
    for line in code.strip().splitlines():
        if commands and not line.strip().startswith(("apecache ", "torchrun ", "python ")):
            commands[-1] += f" {line.strip()}"
        else:
            commands.append(line.strip())
    return commands


def _usage(name: str, command: Any) -> str:
    words = [f"apecache {name}"]
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            metavar = parameter.name.upper()
            if parameter.nargs != 1:
                metavar += "..."
            words.append(metavar if parameter.required else f"[{metavar}]")
    return " ".join([*words, "[OPTIONS]"])


def _argument_table(parameters: list[Any]) -> list[str]:
    arguments = [item for item in parameters if item.param_type_name == "argument"]
    if not arguments:
        return []
    lines = ["| argument | |", "|---|---|"]
    for argument in arguments:
        lines.append(f"| `{argument.name.upper()}` | {_escape(argument.help or '')} |")
    return [*lines, ""]


def _option_tables(parameters: list[Any]) -> list[str]:
    """Return a table of the options of each help panel."""
    panels: dict[str, list[str]] = {}
    for option in parameters:
        if option.param_type_name != "option" or getattr(option, "hidden", False):
            continue
        panel = getattr(option, "rich_help_panel", None) or "Options"
        default = "required" if option.required else _default(option.default)
        # The class keeps a name from being broken after its hyphens; see extra.css.
        names = ", ".join(f"`{name}`{{.option}}" for name in (*option.opts, *option.secondary_opts))
        panels.setdefault(panel, []).append(
            f"| {names} | {default} | {_escape(option.help or '')} |"
        )
    lines: list[str] = []
    for panel, rows in panels.items():
        if panel != "Options":
            lines += [f"**{panel}**", ""]
        lines += ["| option | default | |", "|---|---|---|", *rows, ""]
    return lines


def _default(value: Any) -> str:
    """Return the default of an option as Markdown; empty for no default and for flags."""
    if value is None or isinstance(value, bool) or value in ((), []) or callable(value):
        return ""
    return f"`{getattr(value, 'value', value)}`"


def python_page() -> str:
    """Return the page of all public names, which mkdocstrings fills from the docstrings."""
    names_by_package: dict[str, list[tuple[str, str]]] = {}
    for module, name in public_names():
        names_by_package.setdefault(module.split(".")[0], []).append((module, name))
    order = [*PACKAGE_TITLES, *sorted(names_by_package.keys() - PACKAGE_TITLES.keys())]
    lines = [
        "# Python API",
        "",
        "Every name on this page is imported from `apecache`: `apecache.extract`,",
        "`apecache.load`. Modules below `apecache` are not part of the public interface.",
    ]
    for package in order:
        names = names_by_package.get(package, [])
        if names:
            lines += ["", f"## {PACKAGE_TITLES.get(package, package)}"]
        for module, name in names:
            lines += ["", f"::: apecache.{module}.{name}"]
    return "\n".join(lines) + "\n"


def public_names() -> Iterator[tuple[str, str]]:
    """Yield (module below apecache, name) of all public names, as `__init__.pyi` lists them."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield node.module, alias.asname or alias.name


def recipe_page() -> str:
    """Return the page of all settings of a recipe file, from the classes that read it."""
    lines = [
        "# Recipe file",
        "",
        "A recipe is one TOML file. It holds all settings of a fit. Unknown keys are errors.",
        "Override any value on the command line with `--set`, for example",
        "`--set optimizer.lr=3e-4`. See [heads and recipes](../guide/heads.md) for an example.",
        "",
        "This page is generated from the classes that read a recipe.",
    ]
    for title, module, class_name in RECIPE_SECTIONS:
        lines += ["", f"## {title}", "", *_settings(module, class_name)]
    return "\n".join(lines) + "\n"


def _settings(module: str, class_name: str) -> list[str]:
    """Return the docstring of a settings class, and a table of its fields."""
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    definition = next(
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name
    )
    lines = [_paragraphs(ast.get_docstring(definition) or ""), ""]
    lines += ["| key | type | default | |", "|---|---|---|---|"]
    following = [*definition.body[1:], None]
    for node, next_node in zip(definition.body, following, strict=True):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        cells = (
            f"`{node.target.id}`",
            f"`{_annotation(module, node.annotation)}`",
            _field_default(node.value),
            _escape(_docstring_of_field(next_node)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _annotation(module: str, annotation: ast.expr) -> str:
    """Return a type as text; a name of several literals is replaced by them."""
    if isinstance(annotation, ast.Name):
        tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
        for node in tree.body:
            names = [ast.unparse(target) for target in getattr(node, "targets", [])]
            if isinstance(node, ast.Assign) and names == [annotation.id]:
                return ast.unparse(node.value)
            imported = [alias.name for alias in getattr(node, "names", [])]
            if isinstance(node, ast.ImportFrom) and annotation.id in imported and node.module:
                origin = f"{node.module.removeprefix('apecache.').replace('.', '/')}.py"
                if (PACKAGE / origin).is_file():
                    return _annotation(origin, annotation)
    return ast.unparse(annotation)


def _field_default(value: ast.expr | None) -> str:
    """Return the default of a field as Markdown; a Field also says which values are allowed."""
    if value is None:
        return "required"
    if not isinstance(value, ast.Call):
        return f"`{ast.unparse(value)}`"
    keywords = {word.arg: ast.unparse(word.value) for word in value.keywords}
    if getattr(value.func, "id", "") != "Field":
        return "the defaults of the section"
    symbols = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    limits = [f"{symbols[word]} {keywords[word]}" for word in symbols if word in keywords]
    suffix = f" ({', '.join(limits)})" if limits else ""
    return f"`{keywords['default']}`{suffix}"


def _docstring_of_field(node: ast.stmt | None) -> str:
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return " ".join(str(node.value.value).split()) if is_text else ""


def packaged_page() -> str:
    """Return the page of the packaged recipes, from their files."""
    lines = [
        "# Packaged recipes",
        "",
        "This page is generated from the recipe files. `apecache recipes NAME` shows one of them.",
        "Pass a name to `--recipe`.",
    ]
    for title, folder in (
        ("Heads on cached features (fit-head)", "zoo"),
        ("Training within the towers (fit-encoder)", "tower_zoo"),
    ):
        lines += ["", f"## {title}", "", "| recipe | what it is | source |", "|---|---|---|"]
        for path in sorted((PACKAGE / "recipes" / folder).glob("*.toml")):
            recipe = tomllib.loads(path.read_text(encoding="utf-8"))
            summary = _escape(recipe.get("summary", ""))
            source = _escape(" ".join(recipe.get("source", "").split()))
            lines.append(f"| `{recipe['name']}` | {summary} | {source} |")
    lines += ["", "`freeze/Vuf-Tuu` is the recipe `freeze` with that freezing shorthand."]
    return "\n".join(lines) + "\n"


def goals_page() -> str:
    """Return the page of all benchmarks and their goals, from `benchmarks/results`."""
    lines = [
        "# All goals",
        "",
        "This page is generated from `benchmarks/results`. Each benchmark states its goals before",
        "it is run. Goals that were missed stay in the table.",
    ]
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        machine = result["machine"]
        lines += ["", f"## {path.stem}", "", "Command:", "", f"    {result['command']}", ""]
        lines += [f"{machine['cpus']} CPUs ({machine['architecture']}), {machine['memory_gb']} GB."]
        if result["goals"]:
            lines += ["", "| measured | value | goal | |", "|---|---|---|---|"]
        for goal in result["goals"]:
            sign = "at most" if goal["better"] == "lower" else "at least"
            verdict = "met" if goal["met"] else "**missed**"
            name = _escape(goal["name"])
            value = _number(goal["value"])
            target = f"{sign} {_number(goal['target'])}"
            lines.append(f"| {name} | {value} | {target} | {verdict} |")
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def laws_page() -> str:
    """Return the page of the claims of the papers, from `benchmarks/laws/RESULTS.md`."""
    results = (ROOT / "benchmarks" / "laws" / "RESULTS.md").read_text(encoding="utf-8")
    _, _, text = results.partition("\n")
    return LAWS_INTRODUCTION + text


def _escape(text: str) -> str:
    """Return text that Markdown shows as it is, also in a cell of a table; code spans stay."""
    spans = re.split(r"(`[^`]*`)", text)
    return "".join(
        span if span.startswith("`") else re.sub(r"([|<*_\[\]])", r"\\\1", span) for span in spans
    )


def _paragraphs(text: str) -> str:
    """Return a docstring as Markdown paragraphs; only code spans are markup in it."""
    return "\n\n".join(_escape(" ".join(lines.split())) for lines in text.split("\n\n"))


PAGES: dict[str, Callable[[], str]] = {
    "reference/cli.md": cli_page,
    "reference/python.md": python_page,
    "reference/recipe-file.md": recipe_page,
    "reference/recipes.md": packaged_page,
    "results/goals.md": goals_page,
    "results/laws.md": laws_page,
}
"""Generated pages, by their path below `docs`."""


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages; mkdocs calls this before it reads any page."""
    from mkdocs.structure.files import File

    for path, page in PAGES.items():
        files.append(File.generated(config, path, content=page()))
    return files
