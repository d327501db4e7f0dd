"""Runs another project's tests, unchanged, with pytest: `run.py ARGUMENTS`, in the suite's folder.

The server is the one that libpq's variables name. What became of each test goes to the file that
PGSILO_OUTCOMES names, as JSON.
"""

import json
import os
import sys

PACKAGES = os.path.join(os.environ["PGSILO_SUITES"], "packages")
sys.path[:0] = [os.getcwd(), PACKAGES]
# For the programs that tests start.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [PACKAGES, os.environ.get("PYTHONPATH")]))

import pytest  # noqa: E402


class Outcomes:
    """What became of each test: `passed`, `skipped`, `failed`, `error` in its setup or teardown, each with
    the type of the exception; with subtests all of them, told once."""

    def __init__(self):
        self.of = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, call):
        report = (yield).get_result()
        report.raised = call.excinfo.typename if call.excinfo else None

    def pytest_runtest_logreport(self, report):
        outcome = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if outcome == "skipped" else "xpassed"
        elif outcome == "failed":
            kind = "failed" if report.when == "call" else "error"
            outcome = f"{kind}:{getattr(report, 'raised', None)}"
        # A test that passed and one whose teardown failed are not the same.
        if report.when == "call" or outcome != "passed":
            self.of.setdefault(report.nodeid, set()).add(outcome)

    def pytest_sessionfinish(self):
        told = {test: " ".join(sorted(outcomes)) for test, outcomes in self.of.items()}
        with open(os.environ["PGSILO_OUTCOMES"], "w", encoding="utf-8") as file:
            json.dump(told, file, indent=0, sort_keys=True)


class Names:
    """Two suites insist on the names `postgres`, as which no application should log in."""

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        """pg8000's."""
        made = yield
        if fixturedef.argname == "db_kwargs":
            made.get_result().update(user=os.environ["PGUSER"], database=os.environ["PGDATABASE"])

    def pytest_sessionstart(self):
        """asyncpg's, whose tests of pools and listeners name the database."""
        if os.environ["PGSILO_SUITE"] != "asyncpg":
            return
        from asyncpg._testbase import ClusterTestCase

        given = ClusterTestCase.get_connection_spec.__func__

        def get_connection_spec(cls, kwargs={}):
            made = given(cls, kwargs)
            if made.get("database") == "postgres":
                made["database"] = os.environ["PGDATABASE"]
            return made

        ClusterTestCase.get_connection_spec = classmethod(get_connection_spec)


sys.exit(pytest.main(sys.argv[1:], plugins=[Outcomes(), Names()]))
