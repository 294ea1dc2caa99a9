"""README and docs: what they show exists, their Python runs, their links resolve."""

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from apecache_cli.app import app
from tiny import draw_shape, make_shapes
from typer.main import get_command

import apecache
from docs.reference_pages import PAGES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MAX_README_CHARACTERS = 8000
WRITTEN = (README, ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md")))
"""Pages that people wrote; `PAGES` are generated."""
IMAGE_ENCODER = "vit_small_patch14_dinov2.lvd142m"
TEXT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
SHELL = ("console", "bash")
FENCE = re.compile(r"^(<!-- runnable -->\n)?```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
COMMANDS: dict[str, Any] = dict(get_command(app).commands)  # type: ignore[attr-defined]
OTHER_TOOLS = {"--nproc-per-node", "--retrain", "--val", "--version", "--help"}
"""Options that pages name and that are not of one command: `--val` and `--retrain` are of examples."""


class Block(NamedTuple):
    page: Path
    language: str
    text: str
    is_runnable: bool


def blocks(page: Path) -> list[Block]:
    matches = FENCE.findall(page.read_text(encoding="utf-8"))
    return [
        Block(page, language, text, bool(marker) or page == README)
        for marker, language, text in matches
    ]


ALL_BLOCKS = [block for page in WRITTEN for block in blocks(page)]


def code_spans(page: Path) -> list[str]:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"`([^`\n]+)`", prose)


def shell_lines() -> Iterator[tuple[Path, str]]:
    """Lines of shell blocks, and code spans that begin with a command."""
    for block in ALL_BLOCKS:
        if block.language in SHELL:
            # A backslash at the end of a line continues the command.
            text = re.sub(r" \\\n\s*", " ", block.text)
            yield from ((block.page, line) for line in text.splitlines() if line.strip())
    for page in WRITTEN:
        for span in code_spans(page):
            if re.match(r"(apecache|make|python -m) ", span):
                yield page, span


def shown_commands() -> Iterator[tuple[Path, str, list[str]]]:
    """Page, command and options of every use of apecache that the pages show."""
    for page, line in shell_lines():
        for match in re.finditer(r"(?:^|-m )apecache ([a-z][a-z-]*)((?: .*)?)$", line):
            options = re.findall(r"(?<= )--?[a-z][a-z-]*", match[2].split(" #")[0])
            yield page, match[1], options


def options_of(command: str) -> set[str]:
    return {
        name for item in COMMANDS[command].params for name in (*item.opts, *item.secondary_opts)
    }


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8")) <= MAX_README_CHARACTERS


@contextmanager
def logging_kept() -> Iterator[None]:
    """Undo what a block does to logging."""
    root = logging.getLogger()
    library = logging.getLogger("apecache")
    handlers = list(root.handlers)
    level = library.level
    try:
        yield
    finally:
        root.handlers = handlers
        library.setLevel(level)


@pytest.mark.slow
def test_every_runnable_python_block_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    folder = make_shapes(tmp_path / "shapes", copies=4).parent
    # Folders with the names of the encoders that the pages show: local folders come first.
    shutil.copytree(tiny_image_encoder, folder / IMAGE_ENCODER)
    shutil.copytree(tiny_text_encoder, folder / TEXT_ENCODER)
    draw_shape("red", "square").save(folder / "photo.jpg")
    monkeypatch.chdir(folder)
    runnable = [block for block in ALL_BLOCKS if block.language == "python" and block.is_runnable]
    assert len(runnable) >= 12
    printed: list[str] = []
    for block in sorted(runnable, key=lambda block: block.page != README):
        if "SearchIndex" in block.text:
            apecache.build_index("run", apecache.FeatureStore.open("store"), "index")
        name = block.page.relative_to(ROOT).as_posix()
        if "fit_head" in block.text and ', "run")' in block.text:
            shutil.rmtree("run", ignore_errors=True)
        with logging_kept():
            exec(compile(block.text, name, "exec"), {})
        output = capsys.readouterr()
        printed.append(output.out)
        assert bool(output.err) == ("progress_bar" in block.text), output.err
    assert "RetrievalReport" in "".join(printed)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_python_block_compiles(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, page.name, "exec")


def test_every_command_that_the_pages_show_exists_with_its_options() -> None:
    shown = list(shown_commands())
    assert len(shown) > 50
    for page, command, options in shown:
        assert command in COMMANDS, f"{page.name}: apecache {command}"
        unknown = set(options) - options_of(command) - OTHER_TOOLS
        assert not unknown, f"{page.name}: apecache {command} has no {unknown}"


def test_every_command_is_on_a_page_that_people_wrote() -> None:
    named = {command for _, command, _ in shown_commands()}
    assert set(COMMANDS) <= named, "a command is missing in README and docs"


def test_every_option_that_the_pages_name_by_itself_exists() -> None:
    known = set.union(*(options_of(command) for command in COMMANDS)) | OTHER_TOOLS
    for page in WRITTEN:
        for span in code_spans(page):
            option = re.match(r"--[a-z][a-z-]*", span)
            assert option is None or option[0] in known, f"{page.name}: {span}"


def test_every_make_target_and_benchmark_that_the_pages_name_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = [(page, line) for page, line in shell_lines() if not line.startswith("apecache")]
    targets = {match[1] for _, line in named if (match := re.match(r"make ([a-z]+)", line))}
    assert {"demo", "test", "docs", "faults"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    modules = {
        match[1] for _, line in named if (match := re.match(r"python -m (benchmarks[\w.]*)", line))
    }
    assert len(modules) > 10
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("command", ["make demo", "make test", "make docs"])
def test_the_readme_has_the_commands_of_a_checkout(command: str) -> None:
    assert command in README.read_text(encoding="utf-8")


def test_every_file_that_the_pages_name_exists() -> None:
    for page in WRITTEN:
        for span in code_spans(page):
            if re.fullmatch(r"(benchmarks|docs|examples)/[\w./-]+", span):
                assert (ROOT / span).exists(), f"{page.name}: {span}"


def slug(heading: str) -> str:
    """The anchor of a heading, as Markdown's `toc` extension makes it."""
    text = re.sub(r"[`*\\]", "", heading)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


def test_every_internal_link_resolves() -> None:
    texts = {page: page.read_text(encoding="utf-8") for page in WRITTEN}
    texts |= {ROOT / "docs" / name: make() for name, make in PAGES.items()}
    n_links = 0
    for page, text in texts.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
            if link.startswith("https://"):
                continue
            n_links += 1
            target, _, anchor = link.partition("#")
            path = (page.parent / target).resolve() if target else page
            assert path in texts or path.is_file(), f"{page.name}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", texts[path], flags=re.MULTILINE)
                assert anchor in map(slug, headings), f"{page.name}: {link}"
    assert n_links > 40


def test_every_page_is_in_the_navigation() -> None:
    import yaml

    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    in_navigation = set(re.findall(r": ([\w/-]+\.md)$", text, flags=re.MULTILINE))
    written = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert in_navigation == written | set(PAGES)
    assert yaml.safe_load(text)["hooks"] == ["docs/reference_pages.py"]


def test_the_python_reference_has_every_public_name() -> None:
    page = PAGES["reference/python.md"]()
    assert {
        name.rsplit(".", 1)[-1] for name in re.findall(r"^::: (.*)$", page, re.MULTILINE)
    } == set(apecache.__all__)


def test_the_command_reference_has_every_option() -> None:
    page = PAGES["reference/cli.md"]()
    sections = dict(re.findall(r"^## apecache ([\w-]+)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.M))
    assert set(sections) == set(COMMANDS)
    for command, section in sections.items():
        for item in COMMANDS[command].params:
            if item.param_type_name == "option" and not item.hidden:
                assert f"`{item.opts[0]}`" in section, f"{command} {item.opts[0]}"


def test_the_examples_of_the_command_reference_are_whole_commands() -> None:
    page = PAGES["reference/cli.md"]()
    examples = re.findall(r"^Examples?:\n\n((?:    .*\n)+)", page, flags=re.MULTILINE)
    assert len(examples) >= len(COMMANDS) - 3
    for line in "".join(examples).splitlines():
        assert re.match(r"    (apecache|torchrun|python) ", line), line


def test_every_command_has_functions_of_the_same_effect() -> None:
    """The table of the page about Python has all commands, and its functions are public."""
    text = (ROOT / "docs/guide/python.md").read_text(encoding="utf-8")
    _, _, table = text.partition("## Commands and functions")
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `apecache")]
    commands = {name for row in rows for name in re.findall(r"`(?:apecache )?([\w-]+)`", row[0])}
    assert commands == set(COMMANDS)
    for _, functions in rows:
        names = [name for name in re.findall(r"`([A-Za-z_]+)", functions) if name != "pairs"]
        assert names
        for name in names:
            assert name in apecache.__all__ or name in vars(apecache.FeatureStore), name


def test_the_recipe_reference_has_every_key() -> None:
    from docs.reference_pages import RECIPE_SECTIONS

    page = PAGES["reference/recipe-file.md"]()
    sections = re.split(r"^## .*$", page, flags=re.MULTILINE)[1:]
    for (_, module, class_name), section in zip(RECIPE_SECTIONS, sections, strict=True):
        settings = _load(f"apecache.{module.removesuffix('.py').replace('/', '.')}", class_name)
        for key in settings.model_fields:
            assert f"| `{key}` |" in section, f"{class_name}.{key}"


def test_the_recipe_reference_has_every_section() -> None:
    """Every settings class that a recipe reaches has a section."""
    from apecache.recipes.recipe import Recipe
    from docs.reference_pages import RECIPE_SECTIONS

    reached = {Recipe.__name__}
    pending: list[Any] = [Recipe]
    while pending:
        for field in pending.pop().model_fields.values():
            for settings in _settings_in(field.annotation):
                if settings.__name__ not in reached:
                    reached.add(settings.__name__)
                    pending.append(settings)
    assert {class_name for _, _, class_name in RECIPE_SECTIONS} == reached


def _settings_in(annotation: Any) -> Iterator[Any]:
    from typing import get_args

    from apecache.settings import Settings

    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for argument in get_args(annotation):
        yield from _settings_in(argument)


def _load(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def test_every_environment_variable_is_documented() -> None:
    text = (ROOT / "docs/reference/environment.md").read_text(encoding="utf-8")
    code = [*(ROOT / "apecache").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
    used = {
        name
        for path in code
        for name in re.findall(r"\"(APECACHE_[A-Z_]+)\"", path.read_text(encoding="utf-8"))
    }
    assert used
    assert used == set(re.findall(r"`(APECACHE_[A-Z_]+)`", text))


def test_the_page_of_the_installation_names_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "docs/start/install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \|", text, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    assert named == set(project["optional-dependencies"])


def test_the_page_of_the_run_folder_names_the_files_that_runs_have() -> None:
    from apecache.runs import encoders, folder, heads

    text = (ROOT / "docs/reference/run-folder.md").read_text(encoding="utf-8")
    table = text[: text.index("## ledger.json")]
    names = set(re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE))
    descriptions = {encoders.WEIGHTS, encoders.DESCRIPTION, heads.WEIGHTS, heads.DESCRIPTION}
    assert names == folder.OURS | descriptions


def test_the_page_of_exit_codes_has_those_of_the_errors() -> None:
    from apecache import errors

    text = (ROOT / "docs/reference/errors.md").read_text(encoding="utf-8")
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)}
    classes = [item for item in vars(errors).values() if isinstance(item, type)]
    used = {item.exit_code for item in classes if issubclass(item, errors.ApecacheError)}
    assert documented == used | {0, 130}


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for module in ("material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(module) is None:
            pytest.skip("mkdocs is not installed; pip install 'apecache[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "fit-head" in (tmp_path / "reference/cli/index.html").read_text(encoding="utf-8")
    assert broken_links(tmp_path) == []


def broken_links(site: Path) -> list[str]:
    """Return the links within a built site that lead to no file or to no anchor of it."""
    texts = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    # The page of errors is served at any address, so its links are absolute.
    del texts[site / "404.html"]
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in texts.items()}
    broken: list[str] = []
    for path, text in texts.items():
        page = f"http://site/{path.relative_to(site).as_posix()}"
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            parts = urlsplit(urljoin(page, link))
            if parts.netloc != "site":
                continue
            target = site / unquote(parts.path).lstrip("/")
            if target.is_dir():
                target /= "index.html"
            fragment = unquote(parts.fragment)
            if not target.is_file() or (fragment and fragment not in anchors.get(target, set())):
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


def test_a_link_to_no_file_or_no_anchor_is_found(tmp_path: Path) -> None:
    (tmp_path / "guide").mkdir()
    (tmp_path / "404.html").write_text("")
    (tmp_path / "guide/index.html").write_text('<h2 id="there">x</h2>')
    links = ("guide/", "guide/#there", "guide/#missing", "none.html", "https://example.org")
    (tmp_path / "index.html").write_text("".join(f'<a href="{link}">' for link in links))
    assert broken_links(tmp_path) == ["index.html: guide/#missing", "index.html: none.html"]
