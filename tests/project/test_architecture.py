"""The source keeps its layers and its limits: docs/architecture.md shows them."""

from tests.project import architecture


def test_packages_import_downwards_only_and_are_few():
    pairs = architecture.imports()
    assert architecture.upward(pairs) == set()
    layers = architecture.layers(pairs)
    assert (len(layers) <= 18, max(layers.values()) <= 7, len(pairs) <= 77) == (True, True, True)


def test_no_product_imports_a_script_or_a_test():
    scripts = {path.stem for path in architecture.ROOT.glob("*.py")}
    for path in architecture.sources():
        names = {name.split(".")[0] for name in architecture.imported_names(path)}
        assert not names & scripts, path
        assert "tests" not in names or path.parent.name == "benchmarks", path


def test_files_functions_and_lines_are_short():
    assert architecture.train_script_lines() <= 320
    assert architecture.long_functions() == []
    assert architecture.long_lines() == []


def test_names_say_what_a_thing_holds():
    assert architecture.lines_with("found") < 40
