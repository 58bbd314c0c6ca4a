"""The source keeps its layers and its limits: docs/architecture.md shows them."""

from tests.project import architecture


def test_rooms_import_downwards_only_and_are_few():
    pairs = architecture.arrows()
    assert architecture.upward(pairs) == set()
    floors = architecture.floors(pairs)
    assert (len(floors) <= 16, max(floors.values()) <= 7, len(pairs) <= 60) == (True, True, True)


def test_no_product_imports_a_script_or_a_test():
    scripts = {path.stem for path in architecture.ROOT.glob("*.py")}
    for path in architecture.sources():
        names = {name.split(".")[0] for name in architecture.imports(path)}
        assert not names & scripts, path
        assert "tests" not in names or path.parent.name == "benchmarks", path


def test_files_functions_and_lines_are_short():
    assert architecture.train_script_lines() <= 320
    assert architecture.long_functions() == []
    assert architecture.long_lines() == []


def test_names_say_what_a_thing_holds():
    assert architecture.lines_with("found") < 40
