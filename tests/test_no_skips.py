"""The plugin that fails a run in which a test was skipped: seen from runs of its own."""

import pytest

pytest_plugins = "pytester"


@pytest.fixture
def outcomes(pytester):
    def run(source: str) -> tuple[int, dict[str, int]]:
        pytester.makepyfile(f"import pytest\n{source}")
        pytester.makeini("[pytest]\nmarkers =\n    gpu: may be skipped\n")
        result = pytester.runpytest("-p", "tests.no_skips")
        return result.ret, result.parseoutcomes()

    return run


def test_a_passing_run_and_a_skipped_gpu_test_are_left_alone(outcomes):
    source = """
def test_one(): pass
@pytest.mark.gpu
@pytest.mark.skipif(True, reason="no GPU")
def test_two(): assert False
"""
    assert outcomes(source) == (0, {"passed": 1, "skipped": 1})


@pytest.mark.parametrize(
    "body",
    [
        "def test(): pytest.skip('later')",
        "@pytest.mark.skip\ndef test(): pass",
        "@pytest.mark.skipif(True, reason='here')\ndef test(): pass",
        "@pytest.mark.xfail\ndef test(): assert False",
        "@pytest.mark.xfail\ndef test(): pass",
        "def test(): pytest.xfail('known')",
        "@pytest.fixture\ndef x(): pytest.skip('no x')\ndef test(x): pass",
    ],
)
def test_any_other_skip_or_expected_failure_fails_the_run(outcomes, body):
    code, counts = outcomes(f"{body}\ndef test_other(): pass")
    assert code == 1
    assert counts["passed"] == 1 and counts.get("failed", 0) + counts.get("errors", 0) == 1
    assert not {"skipped", "xfailed", "xpassed"} & set(counts)


def test_a_file_that_skips_itself_fails_the_run(outcomes):
    code, counts = outcomes("pytest.importorskip('no_such_package')\ndef test(): pass")
    assert code != 0 and counts == {"errors": 1}
