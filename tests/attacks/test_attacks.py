"""Every bad input, over every way to receive it: one class of error, in time, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.attacks import corpus
from tests.attacks.cases import write_cases
from tests.attacks.corpus import AUTHORITY_FILE, WARM_UP, behind_message
from tests.attacks.meter import LAG_MAX, STALL_MAX
from tests.attacks.receiver import WANTED_FILE
from tests.attacks.sender import HONEST_FILE, TLS_FILE

ROOT = Path(__file__).parents[2]
WAYS = [
    "blocking-none-tcp",
    "blocking-none-tls",
    "streams-asyncio-tcp",
    "streams-asyncio-unix",
    "streams-asyncio-tls",
    "streams-uvloop-tcp",
    "anyio-trio-tcp",
    "anyio-trio-tls",
    "socket-trio-unix",
]
CASES = {case.name: case for case in corpus.all_cases()}
PARAMETERS = [
    pytest.param(way, name, id=f"{way}-{name}")
    for way in WAYS
    for name, case in CASES.items()
    if case.is_for(way)
]
# In seconds, beyond a deadline.
GRACE = 2
PATIENCE = 600

Outcomes = dict[tuple[str, str], dict[str, Any]]

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is measured as Linux has it"
)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What came of all cases that are to be tested, by way and name."""
    wanted: dict[str, list[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.function is test_attack:
            way, name = (str(item.callspec.params[key]) for key in ("way", "name"))
            wanted.setdefault(way, []).append(name)
    return run(wanted, tmp_path_factory.mktemp("attacks"))


def run(wanted: dict[str, list[str]], directory: Path) -> Outcomes:
    """Run cases in processes of their own."""
    names = {WARM_UP}.union(*wanted.values())
    write_cases([case for name, case in CASES.items() if name in names], directory)
    (directory / WANTED_FILE).write_text(json.dumps(wanted))
    (directory / HONEST_FILE).write_bytes(behind_message())
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / AUTHORITY_FILE)
    certificate = authority.issue_cert("localhost").private_key_and_cert_chain_pem
    certificate.write_to_path(directory / TLS_FILE)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.attacks.receiver", directory],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
    )
    assert not done.returncode, done.stderr
    outcomes: Outcomes = {}
    for way in wanted:
        lines = (directory / f"{way}.outcomes").read_text().splitlines()
        for outcome in map(json.loads, lines[1::2]):
            outcomes[way, outcome["name"]] = outcome
    return outcomes


@pytest.mark.parametrize(("way", "name"), PARAMETERS)
def test_attack(way: str, name: str, outcomes: Outcomes) -> None:
    case, outcome = CASES[name], outcomes[way, name]
    assert outcome["errors"].keys() == {case.wanted}, outcome
    assert outcome["located"] or not case.located, outcome
    assert outcome["after"] in (case.after or ("",)), outcome
    assert case.earliest <= outcome["seconds"] <= case.deadline + GRACE, outcome
    if not case.honest:
        assert outcome["grown"] <= case.nbytes + case.memory, outcome
    assert outcome["lag"] <= LAG_MAX, outcome
    assert outcome["stall"] <= STALL_MAX, outcome
    assert not outcome["left"], outcome


def test_the_document_has_their_numbers() -> None:
    text = " ".join((ROOT / "docs" / "security.md").read_text(encoding="utf-8").split())
    honest = sum(bool(case.honest) for case in CASES.values())
    assert f"and {honest} honest objects" in text
    assert f"{len(CASES)} cases, {len(PARAMETERS):,} over {len(WAYS)} ways" in text
