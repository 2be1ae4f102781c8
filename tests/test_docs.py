"""What is written about the project is true: imports between rooms, docstrings, links, commands, the README's code."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import ddmd
from ddmd import ops
from ddmd.cohort.cases import Case
from ddmd.cohort.discovery import Discovery
from ddmd.diffusion.samplers import SamplingConfig
from ddmd.diffusion.schedule import Schedule
from ddmd.inference.postprocess import Lesion, LesionCriteria

ROOT = Path(__file__).parents[1]
PACKAGE = Path(ddmd.__file__).parent

# --------------------------------------------------------------------------- imports

# The rooms from top to bottom; those of one line may not import each other. docs/architecture.md shows the same list.
ROOMS = (
    ("cli",),
    ("training",),
    ("evaluation", "report"),
    ("cohort", "data"),
    ("inference",),
    ("models",),
    ("io", "diffusion"),
    ("ops",),
    ("validation",),
)
FACE = ("__init__", "__main__", "_moved", "_register_ops")  # they name every room and are loaded by none


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package, its Triton kernels included."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(("ddmd", *parts)).removesuffix(".__init__")] = path
    for path in sorted((ROOT / "kernels").glob("*.py")):
        found[f"ddmd.kernels.{path.stem}".removesuffix(".__init__")] = path
    return found


def _imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of ddmd that a file imports anywhere: in functions and under TYPE_CHECKING, too."""
    found = set()
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}, line {node.lineno}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module or "")
    return {name for name in found if name in modules}


def _room(module: str) -> str:
    """The room of a module; the Triton kernels are a part of the ops."""
    room = module.split(".")[1] if "." in module else "__init__"
    return "ops" if room == "kernels" else room


def test_imports_between_rooms_point_downwards() -> None:
    rank = {room: number for number, line in enumerate(ROOMS) for room in line}
    modules = _modules()
    wrong = []
    for module, path in modules.items():
        own = _room(module)
        if own in FACE:
            continue
        for target in sorted(_imports(path, modules)):
            room = _room(target)
            if room in FACE or room == own:
                continue
            if rank[room] <= rank[own]:
                wrong.append(f"{module} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_every_room_is_in_the_list_and_in_the_page_on_architecture() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"kernels", "pretrained"}
    assert rooms == {room for line in ROOMS for room in line} - {"validation"}
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert not [room for room in rooms if f"| `ddmd/{room}/` |" not in page]


def test_rooms_use_nothing_of_the_package_itself_but_its_version() -> None:
    for module, path in _modules().items():
        if _room(module) in FACE:
            continue
        used = {
            node.attr
            for node in ast.walk(_tree(path))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "ddmd"
        }
        assert used <= {"__version__"}, f"{module} uses ddmd.{', ddmd.'.join(sorted(used))}"


def test_imports_have_no_cycle() -> None:
    modules = _modules()
    graph = {m: _imports(p, modules) - {"ddmd", m} for m, p in modules.items() if _room(m) not in FACE}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    "code",
    ["import ddmd", "import sys; sys.argv[1:] = ['--help']\nfrom ddmd.cli import main\ntry: main()\nexcept SystemExit: pass"],
    ids=["import ddmd", "ddmd --help"],
)  # fmt: skip
def test_starting_is_quick_because_torch_is_not_imported(code: str) -> None:
    check = "\nimport sys\nheavy = {'torch', 'scipy', 'matplotlib', 'monai'} & set(sys.modules)\nassert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------- docstrings

CLASSES = (
    ddmd.Detector, ddmd.Detection, ddmd.Volume, Lesion, LesionCriteria, SamplingConfig, Schedule, Case, Discovery,
)  # fmt: skip


def _public() -> Iterator[tuple[str, Any]]:
    for name in ddmd.__all__:
        yield f"ddmd.{name}", getattr(ddmd, name)
    for name in ops.OPS:
        if hasattr(ops, name):
            yield f"ddmd.ops.{name}", getattr(ops, name)
    for kind in CLASSES:
        yield kind.__name__, kind
        for name, member in vars(kind).items():
            if name.startswith("_"):
                continue
            function = (
                getattr(member, "fget", None)
                or getattr(member, "func", None)
                or getattr(member, "__func__", member)
            )
            if inspect.isfunction(function):
                yield f"{kind.__name__}.{name}", function


