"""A promptable segmenter of transformers (SAM, Kirillov et al. 2023): masks of what boxes and points mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch.nn import functional

from rsosm_cli.errors import FormatError

# What SAM's encoder was trained with (ImageNet's, of pixels 0..1).
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Prompts at a time: bounds the memory of a crowded window.
PROMPTS = 32


class Segmenter:
    """A SamModel on a device. ``side``: pixels of the square images that it takes."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import SamModel

        try:
            model: Any = SamModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise FormatError(
                f"The segmenter in {folder} cannot be loaded: {' '.join(str(error).split())[:200]}",
                hint="It must hold a SamModel of transformers.",
            ) from error
        self.model = model.to(device).eval()
        self.device = device
        self.side = int(model.config.vision_config.image_size)

    @torch.inference_mode()
    def masks(
        self, image: NDArray[np.uint8], boxes: NDArray[np.float32], points: NDArray[np.float32]
    ) -> NDArray[np.bool_]:
        """Return candidate masks (N, M, side, side) of what ``boxes`` (N, 4) x0, y0, x1, y1 and ``points`` (N, 2) mean.

        ``image`` (3, side, side). All in pixels; a point lies inside of what is meant.
        """
        pixels = torch.from_numpy(image).to(self.device).float()[None] / 255
        mean, std = (torch.tensor(v, device=self.device)[:, None, None] for v in (_MEAN, _STD))
        embedded = self.model.get_image_embeddings((pixels - mean) / std)
        found = []
        for start in range(0, len(boxes), PROMPTS):
            part = slice(start, start + PROMPTS)
            given = torch.from_numpy(boxes[part]).to(self.device)[None]  # (1, n, 4)
            at = torch.from_numpy(points[part]).to(self.device)[None, :, None]  # (1, n, 1, 2)
            inside = torch.ones(at.shape[:3], dtype=torch.long, device=self.device)
            out = self.model(
                image_embeddings=embedded, input_boxes=given, input_points=at, input_labels=inside,
                multimask_output=True,
            )  # fmt: skip
            low = out.pred_masks[0].float()  # (n, M, h, w) logits
            full = functional.interpolate(low, size=(self.side, self.side), mode="bilinear", align_corners=False)
            found.append((full > 0).cpu().numpy())
        return np.concatenate(found) if found else np.zeros((0, 1, self.side, self.side), bool)
