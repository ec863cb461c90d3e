"""The blending engine: independent of the window grid, seamless, resumable, nodata respected."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

from rsosm_cli.geometry import PixelBounds
from rsosm_cli.inference.blend import Cells, argmax, upsampled
from rsosm_cli.inference.mapping import Layers, RowImage, WindowBatch, map_area
from rsosm_cli.inference.windows import Strip, WindowPlan

CPU = torch.device("cpu")
TILE = 32


class ArraySource:
    """Windows of one array (C, H, W) whose first pixel is the lattice's origin."""

    def __init__(self, plan: WindowPlan, image: np.ndarray, valid: np.ndarray | None = None) -> None:
        self.plan, self.image = plan, image
        self.valid = np.ones(image.shape[1:], bool) if valid is None else valid
        self.rows_read: list[int] = []

    def read(self, row: int, columns: range) -> Iterator[RowImage | WindowBatch]:
        self.rows_read.append(row)
        p = self.plan
        col, first = p.origin[0] + columns.start * p.step_px, p.origin[1] + row * p.step_px
        box = PixelBounds(col, first, col + (len(columns) - 1) * p.step_px + p.tile_px, first + p.tile_px)
        reach = 2 * self.plan.tile_px
        top, left = box.row_min + reach, box.col_min + reach
        image = np.pad(self.image, ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
        valid = np.pad(self.valid, reach)
        valid = valid[top : top + box.height, left : left + box.width]
        yield RowImage(box, valid)
        starts = self.plan.starts(row, columns)
        tile = self.plan.tile_px
        windows = np.stack(
            [image[:, r + reach : r + reach + tile, c + reach : c + reach + tile] for c, r in starts.tolist()]
        )
        shares = np.array([valid[:, c - box.col_min : c - box.col_min + tile].mean() for c, _ in starts.tolist()])
        keep = shares > 0
        if keep.any():
            yield WindowBatch(starts[keep], torch.from_numpy(windows[keep]), None, shares[keep].astype(np.float32))


class Kept:
    """A sink in memory."""

    def __init__(self) -> None:
        self.strips: dict[str, tuple[Strip, dict[str, np.ndarray]]] = {}

    def has(self, strip: Strip) -> bool:
        return strip.name in self.strips

    def write(self, strip: Strip, layers: dict[str, np.ndarray]) -> None:
        self.strips[strip.name] = (strip, layers)

    def whole(self, plan: WindowPlan, layer: str, scale: int = 1) -> np.ndarray:
        first = next(iter(self.strips.values()))[1][layer]
        shape = (*first.shape[:-2], plan.area.height // scale, plan.area.width // scale)
        out = np.zeros(shape, first.dtype)
        for strip, layers in self.strips.values():
            box = strip.bounds_px
            top, left = (box.row_min - plan.area.row_min) // scale, (box.col_min - plan.area.col_min) // scale
            out[..., top : top + box.height // scale, left : left + box.width // scale] = layers[layer]
        return out


def everywhere(box: PixelBounds) -> np.ndarray:
    return np.ones((box.height, box.width), bool)


def local_head(cell: int, classes: int = 3):
    """A translation-invariant head: a cell's logits depend on the mean colour of the cell alone."""
    mix = torch.randn(classes, 3, generator=torch.Generator().manual_seed(0)) / 20

    def predict(batch: WindowBatch) -> torch.Tensor:
        colour = functional.avg_pool2d(batch.images.float(), cell)
        return torch.einsum("kc,bchw->bkhw", mix, colour - 128)

    return predict


def lopsided_head(cell: int):
    """A head whose answer drifts across its window, as that of a model that lacks context on one side does."""

    def predict(batch: WindowBatch) -> torch.Tensor:
        drift = torch.linspace(-1, 1, TILE // cell)
        first = functional.avg_pool2d(batch.images.float(), cell)[:, :1] / 60 + drift
        return torch.cat([first, torch.zeros_like(first)], 1)

    return predict


def picture(height: int = 170, width: int = 230) -> np.ndarray:
    """Smooth blobs of colour, (3, H, W) uint8."""
    rng = np.random.default_rng(3)
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 12, 14)).astype(np.float32))
    return functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].clamp(0, 255).byte().numpy()


