"""The image encoder: any timm ViT, with a fixed sine-cosine position of the actual grid and a cls token of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rsosm_cli.errors import UsageError
from rsosm_cli.models.position import embed_grid


@dataclass(frozen=True)
class Tokens:
    """What the encoder gives: ``cls`` (B, D) and ``patches`` (B, L, D) after the last norm, ``levels`` (B, L, D)
    before any.
    """

    cls: Tensor
    patches: Tensor
    levels: tuple[Tensor, ...] = ()


class ImageEncoder(nn.Module):
    """A timm ViT without its own position embedding and head.

    ``name`` is any timm model of the class VisionTransformer; else UsageError. Its first ``depth`` blocks
    are taken, by default all. Register tokens, where the model has them, are kept.
    ``gsd_position`` scales positions by the ground sample distance in metres, as Scale-MAE does (reference: 1 m).
    """

    def __init__(
        self, name: str, image_size: int, in_chans: int = 3, *, depth: int | None = None, gsd_position: bool = False
    ) -> None:
        super().__init__()
        if name not in timm.list_models():
            raise UsageError(
                f"timm has no model named {name!r}.",
                hint="List the vision transformers with: python -c \"import timm; print(timm.list_models('vit_*'))\"",
            )
        # Nothing is downloaded: pretrained weights are loaded from a file that the user names.
        vit = timm.create_model(name, pretrained=False, num_classes=0, in_chans=in_chans)
        if not isinstance(vit, VisionTransformer):
            raise UsageError(f"{name} is a {type(vit).__name__}, not a ViT.", hint="Choose one of timm's vit_* models.")
        if depth is not None and depth > len(vit.blocks):
            raise UsageError(
                f"{name} has {len(vit.blocks)} blocks, fewer than image_depth: {depth}.",
                hint=f"Choose at most {len(vit.blocks)}, or another model.",
            )
        self.name = name
        self.width: int = vit.embed_dim
        self.depth = depth or len(vit.blocks)
        self.in_chans = in_chans
        self.image_size = image_size
        self.gsd_position = gsd_position
        patch = vit.patch_embed.patch_size
        self.patch: int = patch[0]
        if patch[0] != patch[1]:
            raise UsageError(f"{name} has patches of {patch[0]} x {patch[1]} pixels; only square ones are read.")
        if self.width % 4:
            raise UsageError(f"{name} is {self.width} wide; sine-cosine positions need a multiple of 4.")
        self.check_size(image_size, image_size)
        self.patch_embed = vit.patch_embed.proj
        self.patch_norm = vit.patch_embed.norm
        self.norm_pre = vit.norm_pre
        self.blocks = vit.blocks[: self.depth]
        self.norm = nn.LayerNorm(self.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.reg_token = nn.Parameter(torch.zeros_like(vit.reg_token)) if vit.reg_token is not None else None
        self.checkpointing = False
        side = image_size // self.patch
        self.register_buffer("position", embed_grid(side, side, self.width), persistent=False)  # (L, D)
        self.position: Tensor
        self._initialise()

    def _initialise(self) -> None:
        # As in MAE: Xavier for all linear layers, the patch projection among them.
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.width, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def default_levels(self) -> tuple[int, ...]:
        """Return three inner blocks: 7, 11 and 15 of the paper's ViT-L, at the same shares of another depth."""
        return tuple(max(0, n) for n in (self.depth // 3 - 1, self.depth // 2 - 1, 2 * self.depth // 3 - 1))

    def check_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the grid (rows, columns) of an image of ``height`` x ``width`` pixels; UsageError where patches do
        not fit.
        """
        if height % self.patch or width % self.patch or not height or not width:
            raise UsageError(
                f"An image of {height} x {width} pixels cannot be cut into the patches of {self.patch} pixels "
                f"of {self.name}.",
                hint=f"Choose a size that is a multiple of {self.patch}.",
            )  # fmt: skip
        return height // self.patch, width // self.patch

    def grid_position(self, rows: int, columns: int, gsd_m: Tensor | float | None = None) -> Tensor:
        """Return the position embedding (L, D), or (B, L, D) where every sample has its own GSD."""
        if self.gsd_position:
            if gsd_m is None:
                raise UsageError("The model scales positions by the ground sample distance, and none was given.",
                                 hint="Pass gsd_m, in metres a pixel.")  # fmt: skip
            return embed_grid(rows, columns, self.width, scale=gsd_m, device=self.position.device)
        if rows == columns == self.image_size // self.patch:
            return self.position
        return embed_grid(rows, columns, self.width, device=self.position.device)

    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        levels: Sequence[int] = (),
        gsd_m: Tensor | float | None = None,
    ) -> Tokens:
        """Encode ``images`` (B, C, H, W); with ``keep`` (B, K), only those patches go through the blocks."""
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"images must be (B, {self.in_chans}, H, W), not {tuple(images.shape)}")
        rows, columns = self.check_size(images.shape[2], images.shape[3])
        x = self.patch_norm(self.patch_embed(images).flatten(2).transpose(1, 2))  # (B, L, D)
        x = x + self.grid_position(rows, columns, gsd_m).to(x.dtype)
        if keep is not None:
            x = x.gather(1, keep[..., None].expand(-1, -1, self.width))
        prefix: list[Tensor] = [self.cls_token] if self.reg_token is None else [self.cls_token, self.reg_token]
        tokens = torch.cat(prefix, 1).expand(len(x), -1, -1)
        n_prefix = tokens.shape[1]
        x = self.norm_pre(torch.cat((tokens.to(x.dtype), x), 1))
        found: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks):
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if number in levels:
                found[number] = x[:, n_prefix:]
        x = self.norm(x)
        return Tokens(x[:, 0], x[:, n_prefix:], tuple(found[level] for level in levels))


def as_map(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Return (B, D, rows, columns) from ``tokens`` (B, rows * columns, D)."""
    return tokens.transpose(1, 2).unflatten(2, (rows, columns))
