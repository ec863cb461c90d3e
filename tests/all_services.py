"""Every service that ``fetch`` asks, in a process of its own: GDAL holds Python's lock while it waits."""

from __future__ import annotations

import multiprocessing
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.managers import BaseManager
from pathlib import Path

import osmium
import shapely
from fetch_inputs import write_photo
from map_services import Reply, Upset, osm_xml, place, region, serving
from stac_services import offer_stac
from tile_services import PLACE, TILE_PX, ZOOM, capabilities, pixels_of, png, tile_map

from rsosm_cli.imagery.prepare import place_margin
from rsosm_cli.imagery.tile_set import tiles_over

EXTRACT = "land-latest.osm.pbf"
TOWN = osm_xml(west=85.519, south=27.629)


class All:
    """A server that plays them all over one small place; with a ``certificate`` (a file, with its key), over https."""

    def __init__(self, certificate: str | None = None) -> None:
        tls = None
        if certificate is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(certificate)
        self._open = ExitStack()
        server = self.server = self._open.enter_context(serving(tls))
        square = shapely.geometry.mapping(PLACE)
        server.places = [place(geojson={"type": "Polygon", "coordinates": square["coordinates"]})]
        server.overpass = lambda query: Reply(TOWN)
        box = tuple(side + way for side, way in zip(PLACE.bounds, (-1, -1, 1, 1), strict=True))
        server.offer_index(region("land", server.offer(EXTRACT, _extract()), box))
        server.files["/wmts/caps.xml"] = capabilities(server.address, rest=True)
        server.files["/tms/tilemapresource.xml"] = tile_map()
        for z, x, y in tiles_over(place_margin(PLACE), ZOOM, TILE_PX).ids():
            image = png(pixels_of(x, y))
            server.files[f"/xyz/{z}/{x}/{y}.png"] = image
            server.files[f"/tms/{z}/{x}/{2**z - 1 - y}.png"] = image
            server.files[f"/wmts/d0/s/web/day:{z}/{x}/{y}.png"] = image
        with tempfile.TemporaryDirectory() as folder:
            self._photo = write_photo(Path(folder) / "photo.tif", box=PLACE.buffer(0.01).bounds).read_bytes()

    def address(self) -> str:
        return self.server.address

    def begin(self, name: str, upset: Upset | None) -> None:
        """Begin a test: rasters lie in the folder ``name``, as GDAL remembers those of the test before."""
        self.server.upset = upset
        for path in [path for path in self.server.files if path.startswith("/images/")]:
            del self.server.files[path]
        offer_stac(self.server, f"/images/{name}")
        self.server.files[f"/images/{name}/photo.tif"] = self._photo

    def met(self) -> int:
        """Return how many requests the upset met."""
        return 0 if self.server.upset is None else self.server.upset.met

    def close(self) -> None:
        self._open.close()


def _extract() -> bytes:
    """Return the town as a PBF file of some hundred kilobytes, so that it can break off in the middle."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "town.osm").write_bytes(TOWN)
        with osmium.SimpleWriter(osmium.io.File(f"{folder}/{EXTRACT}", "pbf,pbf_compression=none")) as writer:
            for item in osmium.FileProcessor(f"{folder}/town.osm"):
                writer.add(item)
            for number in range(5_000):  # beyond the town
                node = osmium.osm.mutable.Node(id=10_000 + number, location=(20.0, 50.0), tags={"note": str(number)})
                writer.add_node(node)
        return (Path(folder) / EXTRACT).read_bytes()


class _Manager(BaseManager):
    pass


_Manager.register("All", All)


@contextmanager
def serving_all(certificate: str | None = None) -> Iterator[All]:
    """Serve in another process; what is yielded passes the calls on."""
    with _Manager(ctx=multiprocessing.get_context("spawn")) as manager:
        services = manager.All(certificate)  # type: ignore[attr-defined]
        try:
            yield services
        finally:
            services.close()
