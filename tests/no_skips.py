"""Pytest plugin (`-p tests.no_skips`): only tests marked `gpu` may be skipped.

A skip hides a test that would fail, and an expected failure is a fault that nobody mends: both are
reported as failures, as is a whole file that skips itself.
"""

from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, object]:
    report = yield
    expected_to_fail = hasattr(report, "wasxfail")
    if (report.skipped or expected_to_fail) and item.get_closest_marker("gpu") is None:
        what = "expected to fail" if expected_to_fail else "skipped"
        report.longrepr = (
            f"{item.nodeid} was {what}; only tests marked gpu may be ({report.longrepr})"
        )
        report.outcome = "failed"
        if expected_to_fail:
            del report.wasxfail
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, object]:
    report = yield
    if report.skipped:
        report.longrepr = f"{collector.nodeid} skips itself as a whole ({report.longrepr})"
        report.outcome = "failed"
    return report
