"""The rules of the house that no linter knows: sizes, names, and who may call what."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hopescale", "data_pipeline")
MAX_LINES = 500
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}

MAY_READ_ENVIRONMENT = {
    # Sets a default of torch's own, which must be there before torch is imported; reads nothing of ours.
    "hopescale/__init__.py",
    "hopescale/config/compose.py",
    "hopescale/doctor.py",
    "hopescale/parallel/process_group.py",
    "hopescale/slurm/environment.py",
}
GROUP_CALLS = {
    "DeviceMesh",
    "destroy_process_group",
    "fully_shard",
    "init_device_mesh",
    "init_process_group",
    "new_group",
    "new_subgroups",
    "new_subgroups_by_enumeration",
    "split_group",
}
PARALLEL_MODULES = ("torch.distributed.fsdp", "torch.distributed.device_mesh", "torch.distributed._composable")
IMPORTED_ONCE = ("deepspeed", "grafana_foundation_sdk", "prometheus_client", "tensorboard", "transformers")
UNPICKLERS = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
MODEL_MAY_IMPORT = {"hopescale.model", "jaxtyping", "pydantic", "pydantic_core", "torch", "typing_extensions"}
DISTRIBUTION_OF = {
    "PIL": "pillow",
    "hydra": "hydra-core",
    "prometheus_client": "prometheus-client",
    "pydantic_core": "pydantic",
    "yaml": "pyyaml",
}


@dataclass(frozen=True)
class Import:
    """One imported module; `inside` is the function it is imported in, None at module level."""

    module: str
    line: int
    inside: str | None
    for_types_only: bool

    def is_under(self, package: str) -> bool:
        return self.module == package or self.module.startswith(package + ".")


@dataclass(frozen=True)
class Source:
    """A Python file of the project, parsed once."""

    path: str
    text: str
    tree: ast.Module
    imports: tuple[Import, ...]


def dotted_name(node: ast.expr) -> str:
    """`a.b.c` of a chain of attributes, and the empty string for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted_name(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def absolute_module(node: ast.ImportFrom, path: str) -> str:
    if not node.level:
        return node.module or ""
    package = Path(path).with_suffix("").parts[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def find_imports(tree: ast.Module, path: str) -> Iterator[Import]:
    def visit(node: ast.AST, inside: str | None, for_types_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = node.name
        if isinstance(node, ast.If) and dotted_name(node.test).split(".")[-1] == "TYPE_CHECKING":
            for child in node.body:
                yield from visit(child, inside, True)
            for child in node.orelse:
                yield from visit(child, inside, for_types_only)
            return
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from a import b` may mean the module a.b, so both are named.
            module = absolute_module(node, path)
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and dotted_name(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        for name in names:
            yield Import(name, getattr(node, "lineno", 0), inside, for_types_only)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside, for_types_only)

    yield from visit(tree, None, False)


def parse(path: str, text: str) -> Source:
    tree = ast.parse(text, filename=path)
    return Source(path, text, tree, tuple(find_imports(tree, path)))


def python_files(*folders: str) -> list[Path]:
    return sorted(path.relative_to(REPO_ROOT) for folder in folders for path in (REPO_ROOT / folder).rglob("*.py"))


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    return [parse(p.as_posix(), (REPO_ROOT / p).read_text(encoding="utf-8")) for p in python_files(*PACKAGES)]


def calls(source: Source) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            yield dotted_name(node.func), node


def group_calls(source: Source) -> list[str]:
    """Calls that make or unmake process groups and meshes, or shard a model."""
    return [
        f"{source.path}:{node.lineno} {name}"
        for name, node in calls(source)
        if name.split(".")[-1] in GROUP_CALLS or name == "deepspeed.initialize"
    ]


def environment_reads(source: Source) -> list[str]:
    """Every touch of the environment, copies for a child process included."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    modules = {"os"} | {
        alias.asname or alias.name
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "os"
    }
    found = [
        f"{source.path}:{node.lineno} {dotted_name(node)}"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and node.attr in names and dotted_name(node.value) in modules
    ]
    return found + [
        f"{source.path}:{i.line} {i.module}" for i in source.imports if i.module in {f"os.{n}" for n in names}
    ]


def unsafe_loads(source: Source) -> list[str]:
    """Imports of libraries that unpickle, and calls told to."""
    found = [
        f"{source.path}:{i.line} imports {i.module}" for i in source.imports if i.module.split(".")[0] in UNPICKLERS
    ]
    for name, node in calls(source):
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
            if (keyword.arg == "weights_only" and value is not True) or (
                keyword.arg == "allow_pickle" and value is not False
            ):
                found.append(f"{source.path}:{node.lineno} {name}({keyword.arg}={ast.unparse(keyword.value)})")
    return found


def test_no_file_is_longer_than_the_limit() -> None:
    scripts = [path.relative_to(REPO_ROOT) for path in (REPO_ROOT / "launch").rglob("*.sh")]
    paths = [*python_files(*PACKAGES, "tests"), *scripts, Path(".ci/run")]
    lengths = {path.as_posix(): len((REPO_ROOT / path).read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_no_file_or_folder_has_a_name_that_says_nothing() -> None:
    files = python_files(*PACKAGES, "tests")
    assert [path.as_posix() for path in files if VAGUE_NAMES & set(path.with_suffix("").parts)] == []


def test_only_parallel_makes_process_groups_and_meshes(sources: list[Source]) -> None:
    outside = [s for s in sources if not s.path.startswith("hopescale/parallel/")]
    assert [call for source in outside for call in group_calls(source)] == []


def test_only_parallel_imports_sharding_modules(sources: list[Source]) -> None:
    found = [
        f"{source.path}:{i.line} {i.module}"
        for source in sources
        if not source.path.startswith("hopescale/parallel/")
        for i in source.imports
        if not i.for_types_only and any(i.is_under(module) for module in PARALLEL_MODULES)
    ]
    assert found == []


def test_the_environment_is_read_in_few_files_only(sources: list[Source]) -> None:
    assert [read for s in sources if s.path not in MAY_READ_ENVIRONMENT for read in environment_reads(s)] == []


def test_data_pipeline_knows_nothing_of_ranks_and_models(sources: list[Source]) -> None:
    own = [source for source in sources if source.path.startswith("data_pipeline/")]
    imports = [
        f"{source.path}:{i.line} {i.module}"
        for source in own
        for i in source.imports
        if i.is_under("hopescale") or i.is_under("torch.distributed")
    ]
    attributes = [
        f"{source.path}:{node.lineno} {dotted_name(node)}"
        for source in own
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and dotted_name(node) == "torch.distributed"
    ]
    assert imports + attributes == []


def test_the_model_imports_torch_and_itself_only(sources: list[Source]) -> None:
    found = [
        f"{source.path}:{i.line} {i.module}"
        for source in sources
        if source.path.startswith("hopescale/model/")
        for i in source.imports
        if i.module.split(".")[0] not in sys.stdlib_module_names and not any(i.is_under(m) for m in MODEL_MAY_IMPORT)
    ]
    assert found == []


@pytest.mark.parametrize("library", IMPORTED_ONCE)
def test_an_optional_library_is_imported_in_one_function_of_one_file(sources: list[Source], library: str) -> None:
    names = (library, "torch.utils.tensorboard") if library == "tensorboard" else (library,)
    users: dict[str, list[Import]] = defaultdict(list)
    for source in sources:
        for i in source.imports:
            if any(i.is_under(name) for name in names) and not i.for_types_only:
                users[source.path].append(i)
    assert len(users) <= 1, f"{library} is imported in {sorted(users)}"
    assert [f"{path}:{i.line}" for path, found in users.items() for i in found if i.inside is None] == []


def test_nothing_is_unpickled(sources: list[Source]) -> None:
    assert [load for source in sources for load in unsafe_loads(source)] == []


def test_every_third_party_import_is_a_declared_dependency(sources: list[Source]) -> None:
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["project"]

    def distributions(requirements: list[str]) -> set[str]:
        return {re.split(r"[^A-Za-z0-9._-]", line)[0].lower().replace("_", "-") for line in requirements}

    core = distributions(project["dependencies"])
    everything = core.union(*(distributions(lines) for lines in project["optional-dependencies"].values()))
    undeclared = []
    for source in sources:
        for i in source.imports:
            top = i.module.split(".")[0]
            if top in sys.stdlib_module_names or top in PACKAGES or i.for_types_only:
                continue
            distribution = DISTRIBUTION_OF.get(top, top).lower().replace("_", "-")
            if distribution not in (core if i.inside is None else everything):
                undeclared.append(f"{source.path}:{i.line} {top}")
    assert undeclared == []


@pytest.mark.parametrize(
    ("check", "bad", "good"),
    [
        (
            group_calls,
            "import torch.distributed as d\nd.init_process_group('gloo')",
            "import torch.distributed as d\nd.barrier()",
        ),
        (group_calls, "from x import fully_shard as f\nfully_shard(m)", "x = 'fully_shard(m)'"),
        (group_calls, "import deepspeed\ndeepspeed.initialize()", "thing.initialize()"),
        (environment_reads, "import os\nos.environ['A']", "import os\nos.getpid()"),
        (environment_reads, "import os as o\no.getenv('A')", "config.environ"),
        (environment_reads, "from os import environ", "from os import path"),
        (unsafe_loads, "import pickle", "import json"),
        (unsafe_loads, "torch.load(p, weights_only=False)", "torch.load(p, weights_only=True)"),
        (unsafe_loads, "numpy.load(p, allow_pickle=flag)", "numpy.load(p, allow_pickle=False)"),
    ],
)
def test_the_checks_tell_good_from_bad(check, bad: str, good: str) -> None:
    assert check(parse("hopescale/somewhere.py", bad))
    assert not check(parse("hopescale/somewhere.py", good))


def test_imports_are_found_with_their_place() -> None:
    text = (
        "if TYPE_CHECKING:\n    import a\nfrom . import b\ndef f():\n    import c\n    importlib.import_module('d')\n"
    )
    found = {i.module: (i.inside, i.for_types_only) for i in parse("hopescale/model/x.py", text).imports}
    assert found["a"] == (None, True)
    assert found["hopescale.model.b"] == (None, False)
    assert found["c"] == found["d"] == ("f", False)
