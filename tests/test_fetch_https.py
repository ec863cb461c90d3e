"""Services over https, with a certificate of a local authority: trusted through the environment, or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from all_services import All, serving_all
from test_fetch_troubles import SERVICES, Run

from rsosm_cli.imagery import raster, tile_client

# One service of each way of asking.
ASKED = ["nominatim", "overpass", "extract", "xyz", "wmts", "stac", "raster"]


class Secured(NamedTuple):
    services: All
    authority: Path


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("authority")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "authority.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
    with serving_all(str(folder / "server.pem")) as services:
        yield Secured(services, folder / "authority.pem")


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, own_surroundings: None) -> None:
    monkeypatch.setenv("MY_KEY", "open-sesame-4711")
    monkeypatch.setattr(tile_client, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(raster, "FIRST_WAIT_S", 0.01)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
@pytest.mark.parametrize("service", ASKED)
def test_an_authority_of_the_environment_is_trusted(
    secured: Secured, service: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(secured.authority))
    run = Run(secured.services, service, f"{service}-{variable[:4]}", tmp_path)
    secured.services.begin(run.name, None)
    status, out, err = run.fetch()
    assert status == 0, err
    assert SERVICES[service].file in run.files()
    run.check_leftovers(out, err)


@pytest.mark.parametrize("service", ASKED)
def test_an_unknown_authority_is_one_sentence(secured: Secured, service: str, tmp_path: Path) -> None:
    run = Run(secured.services, service, f"{service}-none", tmp_path)
    secured.services.begin(run.name, None)
    status, out, err = run.fetch()
    assert status == 1
    assert "its certificate cannot be verified" in err.splitlines()[-1]
    assert "CURL_CA_BUNDLE" in err.splitlines()[-1]
    assert sum(line.startswith("Error: ") for line in err.splitlines()) == 1
    assert "next try" not in err
    assert SERVICES[service].file not in run.files()
    run.check_leftovers(out, err)
