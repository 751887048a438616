"""What a person sees of a sweep: MLflow's pages and its report, in headless Chromium.

The pages are MLflow's own, so what is looked up in them (titles, classes) is that of its version.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.clusters import free_ports
from tests.test_tracking_kill import server
from tune.follow import shown

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
OUTPUT = Path(__file__).parents[1] / "test-output"
PANEL = "[role=tabpanel][data-state=active]"
AXES = ".pcp-plot .axis-title"
HARMLESS = "/mlflow/users/current "  # asked for by every page; a server without users has none


@dataclass
class Browser:
    """Chromium on the pages of one MLflow server."""

    driver: webdriver.Chrome
    uri: str

    def open(self, route: str) -> None:
        self.driver.get("about:blank")  # a change after the # alone would load nothing
        self.driver.get(f"{self.uri}/#{route}")

    def until(self, what: str, true: Callable[[], Any]) -> Any:
        wait = WebDriverWait(self.driver, 60, ignored_exceptions=[WebDriverException])
        return wait.until(lambda _: true(), f"the page never showed: {what}")

    def find(self, xpath: str) -> WebElement:
        return self.until(xpath, lambda: self.driver.find_element(By.XPATH, xpath))

    def click(self, xpath: str) -> None:
        self.until(xpath, lambda: self.driver.find_element(By.XPATH, xpath).click() or True)

    def texts(self, css: str) -> list[str]:
        return [found.text for found in self.driver.find_elements(By.CSS_SELECTOR, css)]

    def keep(self, name: str) -> None:
        """Keep a picture of the page, which has complained of nothing."""
        OUTPUT.mkdir(exist_ok=True)
        self.driver.save_screenshot(OUTPUT / f"{name}.png")
        log = [line for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]
        assert [line["message"] for line in log if HARMLESS not in line["message"]] == []


@dataclass
class Sweep:
    """The finished sweep: its run, its experiment, and what its report says of each trial."""

    run: str
    experiment: str
    ids: dict[str, str]
    trials: list[dict[str, Any]]
    pictures: int

    def points(self, *columns: str) -> list[tuple[float, ...]]:
        return sorted(tuple(trial[name] for name in columns) for trial in self.trials)


@pytest.fixture(scope="module")
def uri(swept) -> Iterator[str]:
    (port,) = free_ports(1)
    with server(swept[0] / "mlflow", port, "mlflow.db") as uri:
        yield uri


@pytest.fixture(scope="module")
def sweep(swept, uri) -> Sweep:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("loram").experiment_id
    ended = "tags.stage = 'sweep' and attributes.status = 'FINISHED'"
    (run,) = client.search_runs([experiment], ended)
    nested = f"tags.stage = 'trial' and tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    ids = {r.data.tags["trial"]: r.info.run_id for r in client.search_runs([experiment], nested)}
    report = swept[0] / "store" / "reports" / run.info.run_name
    trials = json.loads((report / "trials.json").read_text())
    assert len({trial["steps"] for trial in trials}) == 2, "no trial was stopped early"
    pictures = len(list(report.glob("*.svg")))
    return Sweep(run.info.run_id, experiment, ids, trials, pictures)


@pytest.fixture
def browser(uri, tmp_path) -> Iterator[Browser]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.fail("no Chromium: apt-get install chromium chromium-driver", pytrace=False)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in (
        "headless=new",
        "no-sandbox",  # root has none
        "disable-dev-shm-usage",
        "disable-features=IsolateSandboxedIframes",  # or the log lacks what a report says
        "window-size=1600,1200",
        f"user-data-dir={tmp_path / 'profile'}",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chrome:
        yield Browser(chrome, uri)


@pytest.fixture
def comparison(browser, sweep) -> Browser:
    """The browser on the page that compares all trials."""
    runs, experiments = (json.dumps(x) for x in (list(sweep.ids.values()), [sweep.experiment]))
    browser.open(f"/compare-runs?runs={runs}&experiments={experiments}")
    browser.find(f"//h2[contains(., 'Comparing {len(sweep.trials)} Runs')]")
    return browser


def plotted(browser: Browser, figure: str, of: str) -> Any:
    """What Plotly holds of a figure that is shown: `of` is JavaScript on its `data`."""
    return browser.driver.execute_script(f"return document.querySelector('{figure}').data{of}")


def test_the_comparison_has_a_column_for_every_trial(comparison, sweep):
    names = "//th[.='Run Name:']/following-sibling::td"
    comparison.find(names)
    found = [cell.text for cell in comparison.driver.find_elements(By.XPATH, names)]
    varied = ["prune.ratio", "sft.lr"]  # also MLflow's first choice of axes, with some metric
    values = [{name: trial[name] for name in varied} for trial in sweep.trials]
    assert sorted(found) == sorted(map(shown, values))
    comparison.until(f"axes {varied}", lambda: comparison.texts(AXES)[:2] == varied)
    comparison.keep("comparison")


def test_parallel_coordinates_have_a_line_for_every_trial(comparison, sweep):
    comparison.click("//button[.='Clear All']")
    for title, name in (
        ("Parameters:", "prune.ratio"),
        ("Parameters:", "sft.lr"),
        ("Metrics:", "large_loss"),
    ):
        field = f"//div[.='{title}']/following-sibling::div[1]//input"
        comparison.click(field)
        comparison.find(f"{field}[@aria-expanded='true' and not(@readonly)]").send_keys(name)
        comparison.click(f"//*[@title='{name}' and contains(@class, 'select-item-option')]")
        comparison.find(field).send_keys(Keys.ESCAPE)  # its list would lie over the next field
        comparison.find(f"{field}[@aria-expanded='false']")

    axes = ["prune.ratio", "sft.lr", "large_loss"]
    comparison.until(f"the axes {axes}", lambda: comparison.texts(AXES) == axes)
    drawn = plotted(comparison, ".pcp-plot", "[0].dimensions.map(d => [d.label, d.values])")
    assert [label for label, _ in drawn] == axes
    lines = sorted(zip(*(values for _, values in drawn), strict=True))
    assert lines == sweep.points(*axes)
    comparison.keep("parallel-coordinates")


def test_the_scatter_plot_has_a_point_for_every_trial(comparison, sweep):
    comparison.click("//button[.='Scatter Plot']")
    axes = {"x": "sft.lr", "y": "large_loss"}
    for axis, name in axes.items():
        comparison.click(f"//button[@id='{axis}-axis-selector']")
        comparison.click(f"//*[@role='option'][.='{name}']")
    figure = f"{PANEL} .js-plotly-plot"
    comparison.until(
        f"the axes {axes}",
        lambda: (
            [comparison.texts(f"{figure} .{axis}title")[0] for axis in axes] == list(axes.values())
        ),
    )
    x, y = plotted(comparison, figure, ".map(d => [d.x, d.y])[0]")
    assert sorted(zip(map(float, x), y, strict=True)) == sweep.points(*axes.values())
    comparison.keep("scatter")


def test_the_report_opens_from_the_artifacts_of_the_sweep(browser, sweep):
    browser.open(f"/experiments/{sweep.experiment}/runs/{sweep.run}/artifacts")
    browser.click("//div[text()='report']")
    browser.click("//div[text()='report.html']")
    browser.driver.switch_to.frame(browser.find("//iframe[contains(@class, 'html-iframe')]"))
    browser.find("//h1[starts-with(., 'LoRAM sweep')]")
    first = browser.texts("table:first-of-type tr td:first-child")
    assert set(first) >= {trial["trial"] for trial in sweep.trials}
    script = "return [...document.images].filter(i => i.naturalWidth).length"
    loaded = browser.until("the pictures", lambda: browser.driver.execute_script(script))
    assert loaded == sweep.pictures == len(browser.driver.find_elements(By.TAG_NAME, "img"))
    browser.keep("report")


def test_the_page_of_a_stopped_trial_has_its_curve(browser, sweep):
    trial = min(sweep.trials, key=lambda trial: trial["steps"])
    run = sweep.ids[trial["trial"]]
    browser.open(f"/experiments/{sweep.experiment}/runs/{run}/model-metrics")
    card = browser.find("//*[contains(@data-testid, 'runs-card')][.//h4[@title='loss']]")
    browser.driver.execute_script("arguments[0].scrollIntoView()", card)
    script = "return arguments[0].querySelector('.js-plotly-plot').data.map(d => [d.x, d.y])[0]"
    x, y = browser.until("the curve", lambda: browser.driver.execute_script(script, card))
    assert x == list(range(1, trial["steps"] + 1)) and all(map(math.isfinite, y))
    browser.keep("curves")
