"""The documents are true where a program can tell: links lead somewhere, named commands exist, READMEs stay short."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "model", "indexes", "rag", "eval")
MAX_ROOM_LINES = 80


def main() -> None:
    """Print every fault and exit with 1 if there is one."""
    documents = [path for path in ROOT.rglob("*.md") if not _is_foreign(path)]
    faults = [fault for path in documents for fault in _document_faults(path)]
    faults += [fault for room in ROOMS for fault in _room_readme(ROOT / room / "README.md")]
    faults += _versions()
    if faults:
        sys.exit("\n".join(faults))
    print(f"docs: {len(documents)} documents checked")


def _document_faults(path: Path) -> list[str]:
    return [*_broken_links(path), *_unknown_commands(path), *_placeholders(path)]


def _is_foreign(path: Path) -> bool:
    parts = path.relative_to(ROOT).parts
    return parts[0] in {".venv", "build", "dist", ".typing"} or parts[:2] == ("eval", "data") or "_cache" in str(parts)


def _broken_links(path: Path) -> list[str]:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text())
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    return [f"{path}: link to {link}, which is not there" for link in local if not (path.parent / link).exists()]


def _unknown_commands(path: Path) -> list[str]:
    """Commands and long options of `stripedrag …` in code, held against what `--help` says."""
    faults = []
    code = re.findall(r"```.*?```|`[^`\n]+`", path.read_text(), re.DOTALL)
    for line in "\n".join(code).splitlines():
        for command, rest in re.findall(r"(?<!from )\bstripedrag ([a-z-]+)([^`|;]*)", line):
            known = _options().get(command)
            if known is None:
                faults.append(f"{path}: `stripedrag {command}` is no command")
                continue
            wrong = [option for option in re.findall(r"(?<=\s)--[a-z-]+", rest) if option not in known]
            faults += [f"{path}: `stripedrag {command}` has no option {option}" for option in wrong]
    for target in re.findall(r"\bmake ([a-z-]+)", "\n".join(code)):
        if not re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
            faults.append(f"{path}: `make {target}` is no target")
    return faults


def _options(cache: dict[str, set[str]] = {}) -> dict[str, set[str]]:  # noqa: B006
    if not cache:
        program = (
            "import json, typer; from stripedrag.eval.cli import app; g = typer.main.get_command(app); "
            "flat = lambda c: [c, *(d for s in getattr(c, 'commands', {}).values() for d in flat(s))]; "
            "known = lambda c: [o for d in flat(c) for p in d.params for o in p.opts]; "
            "print(json.dumps({n: known(c) for n, c in g.commands.items()}))"
        )
        found = json.loads(subprocess.check_output([sys.executable, "-c", program], text=True))
        cache.update({name: {*options, "--help"} for name, options in found.items()})
    return cache


def _placeholders(path: Path) -> list[str]:
    lines = re.findall(r"^[A-Z_]{4,}$", path.read_text(), re.MULTILINE)
    return [f"{path}: the placeholder {line} was left in" for line in lines]


def _room_readme(path: Path) -> list[str]:
    if not path.exists():
        return [f"{path} is missing"]
    lines = len(path.read_text().splitlines())
    return [f"{path} has {lines} lines; a room's README has at most {MAX_ROOM_LINES}"] if lines > MAX_ROOM_LINES else []


def _versions() -> list[str]:
    """The package's version is the newest in the changelog, and its plugin's."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    plugin = tomllib.loads((ROOT / "rag/llama_index_plugin/pyproject.toml").read_text())["project"]["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    faults = [] if plugin == version else [f"the plugin's version is {plugin}, the package's {version}"]
    if newest is None or newest[1] != version:
        faults.append(f"CHANGELOG.md begins with {newest[1] if newest else 'no version'}, the package's is {version}")
    return faults


if __name__ == "__main__":
    main()