PUBLIC = dict(_public())


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_says_what_it_takes_and_gives(name: str) -> None:
    thing = PUBLIC[name]
    text = inspect.getdoc(thing) or ""
    assert text, f"{name} has no docstring"
    assert text.partition("\n")[0].strip().endswith((".", ":", "?")), f"{name}: the first line is no sentence"
    if inspect.isclass(thing):
        if dataclasses.is_dataclass(thing) and thing is not ddmd.Detector:
            lacking = [
                f.name for f in dataclasses.fields(thing) if f.init and not re.search(rf"\b{f.name}\b", text)
            ]
            assert not lacking, f"{name} does not say what {', '.join(lacking)} is"
        return
    signature = inspect.signature(thing)
    taken = [p.name for p in signature.parameters.values() if p.name not in ("self", "cls")]
    if taken:
        assert re.search(r"^Parameters\n-+$", text, re.M), f"{name} has no section Parameters"
        lacking = [n for n in taken if not re.search(rf"(?<!\w){n}(?!\w)", text)]
        assert not lacking, f"{name} does not say what {', '.join(lacking)} is"
    if taken and signature.return_annotation not in ("None", None, inspect.Signature.empty):
        assert re.search(r"^(Returns|Yields)\n-+$", text, re.M), f"{name} has no section Returns"


# --------------------------------------------------------------------------- texts


def _tracked() -> list[Path]:
    """The files of the repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout: the files of the repository are not known")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_text_names_a_folder_of_the_machine_it_was_written_on() -> None:
    folder = re.compile(r"(?<![\w.$}/-])/(work|tmp)/[\w.]")
    found = []
    for path in _tracked():
        if path.suffix in (".safetensors", ".png"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if folder.search(line) and path != Path(__file__):
                found.append(f"{path.relative_to(ROOT)}, line {number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def _anchors(path: Path) -> set[str]:
    """The anchors of the headings of a Markdown file, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_relative_links_lead_somewhere() -> None:
    broken = []
    for path in _tracked():
        if path.suffix != ".md":
            continue
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            place = (path.parent / file).resolve() if file else path
            # the site shows these pages side by side
            if not place.exists() or (anchor and place.suffix == ".md" and anchor not in _anchors(place)):
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)


def test_files_that_the_texts_name_are_there() -> None:
    pages = [ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(PACKAGE / "pretrained").glob("*.md")]
    named = re.compile(r"`((?:ddmd|kernels|csrc|tests|benchmarks|packaging|docs)/[\w./-]*)`")
    lacking, count = [], 0
    for path in pages:
        for name in named.findall(path.read_text(encoding="utf-8")):
            count += 1
            if not (ROOT / name).exists():
                lacking.append(f"{path.name}: {name}")
    assert count > 50
    assert not lacking, "\n".join(lacking)


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    listed = re.findall(r"([\w./-]+\.md)$", navigation, re.M)
    assert pages
    assert not pages - set(listed)
    assert len(listed) == len(set(listed)), "each once"


def test_every_python_that_the_package_names_is_in_the_matrix_of_the_tests() -> None:
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, tools = settings["project"], settings["tool"]
    named = [c.rpartition(" ")[2] for c in project["classifiers"] if ":: Python :: 3." in c]
    matrix = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert set(named) == set(re.findall(r'python: "(3\.\d+)"}', matrix))
    assert project["requires-python"] == f">={named[0]}"
    assert tools["ruff"]["target-version"] == f"py{named[0].replace('.', '')}"
    assert tools["mypy"]["python_version"] == named[0]


def test_every_public_name_is_in_the_api_pages() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    names = [*ddmd.__all__, *ops.OPS, *(kind.__name__ for kind in CLASSES)]
    assert not [name for name in names if not re.search(rf"(?:\.|- ){name}$", pages, re.M)]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 105


def _sentences(text: str) -> Iterator[str]:
    """The sentences of a Markdown text, without code, tables and headings."""
    text = re.sub(r"^```.*?^```|<!--.*?-->", "", text, flags=re.M | re.S)
    text = re.sub(r"^\|.*$|^    .*$|^#.*$", "\n", text, flags=re.M)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:-|\d+\.) )", text):
        yield from re.split(r"(?<=[.?!:;])\s|(?<=[.?!:]\*\*)\s", paragraph.strip())


