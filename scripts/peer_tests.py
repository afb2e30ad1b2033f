"""Run the common model tests of the installed Transformers on our classes.

The tests come with the library's source package, which is downloaded by name and version; nothing of it is kept in
this repository. Every failure has to be named, with its reason, in tests/peer/differences.yaml.
"""

import argparse
import fnmatch
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import transformers
import yaml


PEER_FOLDER = Path(__file__).parents[1] / "tests" / "peer"
# Modules that the library's tests import and its source package leaves out. Two are mixins with tests of generation
# and export; tests/models checks the documented behaviour instead. The last finds copies of images from the web.
LEFT_OUT = {
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    "fetch_hub_objects_for_ci.py": "url_to_local_path = str\n",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("build/peer-tests"), help="where to put the tests")
    parser.add_argument("--workers", default="2", help="number of test processes")
    parser.add_argument("--keyword", default="", help="run only tests that match, as in pytest -k")
    args = parser.parse_args()
    tests = fetch_tests(args.folder / f"transformers-{transformers.__version__}")
    (tests / "test_flextok.py").write_text((PEER_FOLDER / "library_tests.py").read_text())
    outcomes = run_tests(tests, args.workers, args.keyword)
    return report(outcomes, yaml.safe_load((PEER_FOLDER / "differences.yaml").read_text()), bool(args.keyword))


def fetch_tests(folder: Path) -> Path:
    """Download the source package of the installed version unless it is there; returns its `tests` folder."""
    if not (folder / "tests").is_dir():
        package = f"transformers=={transformers.__version__}"
        options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder.parent)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, package], check=True)
        with tarfile.open(folder.parent / f"{folder.name}.tar.gz") as archive:
            archive.extractall(folder.parent, filter="data")
    tests = folder / "tests"
    (tests / "__init__.py").touch()
    for name, content in LEFT_OUT.items():
        module = tests / name
        if not module.exists():
            module.parent.mkdir(exist_ok=True)
            (module.parent / "__init__.py").touch()
            module.write_text(content)
    return tests


def run_tests(tests: Path, workers: str, keyword: str) -> dict[str, tuple[str, str]]:
    """Run the tests in a process of their own; returns outcome and message by `Class::test`."""
    results = (tests.parent / "results.xml").resolve()
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--rootdir", ".", "-n", workers, f"--junit-xml={results}", "-k", keyword, "tests/test_flextok.py"]
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.resolve())}
    with open(tests.parent / "log.txt", "w") as log:
        subprocess.run(command, cwd=tests.parent, env={**os.environ, **settings}, stdout=log, stderr=subprocess.STDOUT)
    if not results.exists():
        raise SystemExit(f"The tests did not run; {tests.parent / 'log.txt'} says why.")
    outcomes = {}
    for case in ElementTree.parse(results).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = "passed" if problem is None else "skipped" if problem.tag == "skipped" else "failed"
        message = "" if problem is None else problem.get("message", "").split("\n")[0][:200]
        outcomes[f"{case.get('classname').rsplit('.', 1)[-1]}::{case.get('name')}"] = outcome, message
    if not outcomes:
        raise SystemExit(f"No test ran; {tests.parent / 'log.txt'} says why.")
    return outcomes


def report(outcomes: dict[str, tuple[str, str]], differences: list[dict], is_partial: bool) -> int:
    """Print counts by class and all failures; returns 1 if one is not a listed difference, or a listed one passed."""
    counts = Counter((name.split("::")[0], outcome) for name, (outcome, _) in outcomes.items())
    for group in sorted({group for group, _ in counts}):
        print(group, ", ".join(f"{counts[group, outcome]} {outcome}" for outcome in ("passed", "failed", "skipped")))
    failures = {name: message for name, (outcome, message) in outcomes.items() if outcome == "failed"}
    unexpected = dict(failures)
    stale = []
    for difference in differences:
        patterns = difference["tests"]
        hits = [name for name in failures if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if hits:
            print(f"\n{difference['reason']}\n  {len(hits)} tests: {', '.join(hits)}")
        unexpected = {name: message for name, message in unexpected.items() if name not in hits}
        stale += [p for p in patterns if not is_partial and not fnmatch.filter(failures, p)]
    for message in dict.fromkeys(unexpected.values()):
        names = [name for name, of_this in unexpected.items() if of_this == message]
        print(f"\nNot a listed difference: {message}\n  {len(names)} tests: {', '.join(names)}")
    for pattern in stale:
        print(f"\nListed as a difference, but nothing fails: {pattern}")
    return int(bool(unexpected or stale))


if __name__ == "__main__":
    sys.exit(main())
