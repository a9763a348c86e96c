"""The documents keep up with the code: settings, commands, error codes, links, and README's program."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

import atoll.models
from atoll.cli.main import app
from atoll.contract.plan import CohortRule, Plan, Recipe, RunSettings
from atoll.contract.program import REGISTRY
from atoll.contract.schema import Column, TableSchema
from atoll.data.recipe import STEPS
from atoll.data.sources import SourceSpec
from atoll.horizontal.federated import FederatedParams
from atoll.models.model import KINDS, Settings
from atoll.runtime.catalogue import load_installed
from atoll.runtime.home import CoordinatorConfig, SiteConfig
from atoll.runtime.policy import Policy


def kinds() -> dict[str, Any]:
    """Every kind of model of Atoll's own."""
    for module in pkgutil.iter_modules(atoll.models.__path__, "atoll.models."):
        importlib.import_module(module.name)
    return {name: cls for name, cls in KINDS.items() if cls.__module__.startswith("atoll.")}


load_installed()
ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SETTINGS: dict[str, type[BaseModel]] = {
    "Plan": Plan,
    "cohort": CohortRule,
    "run": RunSettings,
    "Schema": TableSchema,
    "columns": Column,
    "Recipe": Recipe,
    "sites.yaml": SourceSpec,
    "policy.yaml": Policy,
    "site.yaml": SiteConfig,
    "coordinator.yaml": CoordinatorConfig,
    **{name: cls.Params for name, cls in REGISTRY.items() if cls.__module__.startswith("atoll.")},
    **{f"model: {name}": cls.Spec for name, cls in kinds().items()},
}


def sections(text: str) -> dict[str, str]:
    """A document's text by heading (of any level), each up to the next heading."""
    parts = re.split(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> dict[str, list[str]]:
    """Rows of all tables in *text* whose first cell is `code`: code → the other cells."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0].strip("| `"): [cell.strip("| ") for cell in row[1:]] for row in cells if "`" in row[0]}


def keys(model: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    """(key as users write it, default or "*required*") of a model; of a learner made of FedAvg what it adds, or begins
    with otherwise; of a model's kind what is not in every kind's settings."""
    known = FederatedParams if model is not FederatedParams and issubclass(model, FederatedParams) else None
    known = Settings if issubclass(model, Settings) else known
    for name, field in model.model_fields.items():
        same = known and known.model_fields.get(name)
        if same and (known is Settings or same.default == field.default):
            continue
        required = field.is_required()
        default = "*required*" if required else to_jsonable_python(field.get_default(call_default_factory=True))
        yield field.alias or name, default


PLAN_PAGE = sections((ROOT / "docs" / "plan.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("heading", SETTINGS)
def test_every_setting_is_documented_with_its_default(heading: str) -> None:
    documented = rows(PLAN_PAGE[heading])
    expected = dict(keys(SETTINGS[heading]))
    assert set(documented) == set(expected)
    for key, default in expected.items():
        told = documented[key][1]
        assert default == (told if told == "*required*" else yaml.safe_load(told.strip("`"))), f"{heading}: {key}"


def test_every_recipe_step_is_documented() -> None:
    text = PLAN_PAGE["steps"]
    for name, step in STEPS.items():
        part = text[text.index(f"`{name}` ") :]
        table = part[: part.find("\n\n", part.index("\n|"))]
        assert set(rows(table)) == {key for key, _ in keys(step)}, name


def commands(group: Any, prefix: str = "atoll") -> Iterator[tuple[str, Any]]:
    """Every command with its full name."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


@pytest.mark.parametrize(("name", "command"), list(commands(typer.main.get_command(app))))
def test_every_command_and_option_is_in_the_operators_handbook(name: str, command: Any) -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert f"`{name}" in text
    line = next(line for line in text.splitlines() if line.startswith(f"| `{name}"))
    for option in command.params:
        if option.param_type_name == "option" and not option.hidden and option.name not in ("help", "home", "machine"):
            assert f"`{option.opts[0]}" in line, f"{name} {option.opts[0]}"


def error_codes() -> set[str]:
    """Codes of the errors that the source raises."""
    found: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        found |= set(re.findall(r'(?:\w+Error|_bad|_refused)\(\s*"([a-z-]+\.[a-z-]+)"', text))
        found |= set(re.findall(r'refuse_all\(\s*[^"]+,\s*"([a-z-]+\.[a-z-]+)"', text))
        found |= set(re.findall(r'"(schema\.[a-z-]+)",', text))
    return found


def test_every_error_code_is_explained() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    explained = {code for row in rows(text) for code in re.findall(r"[a-z-]+\.[a-z-]+", row)}
    assert error_codes() - explained == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        page = document.parent / name if name else document
        assert page.exists(), target
        if anchor:
            headings = sections(page.read_text(encoding="utf-8"))
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_documents_name_are_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:src|tests|docs|examples|benchmarks|script)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path
    rooms = "contract|runtime|transport|crypto|ledger|privacy|data|models|statistics|horizontal|cli|report"
    for path in re.findall(rf"`((?:{rooms})/[\w/]+\.py)`", text):
        assert (ROOT / "src" / "atoll" / path).exists(), path


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_readme_program_gives_the_pooled_mean(readme: str, federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    [source] = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "@program" in code]
    monkeypatch.setitem(REGISTRY, "example.federated_mean", None)  # so that it is gone afterwards
    exec(compile(source, readme, "exec"), {"__name__": "readme_program"})
    column = {"radius": {"range": [0, 100]}}
    tables = {
        site: federation.table({"radius": list(range(10 * i, 10 * i + 9))}, column) for i, site in enumerate("abc")
    }
    outcome = federation.run(federation.plan("example.federated_mean", {"column": "radius"}, tables), tables)
    assert outcome["result"] == {"mean": pytest.approx(14.0), "rows": 27}