def test_sentences_are_short_enough_to_be_read_once() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(PACKAGE / "pretrained").glob("*.md")]
    assert len(pages) > 10
    long = [
        f"{path.relative_to(ROOT)}: {' '.join(sentence.split())}"
        for path in pages
        for sentence in _sentences(path.read_text(encoding="utf-8"))
        if len(sentence.split()) > 25
    ]
    assert not long, "\n".join(long)


def test_code_of_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddmd.data.phantom import phantom, write

    made = phantom(seed=1, spacing_mm=4.0, sequences=("flair",))
    write(made, tmp_path, "x")["flair"].rename(tmp_path / "sub-01_FLAIR.nii.gz")
    monkeypatch.chdir(tmp_path)
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert code is not None
    variables: dict[str, Any] = {}
    exec(compile(code[1], "README.md", "exec"), variables)
    assert len(variables["detection"].lesions) == 3
    assert list((tmp_path / "out").glob("*_overlay.png"))


def test_commands_of_the_documentation_exist() -> None:
    from typer.main import get_command

    from ddmd.cli import app
    from ddmd.cli.bids import bids_app_arguments

    commands = get_command(app).commands  # type: ignore[attr-defined]
    options = {
        name: {o for p in c.params for o in (*p.opts, *p.secondary_opts)} for name, c in commands.items()
    }
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *PACKAGE.rglob("*.md"),
    ]
    wrong = []
    for path in pages:
        text = path.read_text(encoding="utf-8")
        for line in re.findall(r"^(?:    |\| `|.*`)(ddmd [^`\n]+)", text, re.M):
            words = line.split()
            if words[1] == "COMMAND" or words[1].startswith("-"):
                continue
            words = ["ddmd", *bids_app_arguments(words[1:], commands)]
            if words[1] not in commands:
                wrong.append(f"{path.relative_to(ROOT)}: {line}")
                continue
            used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            if used - options[words[1]] - {"--help", "-h"}:
                wrong.append(f"{path.relative_to(ROOT)}: {line}")
    assert not wrong, "\n".join(wrong)


def test_files_keys_and_columns_of_results_are_documented(tmp_path: Path) -> None:
    import json

    import nibabel as nib
    from typer.testing import CliRunner

    from ddmd.cli import app
    from ddmd.cohort.run_tables import COHORT_COLUMNS, FAILURE_COLUMNS
    from ddmd.data.phantom import phantom
    from ddmd.io.results import PLAIN_NAMES, SEG_SUFFIXES, SUFFIXES, result_paths

    page = (ROOT / "docs" / "howto" / "results.md").read_text(encoding="utf-8")
    flair = phantom(seed=1, spacing_mm=4.0, sequences=("flair",)).images["flair"]
    nib.save(flair, tmp_path / "NAME_flair.nii.gz")
    arguments = [
        "detect",
        tmp_path / "NAME_flair.nii.gz",
        "-o",
        tmp_path,
        "--samples",
        "2",
        "--maps",
        ",".join(SUFFIXES),
    ]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    paths = result_paths("NAME", tmp_path, PLAIN_NAMES)
    assert {key for key, path in paths.items() if not path.is_file()} == {
        f"{kind}_seg" for kind in SEG_SUFFIXES
    }
    lacking = [path.name for path in paths.values() if f"`{path.name}`" not in page]
    result = json.loads(paths["result"].read_text())
    assert "Seconds" not in result, "equal results are equal bytes"
    names = (*result, *result["LesionTable"][0], *COHORT_COLUMNS, *FAILURE_COLUMNS)
    lacking += [name for name in names if f"`{name}`" not in page]
    assert not lacking


def test_the_licence_of_the_weights_is_said_wherever_one_meets_them() -> None:
    from importlib.metadata import metadata

    from typer.testing import CliRunner

    from ddmd.cli import app
    from ddmd.models import checkpoint

    name = "CC BY-NC-SA 4.0"
    assert name in (checkpoint.PRETRAINED / "LICENSE.md").read_text(encoding="utf-8")
    said = CliRunner().invoke(app, ["info"]).output
    for weights in checkpoint.available():
        assert name in (checkpoint.PRETRAINED / f"{weights}.md").read_text(encoding="utf-8")
        assert re.search(rf"weights {weights}: .*\n  licence: {name}", said), said
    try:
        licence = metadata("ddmd")["License-Expression"]
    except ModuleNotFoundError:
        import tomllib

        licence = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    assert licence == "Apache-2.0 AND CC-BY-NC-SA-4.0"
