"""``map --refine``: the weights of the segmenter, and the sharpening of a finished map by it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from rsosm_cli.errors import MissingError, UsageError
from rsosm_cli.pipeline.inputs import torch_device
from rsosm_cli.pipeline.map_job import MapJob
from rsosm_cli.progress import Progress

if TYPE_CHECKING:
    from rsosm_cli.imagery.reader import ImageReader
    from rsosm_cli.products.parts import MapParts

log = logging.getLogger("rsosm")


def require_refinement(job: MapJob, dry_run: bool) -> None:
    """Raise before the work begins where boundaries cannot be sharpened: no weights, no image, no background.

    Weights are downloaded where they have to be, though not for a ``dry_run``.
    """
    if job.task.background is None or not job.task.dense:
        raise UsageError(
            f"Boundaries of {job.task.name} cannot be sharpened: the task has no background that gives way.",
            hint="Leave out --refine, or name a class as the task's `background`.",
        )
    if job.ground.imagery is None and not job.images:
        raise MissingError(
            f"There is no imagery of {job.ground.name} to sharpen boundaries by.", hint="Add it, or leave out --refine."
        )
    weights = job.settings.refine_weights
    if not dry_run or job.offline or Path(weights).expanduser().is_dir():
        find_segmenter(weights, offline=job.offline)


def sharpen(job: MapJob, parts: MapParts, image: ImageReader, device: str, progress: Progress) -> tuple[Path, str]:
    """Sharpen the finished classes with the segmenter; return the raster, and a sentence on what it did."""
    from rsosm_cli.models.segmenter import Segmenter
    from rsosm_cli.products.publish import class_mosaic
    from rsosm_cli.products.refine import RIM, refine_classes

    weights = job.settings.refine_weights
    segmenter = Segmenter(find_segmenter(weights, offline=job.offline), torch_device(device))
    names = [c.name for c in job.task.classes]
    target = parts.folder / "refined.tif"
    box, step = parts.plan.area, segmenter.side - 2 * int(segmenter.side * RIM)
    windows = -(-box.height // step) * -(-box.width // step)
    with progress.task(f"sharpening {job.name}: {job.ground.name}", windows, "windows") as advance:
        found = refine_classes(
            class_mosaic(parts, job.task), target, image, job.projection, background=names.index(job.task.background or
            ""), side=segmenter.side, masks=segmenter.masks, on_window=advance,
        )  # fmt: skip
    note = (
        f"Boundaries were sharpened with {weights}: of {found.patches} patches {found.sharpened} took a mask, and "
        f"{found.pixels} pixels changed their class."
    )
    return target, note


def find_segmenter(weights: str, *, offline: bool) -> Path:
    """Return the folder of a SamModel's weights: a path, or a repository of the hub, downloaded unless ``offline``.

    Raises :class:`MissingError`, which says what is missing and how to get it.
    """
    folder = Path(weights).expanduser()
    if folder.is_dir():
        lacking = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
        if lacking:
            raise MissingError(
                f"The folder of the segmenter {folder} lacks {' and '.join(lacking)}.",
                hint="Save it with SamModel.save_pretrained, or give a repository of the hub.",
            )
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["config.json", "model.safetensors"]
    hint = f"Give the folder of a SamModel (config.json, model.safetensors): --refine-weights FOLDER; not {weights!r}."
    try:
        return Path(snapshot_download(weights, local_files_only=True, allow_patterns=wanted))
    except (LocalEntryNotFoundError, HFValidationError, ValueError):
        if offline:
            raise MissingError(
                f"The weights of the segmenter {weights} are not on this machine, and --offline forbids to download "
                "them.",
                hint=hint,
            ) from None
    log.info("Downloading the segmenter %s.", weights)
    try:
        return Path(snapshot_download(weights, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise MissingError(f"The segmenter {weights} could not be downloaded: {reason}", hint=hint) from error