def mapped(overlap, *, image=None, valid=None, cell=4, predict=None, origin=(0, 0), mask=everywhere, sink=None,
           layers=None, strip_px=48, block_px=100, box=None, channels=3):  # fmt: skip
    image = picture() if image is None else image
    box = box or PixelBounds(0, 0, image.shape[2], image.shape[1])
    plan = WindowPlan.of(
        box, tile_px=TILE, overlap=overlap, cell_px=cell, origin=origin, strip_px=strip_px, block_px=block_px
    )
    source, sink = ArraySource(plan, image, valid), sink or Kept()
    map_area(
        plan, source, predict or local_head(cell), sink, channels=channels,
        layers=layers or Layers("segmentation", probability=True, uncertainty=True), mask=mask, device=CPU,
    )  # fmt: skip
    return plan, sink, source


@pytest.mark.parametrize("cell", [1, 4, 8])
def test_a_translation_invariant_head_gives_the_same_map_whatever_the_windows(cell: int) -> None:
    box = PixelBounds(32, 32, 192, 128)  # away from the borders of the picture
    reference = None
    for overlap, origin, strip_px, block_px in [
        (0.5, (0, 0), 48, 100), (0.75, (0, 0), 512, 512), (0.3, (16, 8), 33, 64), (0.0, (0, 0), 64, 57),
    ]:  # fmt: skip
        plan, sink, _ = mapped(overlap, cell=cell, origin=origin, strip_px=strip_px, block_px=block_px, box=box)
        assert plan.area == box
        result = [sink.whole(plan, name) for name in ("class", "probability", "uncertainty")]
        if reference is None:
            reference = result
            assert len(np.unique(result[0])) == 3
        # Sums in another order differ in the last bit: a pixel in ten thousand may tip.
        assert (result[0] == reference[0]).mean() > 0.9999
        for mine, theirs in zip(result[1:], reference[1:], strict=True):
            assert np.abs(mine.astype(int) - theirs).max() <= 1


def test_one_window_is_upsampled_as_the_model_would() -> None:
    logits = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))
    box = PixelBounds(0, 0, 32, 32)
    cells = Cells(logits, torch.ones(8, 8, dtype=torch.bool), np.ones((32, 32), bool), box, box, 4)
    whole = functional.interpolate(logits[None], size=(32, 32), mode="bilinear")[0]
    torch.testing.assert_close(upsampled(cells, box), whole)
    torch.testing.assert_close(upsampled(cells, PixelBounds(8, 0, 20, 32)), whole[:, :, 8:20])
    assert torch.equal(argmax(whole), whole.argmax(0).byte())


def steepest(probability: np.ndarray, step: int) -> tuple[float, float]:
    """Largest step of probability between columns where a window begins or ends, and elsewhere."""
    steps = np.abs(np.diff(probability.astype(float), axis=1)).max(axis=0)
    at = np.zeros(len(steps), bool)
    at[step - 1 :: step] = True
    return float(steps[at].max()), float(steps[~at].max())


def test_blending_leaves_no_seam_where_abutting_windows_do() -> None:
    flat = np.full((3, 256, 256), 30, np.uint8)
    for overlap, seam in ((0.0, True), (0.5, False), (0.25, False)):
        plan, sink, _ = mapped(overlap, cell=1, predict=lopsided_head(1), channels=2, image=flat)
        at_borders, elsewhere = steepest(sink.whole(plan, "probability")[0], plan.step_px)
        assert (at_borders > 5 * elsewhere) == seam
        assert seam or at_borders <= elsewhere


def test_nodata_of_the_image_and_of_the_place_are_never_a_class() -> None:
    image = picture()
    valid = np.ones(image.shape[1:], bool)
    valid[60:110, 40:140] = False  # larger than a window: some see nothing at all

    def place(box: PixelBounds) -> np.ndarray:
        cols = np.arange(box.col_min, box.col_max)
        return np.broadcast_to(cols < 200, (box.height, box.width))

    plan, sink, _ = mapped(0.5, valid=valid, mask=place, image=image)
    classes = sink.whole(plan, "class")[: image.shape[1], : image.shape[2]]
    expected = valid & (np.arange(image.shape[2]) < 200)
    assert np.array_equal(classes != 255, expected)
    probability = sink.whole(plan, "probability")[:, : image.shape[1], : image.shape[2]]
    assert (probability[:, ~expected] == 255).all()
    total = probability[:, expected].astype(int).sum(0)
    assert np.abs(total - 250).max() <= 2


