"""The catalogue: seventy rows, and every part of a ready row resolves."""

import importlib
import json
import re
import textwrap
from collections import Counter
from pathlib import Path

import pytest

import workbench
from workbench import catalogue
from workbench.catalogue import FAMILIES, Method, methods
from workbench.errors import InputError

ROOT = catalogue.PACKAGE.parent
READY = list(methods(status="ready"))
SIZES = {
    "routing": 4, "sharing": 5, "subspaces": 2, "lora_experts": 10, "adapters": 5, "low_rank": 5, "merging": 5,
    "modality": 4, "attention": 2, "data_mixtures": 3, "distributed": 5, "serving": 4, "features": 2, "search": 5,
    "imaging": 6, "dynamics": 2, "kernels": 1,
}  # fmt: skip


def test_all_seventy_systems_are_listed_once():
    rows = methods()
    assert len(rows) == 70
    assert Counter(row.family for row in rows) == SIZES
    assert [slug for slug, count in Counter(row.slug for row in rows).items() if count > 1] == []


@pytest.mark.parametrize("place", ["README.md", "the docstring of workbench"])
def test_readme_and_the_docstring_say_which_systems_stand(place: str):
    families = [", ".join(row.slug for row in READY if row.family == family) + f" ({family})" for family in FAMILIES]
    standing = "; ".join(family for family in families if not family.startswith(" ("))
    text = workbench.__doc__ if place != "README.md" else (ROOT / place).read_text()
    said = " ".join(text.replace("`", "").split())
    rest = "The others are planned" if len(READY) < len(methods()) else ""
    assert f"{len(READY)} of the {len(methods())} stand today: {standing}. {rest}" in said


def test_rows_come_in_the_order_of_the_families():
    numbers = [list(FAMILIES).index(row.family) for row in methods()]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("row", methods(), ids=lambda row: row.slug)
def test_a_row_says_what_it_has_to(row: Method):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", row.slug)
    assert 2015 <= row.year <= 2030
    assert row.title == row.title.strip() and len(row.title) < 140
    assert row.claim.endswith(".") and "\n" not in row.claim and 40 < len(row.claim) < 240
    # a preprint is named by its number, a paper by its venue and year
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", row.paper) or re.search(r"20\d\d$", row.paper)


def test_the_numbers_of_the_preprints_differ_and_fit_the_years():
    numbers = [row.paper for row in methods() if row.paper.startswith("arXiv:")]
    assert len(set(numbers)) == len(numbers)
    for row in methods():
        if match := re.match(r"arXiv:(\d\d)", row.paper):
            assert 2000 + int(match[1]) == row.year, row.slug


@pytest.mark.parametrize("row", READY, ids=lambda row: row.slug)
def test_a_ready_row_has_every_file_that_the_readme_names(row: Method):
    """README's list is written for one system; its files are there for each of them."""
    text = (ROOT / "README.md").read_text().partition("## Adding a method")[2].partition("\n## ")[0]
    files = re.findall(r"`([\w./]+\.(?:py|csv|ipynb|md|json))`", text)
    assert len(files) >= 10 and "workbench/lib/routing/rmoe.py" in files
    for file in files:
        file = file.replace("rmoe", row.path.stem).replace("01_routing", Path(row.notebook).stem)
        assert (ROOT / file.replace("/routing/", f"/{row.family}/")).is_file()


@pytest.mark.parametrize("row", READY, ids=lambda row: row.slug)
def test_every_part_of_a_ready_row_resolves(row: Method):
    module = importlib.import_module(row.module)
    assert row == module.METHOD, "the literal arguments and the imported METHOD differ"
    assert Path(module.__file__) == row.path
    assert row.adapts is hasattr(module, "ADAPTER")

    objects = row.resolve()
    assert objects, "a ready system names the objects to call"
    for name, value in objects.items():
        assert not name.startswith("_") and value.__doc__, name
    assert row.example is None or callable(getattr(module, row.example))
    assert row.kind in catalogue.KINDS if row.example else row.kind is None

    study = importlib.import_module(row.study).STUDY
    assert study.slug == row.slug

    cells = json.loads((ROOT / row.notebook).read_text())["cells"]
    headings = [line for cell in cells if cell["cell_type"] == "markdown"
                for line in "".join(cell["source"]).splitlines() if line.startswith("#")]  # fmt: skip
    assert any(f"`{row.slug}`" in line for line in headings), f"no heading of {row.notebook} names `{row.slug}`"


