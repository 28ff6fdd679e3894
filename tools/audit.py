"""Is anything known to be wrong with what we ship, or with how? ``nox -s audit`` runs this.

    python tools/audit.py PYTHON [--strict] [--sbom FILE]

PYTHON is the interpreter of an environment that holds our wheels and what they need, and nothing
else. Each question is a function that returns what it found, one line each. All but one work
offline: the list of known vulnerabilities is asked over the network. Where that cannot be reached it
says so and goes on; ``--strict`` makes it a finding.
"""

import argparse
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Licences that ask for no more than to be told of, or, as the MPL, hold for their own files alone.
ALLOWED = {
    "Apache-2.0", "Apache Software License", "BSD", "BSD License", "BSD-2-Clause", "BSD-3-Clause",
    "0BSD", "ISC", "MIT", "MIT License", "MPL-2.0", "Mozilla Public License 2.0 (MPL 2.0)",
    "PSF-2.0", "Python Software Foundation License", "Unlicense", "Zlib",
}  # fmt: skip

# Lines that may hold a key: 20 characters without a gap, letters and digits; or the head of a file.
MAY_BE_KEY = r"(?=[\w+/=.-]*\d)(?=[\w+/=.-]*[A-Za-z])[\w+/=.-]{20}|PRIVATE KEY"
# What the tests make up says so: canary, example, or digits in a row.
MADE_UP = re.compile(r"(?i)canary|example|0123456789|1234567890")
# Not looked for: any text that looks random (digests are full of it), and public addresses.
TOO_WIDE = {"Base64HighEntropyString", "HexHighEntropyString", "IPPublicDetector"}

OSV = "https://api.osv.dev/v1/query"


def ask(*command: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return what it said."""
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)


def answer(*command: object, cwd: Path = ROOT) -> str:
    """Return what a command wrote; it must not fail."""
    done = ask(*command, cwd=cwd)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def installed(python: Path) -> dict[str, str]:
    """Return the licence of each package of an environment, by ``name version``."""
    told = answer(
        sys.executable, "-m", "piplicenses", f"--python={python}", "--from=mixed", "--format=json"
    )
    return {f"{row['Name']} {row['Version']}": row["License"] for row in json.loads(told)}


def is_allowed(licence: str) -> bool:
    """Tell whether we may ship with it: each licence that it names has to be allowed, also of two
    that one may choose from.
    """
    names = [name.strip() for name in re.split(r"\s+(?:AND|OR)\s+|;", licence)]
    return all(name in ALLOWED or name.strip("()") in ALLOWED for name in names)


def licences(python: Path) -> list[str]:
    """Print every package that a user gets with ours, and find those whose licence is not allowed."""
    found = installed(python)
    for package, licence in found.items():
        print(f"{package:40} {licence}")
    return [
        f"{package}: licence {text!r}" for package, text in found.items() if not is_allowed(text)
    ]


def bill_of_materials(python: Path, into: Path) -> list[str]:
    """Write a CycloneDX list of what is installed, and find what it leaves out."""
    answer(
        sys.executable, "-m", "cyclonedx_py", "environment", python, "--output-reproducible",
        "--mc-type", "library", "--output-file", into.resolve(),
    )  # fmt: skip
    listed = json.loads(into.read_text(encoding="utf-8")).get("components", [])
    named = {f"{part['name']} {part['version']}" for part in listed}
    print(f"{len(named)} packages in {into.name}")
    return [
        f"{package} is not in the bill of materials" for package in installed(python).keys() - named
    ]


def secrets(folder: Path) -> list[str]:
    """Find keys and passwords in the files that git tracks.

    ``pragma: allowlist secret`` in a line lets it pass.
    """
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.core.scan import scan_line
    from detect_secrets.settings import transient_settings

    kinds = {kind.__name__ for kind in get_mapping_from_secret_type_to_class().values()}
    # the detectors need half a minute for all lines, and none for these
    grep = ask("git", "grep", "-nIP", "-e", MAY_BE_KEY, cwd=folder)
    if grep.returncode > 1:  # 1 says that there are none
        raise SystemExit(f"git grep failed:\n{grep.stderr}")
    lines = grep.stdout.splitlines()
    print(f"{len(lines)} lines that may hold a key")
    found = []
    with transient_settings({"plugins_used": [{"name": kind} for kind in kinds - TOO_WIDE]}):
        for line in lines:
            path, number, text = line.split(":", 2)
            kept = [s for s in scan_line(text) if not MADE_UP.search(s.secret_value or "")]
            found += [f"{path}:{number}: {secret.type}" for secret in kept]
    return found


def workflows(folder: Path) -> list[str]:
    """Find what is unsafe in the workflows below ``.github``."""
    zizmor = Path(sysconfig.get_path("scripts")) / "zizmor"
    options = ("--offline", "--pedantic", "--no-progress", "--format=plain", "--strict-collection")
    done = ask(zizmor, *options, ".github", cwd=folder)
    print(done.stdout or done.stderr)
    return ["zizmor has findings in .github"] if done.returncode else []


def vulnerabilities(python: Path, *, strict: bool, url: str = OSV) -> list[str]:
    """Find packages with known vulnerabilities, and if strict, those that could not be asked about."""
    place = answer(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    options = ("--path", place, "--format=json", "--progress-spinner=off", "--timeout=10")
    done = ask(
        sys.executable, "-m", "pip_audit", *options, "--vulnerability-service=osv", "--osv-url", url
    )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        why = (done.stderr.strip() or "no answer").splitlines()[-1]
        packages = [{"name": "all packages", "skip_reason": why}]
    skipped = [f"{one['name']}: {one['skip_reason']}" for one in packages if "skip_reason" in one]
    for line in skipped:
        print(f"NOT ASKED ABOUT {line}")
    print(f"{len(packages) - len(skipped)} packages asked about")
    known = [
        f"{one['name']} {one['version']}: {flaw['id']}, mended in {flaw['fix_versions'] or 'none'}"
        for one in packages
        for flaw in one.get("vulns", ())
    ]
    return known + [f"not asked about {line}" for line in skipped if strict]


def main() -> int:
    """Ask everything, and say at the end what was found."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("python", type=Path, help="of an environment with our wheels")
    options.add_argument("--strict", action="store_true", help="nothing may be left out")
    options.add_argument("--sbom", type=Path, help="keep the bill of materials here")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sbom = given.sbom or Path(scratch) / "feste.cdx.json"
        questions = {
            "licences": lambda: licences(given.python),
            "bill of materials": lambda: bill_of_materials(given.python, sbom),
            "secrets in tracked files": lambda: secrets(ROOT),
            "workflows": lambda: workflows(ROOT),
            "known vulnerabilities": lambda: vulnerabilities(given.python, strict=given.strict),
        }
        found = []
        for title, question in questions.items():
            print(f"\n--- {title}", flush=True)
            found += question()
    print("\n--- findings:", *(found or ["none"]), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