def test_finished_strips_are_kept_and_the_rest_is_the_same_after_an_interruption() -> None:
    plan, whole, full = mapped(0.5)
    again = Kept()
    names = [strip.name for strip in plan.strips()]
    for name in names[0:2] + names[4:5]:
        again.strips[name] = whole.strips[name]
    _, again, source = mapped(0.5, sink=again)
    np.testing.assert_array_equal(again.whole(plan, "class"), whole.whole(plan, "class"))
    np.testing.assert_array_equal(again.whole(plan, "probability"), whole.whole(plan, "probability"))
    assert len(source.rows_read) < len(full.rows_read)
    _, _, nothing = mapped(0.5, sink=again)
    assert nothing.rows_read == []


def test_an_error_while_reading_reaches_the_caller() -> None:
    class Broken(ArraySource):
        def read(self, row: int, columns: range):
            raise OSError("the disk was pulled out")

    plan = WindowPlan.of(PixelBounds(0, 0, 64, 64), tile_px=TILE, overlap=0.5, cell_px=4)
    with pytest.raises(OSError, match="pulled out"):
        map_area(plan, Broken(plan, picture()), local_head(4), Kept(), channels=3, layers=Layers("segmentation"),
                 mask=everywhere, device=CPU)  # fmt: skip


def regress(overlap: float, value, box: PixelBounds, mask=everywhere, amounts: bool = True):
    plan = WindowPlan.of(box, tile_px=TILE, overlap=overlap, cell_px=1, whole_steps=True, strip_px=64)
    n = plan.tile_px // plan.cell_px

    def predict(batch: WindowBatch) -> torch.Tensor:
        return (value(batch) / (n**2 if amounts else 1))[:, None, None, None].expand(-1, 1, n, n)

    sink = Kept()
    map_area(plan, ArraySource(plan, picture(192, 256)), predict, sink, channels=1,
             layers=Layers("regression", amounts=amounts), mask=mask, device=CPU)  # fmt: skip
    return plan, sink.whole(plan, "value", plan.cell_px)


def test_a_rate_is_the_same_in_every_cell() -> None:
    _, raster = regress(
        0.5, lambda batch: torch.full((len(batch.starts),), 7.0), PixelBounds(0, 0, 256, 180), amounts=False
    )
    assert raster[np.isfinite(raster)] == pytest.approx(7.0)


def test_the_sum_of_a_regression_raster_is_the_sum_of_the_predictions() -> None:
    def brightness(batch: WindowBatch) -> torch.Tensor:
        return batch.images.float().mean((1, 2, 3))

    box = PixelBounds(0, 0, 256, 192)
    plan, raster = regress(0.0, brightness, box)
    image = picture(192, 256).astype(float)
    predictions = image.mean(0).reshape(6, TILE, 8, TILE).mean((1, 3))
    assert plan.cell_px == TILE
    np.testing.assert_allclose(raster, predictions, rtol=1e-5)
    # A value that is the same everywhere is spread to the same total at any overlap.
    for overlap in (0.0, 0.5, 0.6):
        plan, raster = regress(overlap, lambda batch: torch.full((len(batch.starts),), 7.0), box)
        assert plan.tile_px % plan.cell_px == 0
        assert raster.sum() == pytest.approx(7.0 * 6 * 8)
    # Cells that the place's border cuts count with their share inside.
    half = PixelBounds(0, 0, 256, 176)
    _, raster = regress(
        0.0, lambda batch: torch.full((len(batch.starts),), 7.0), box,
        mask=lambda b: np.broadcast_to((np.arange(b.row_min, b.row_max) < half.row_max)[:, None], (b.height, b.width)),
    )  # fmt: skip
    assert raster.sum() == pytest.approx(7.0 * 5.5 * 8)
