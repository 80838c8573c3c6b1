"""A headless Chromium for tests. It reaches nothing but this machine: every other name resolves nowhere."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def chromium(folder: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> Iterator:
    "A Selenium driver whose profile lives in `folder`; the test is skipped, with the reason, where no Chromium is"
    found, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if not (found and driver):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = found
    quiet = ["sync", "background-networking", "component-update", "default-apps", "gpu", "quic"]
    switches = ["headless", "no-sandbox", "no-first-run", f"window-size={width},{height}", f"user-data-dir={folder}"]
    switches += [f"disable-{s}" for s in quiet] + ["host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost"]
    switches += ["force-dark-mode", "blink-settings=preferredColorScheme=0"] if dark else []
    for switch in switches:
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        yield browser
    finally:
        browser.quit()
