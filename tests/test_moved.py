"""Module paths of 0.1 give the modules that took their places, and say so."""

import subprocess
import sys

import pytest

from ddmd._moved import MOVED, MOVED_NAMES

CHILD = """
import importlib, sys, warnings
old, new = sys.argv[1:]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", FutureWarning)
    module = importlib.import_module(old)
    again = importlib.import_module(old)
assert module is again is importlib.import_module(new) is sys.modules[old]
assert module.__name__ == new and module.__spec__.name == new
said = [str(w.message) for w in caught if w.category is FutureWarning and old + " is now" in str(w.message)]
assert said == [f"{old} is now {new}; the old name goes in the next release"], said
package, _, name = old.rpartition(".")
assert getattr(sys.modules[package], name) is module
"""


@pytest.mark.parametrize("old", ["ddmd.volume", "ddmd.weights", "ddmd.nifti", "ddmd.training.painting"])
def test_an_old_module_is_the_new_one_with_one_warning(old):
    result = subprocess.run([sys.executable, "-c", CHILD, old, MOVED[old]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_old_name_leads_to_a_module_that_is_there():
    import importlib.util

    for old, new in MOVED.items():
        assert importlib.util.find_spec(new) is not None, f"{old} leads to {new}"


def test_other_missing_modules_are_still_missing():
    with pytest.raises(ModuleNotFoundError, match=r"ddmd\.nothing"):
        __import__("ddmd.nothing")


def test_no_module_of_the_package_is_imported_by_an_old_name():
    code = "import warnings; warnings.simplefilter('error', FutureWarning); import ddmd.cli, ddmd.inference.detector, ddmd.training.run"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in MOVED_NAMES.items() for name in names]
)
def test_a_name_that_left_its_module_is_found_with_a_warning(module, name):
    import importlib

    with pytest.warns(FutureWarning, match=f"{name} is now"):
        old = getattr(importlib.import_module(module), name)
    assert old is getattr(importlib.import_module(MOVED_NAMES[module][name]), name)


def test_the_other_names_of_a_module_in_parts_are_those_of_its_successor():
    with pytest.warns(FutureWarning):
        from ddmd.data.datasets import Case, find_cases
    from ddmd.cohort import cases, discovery

    assert (Case, find_cases) == (cases.Case, discovery.find_cases)
    with pytest.raises(ImportError, match="nothing"):
        from ddmd.diffusion import nothing  # noqa: F401


def test_methods_of_a_detector_keep_their_old_names_with_a_warning():
    from ddmd.inference.detector import RENAMED, Detector

    detector = Detector.load(device="cpu")
    for old, new in RENAMED.items():
        with pytest.warns(FutureWarning, match=f"is now Detector.{new}"):
            assert getattr(detector, old) == getattr(detector, new)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = detector.nothing