@pytest.mark.parametrize("row", READY, ids=lambda row: row.slug)
def test_a_ready_row_prints_how_to_build_it(row: Method):
    text = repr(row)
    assert row.claim.split()[0] in text and row.notebook in text and f"workbench study {row.slug}" in text
    assert f"from {row.module} import" in text
    assert ", ".join(filter(None, (row.family, row.kind, str(row.year)))) in text
    assert row.example is None or f"def {row.example}()" in text


def test_a_planned_row_prints_where_it_will_be_and_promises_nothing(planned):
    row = catalogue.method(planned.slug)
    assert "does not stand yet" in repr(row) and row.object_path() in repr(row)
    assert (row.object, row.study, row.notebook, row.resolve()) == (None, None, None, {})
    assert row.kind is None and f"{row.family}, {row.year}" in repr(row)
    with pytest.raises(InputError, match=f"{row.slug} is planned"):
        row.build_example()


def test_files_of_systems_carry_the_name_of_their_slug():
    for row in catalogue.read_registered():
        assert row.path.is_file(), f"{row.slug} registers from another file than {row.path}"
        assert row.status == "ready"


def test_filters_and_near_names(planned):
    assert {row.family for row in methods("merging")} == {"merging"}
    assert {row.status for row in methods(status="planned")} == {"planned"} and planned in methods(status="planned")
    with pytest.raises(InputError, match="family 'mergin' is unknown; did you mean 'merging'"):
        methods("mergin")
    with pytest.raises(InputError, match="status 'redy' is unknown; did you mean 'ready'"):
        methods(status="redy")
    with pytest.raises(InputError, match="slug 'remx' is unknown; did you mean 'remix'"):
        catalogue.method("remx")


def test_the_table_shows_itself():
    table = methods("attention")
    assert repr(table).splitlines()[-1] == f"2 methods, {sum(row.ready for row in table)} ready"
    page = table._repr_html_()
    assert page.count("<tr>") == 3 and "moba" in page
    assert "<b>" not in catalogue.MethodTable([example(title="<b>bold</b>")])._repr_html_()


def test_a_row_is_plain_values():
    row = catalogue.method("remix")
    plain = json.loads(json.dumps(row.as_dict()))
    assert (plain["slug"], plain["kind"]) == ("remix", "layer")


def example(**changed) -> Method:
    plain = {"slug": "a-b", "title": "A", "family": "routing", "year": 2024, "paper": "X 2024", "claim": "C."}
    return Method(**plain | changed)


def write(folder: Path, source: str) -> Path:
    path = folder / "a_b.py"
    path.write_text(textwrap.dedent(source))
    return path


def test_a_file_is_read_without_being_imported(tmp_path: Path):
    source = """
        import nothing_of_that_name
        from workbench.catalogue import Method

        METHOD = Method(
            slug="a-b", title="A", family="routing", year=2024, paper="X 2024", claim="C.", objects=("F", "G")
        )
        """
    assert catalogue.read_method(write(tmp_path, source)) == example(objects=("F", "G"))


def test_a_part_that_systems_share_is_no_row(tmp_path: Path):
    assert catalogue.read_method(write(tmp_path, "# METHOD is assigned elsewhere\nx = 1")) is None


@pytest.mark.parametrize("value", ["Method(slug=NAME)", "Method('a-b')", "Method(slug='a-b')", "NAME", "Method(**ROW)"])
def test_a_row_that_cannot_be_read_names_its_file(tmp_path: Path, value: str):
    with pytest.raises(TypeError, match=r"a_b\.py: METHOD must be Method\(\.\.\.\) with literal keyword arguments"):
        catalogue.read_method(write(tmp_path, f"METHOD = {value}"))


def test_a_slug_in_both_places_is_seen(tmp_path: Path):
    """The test above that counts slugs can fail: a registered system is not taken out of the plain table."""
    family = tmp_path / "routing"
    family.mkdir()
    (family / "x.py").write_text(
        "METHOD = Method(slug='a-b', title='A', family='routing', year=2024, paper='X 2024', claim='C.')"
    )
    table = tmp_path / "planned.csv"
    table.write_text("slug,family,year,paper,title,claim\na-b,routing,2024,X 2024,A,C.\n")
    slugs = [row.slug for row in [*catalogue.read_registered(tmp_path), *catalogue.read_planned(table)]]
    assert slugs.count("a-b") == 2
