"""Speed of a GeoLink pretraining step, against a plain MAE step and against the step as it was published.

    python benchmarks/pretrain_step.py [--encoder vit_base_patch16_224] [--batch 8] [--rounds 15] [--device cpu]
    python benchmarks/pretrain_step.py --check GOLDENS TILES      # the published step gives the goldens
    python benchmarks/pretrain_step.py --waiting a.h5             # share of its time that geolink-tiny waits for data

The three are interleaved, each round in another order, and compared round by round: ratios are medians of pairs, so
that a machine that others use, too, still gives a fair answer. A step is forward, backward and AdamW. The plain step
has the same ViT, masking and decoder and no OSM. The published step is rebuilt here: its arithmetic from the
publication's code base, its slow parts (loops over graphs and nodes with a wait for the device in each, nine separate
convolutions, positions through numpy, attention that is not fused or returns its weights) as they were. The model
FLOPs utilisation is the rate of the step's matrix products over that of one large product on the same device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

warnings.filterwarnings("ignore", message="`torch.jit")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from graph_batches import join, random_tile  # noqa: E402
from torch_geometric.data import HeteroData  # noqa: E402
from torch_geometric.nn import GATConv, HeteroConv, LayerNorm, Set2Set  # noqa: E402

from rsosm_cli.graph.schema import NODE_TYPES  # noqa: E402
from rsosm_cli.models import draws  # noqa: E402
from rsosm_cli.models.geolink import GeoLink  # noqa: E402
from rsosm_cli.settings import ModelSettings  # noqa: E402

ORDER = ("polygon", "line", "point")  # of the types in the published batch
TEXT_WIDTH = 512


class PublishedStep(nn.Module):
    """The published step around the weights of a model of ours under ``compat: released``."""

    def __init__(self, ours: GeoLink) -> None:
        super().__init__()
        self.ours = ours
        self.draw = np.random.default_rng(0)
        for block in (*ours.vit.blocks, *ours.pretraining.decoder):
            block.attn.fused_attn = False  # timm 0.6.12, which the publication used, had no fused attention
        width, s = ours.settings.osm_width, ours.settings
        layer = ours.osm_encoder.layer
        convs = {}
        for i, a in enumerate(NODE_TYPES):
            for j, b in enumerate(NODE_TYPES):
                conv = GATConv(ours.text_width, width, add_self_loops=False)
                with torch.no_grad():
                    conv.lin.weight.copy_(layer.weight[i, j])
                    conv.att_src.copy_(layer.att_source[i, j])
                    conv.att_dst.copy_(layer.att_target[i, j])
                    conv.bias.copy_(layer.bias[i, j])
                convs[a, "to", b] = conv
        self.conv = HeteroConv(convs, aggr="mean")
        self.norm = nn.ModuleDict({t: LayerNorm(width) for t in NODE_TYPES})
        self.read = nn.ModuleDict({t: Set2Set(width, processing_steps=5) for t in NODE_TYPES})
        self.aggregate = nn.ModuleDict({t: nn.Linear(2 * width, width) for t in NODE_TYPES})
        f = ours.fusion
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(s.fusion_width, s.fusion_heads, dropout=s.fusion_dropout, batch_first=True)
            for _ in range(3)
        )
        with torch.no_grad():
            for i, t in enumerate(NODE_TYPES):
                self.norm[t].weight.copy_(ours.osm_encoder.norm.weight[i])
                self.norm[t].bias.copy_(ours.osm_encoder.norm.bias[i])
                self.aggregate[t].weight.copy_(ours.readout.weight[i])
                self.aggregate[t].bias.copy_(ours.readout.bias[i])
                lstm, read = self.read[t].lstm, ours.readout.read
                lstm.weight_ih_l0.copy_(read.weight_input[i])
                lstm.weight_hh_l0.copy_(read.weight_state[i])
                lstm.bias_ih_l0.copy_(read.bias_input[i])
                lstm.bias_hh_l0.copy_(read.bias_state[i])
            parts = (f.objects_self, f.patches_to_objects, f.objects_to_patches)
            for module, part in zip(self.attention, parts, strict=True):
                three = (part.query, part.key, part.value)
                module.in_proj_weight.copy_(torch.cat([p.weight for p in three]))
                module.in_proj_bias.copy_(torch.cat([p.bias for p in three]))
                module.out_proj.weight.copy_(part.out.weight)
                module.out_proj.bias.copy_(part.out.bias)

    def forward(
        self, images: Tensor, graphs: HeteroData, keep: Tensor | None = None, hidden: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three losses; masks are drawn unless ``keep`` (B, K) and ``hidden`` (indices a type) are given."""
        ours, part, device = self.ours, self.ours.pretraining, images.device
        if keep is None:
            noise = torch.from_numpy(self.draw.random((len(images), 196))).to(device)
            keep = noise.argsort(1)[:, :49]
        tokens = ours.vit(images, keep=keep)
        image_loss = part.image_loss(images, part.decode(tokens.cls, tokens.patches, keep, 14, 14), keep)

        masked = graphs.clone()
        hidden = hidden if hidden is not None else {t: self._draw(graphs[t].batch) for t in ORDER}
        for i, t in enumerate(NODE_TYPES):
            masked[t].x = masked[t].x.clone()
            masked[t].x[hidden[t]] = 0.0
            masked[t].x[hidden[t]] += part.node_token[i]
        nodes = {t: x.relu() for t, x in self.conv(masked.x_dict, masked.edge_index_dict).items()}
        nodes = {t: self.norm[t](x) for t, x in nodes.items()}

        regions = torch.zeros(len(images), 3, ours.settings.osm_width, device=device)
        for k, t in enumerate(ORDER):
            if len(nodes[t]):
                present = graphs[t].batch.unique()
                regions[present, k] = self.aggregate[t](self.read[t](nodes[t], graphs[t].batch)[present]).float()
        image_vector = F.normalize(part.project_image(tokens.patches.mean(1)), dim=1)
        region_vector = F.normalize(part.project_osm(regions.sum(1)), dim=1)
        logits = image_vector @ region_vector.T / ours.settings.temperature
        labels = torch.arange(len(images), device=device)
        contrastive = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

        objects, positions, targets, owners = [], [], [], []
        for t in ORDER:
            which = hidden[t]
            positions.append(self._position(graphs[t].pos[which], device))
            objects.append(ours.objects_in[NODE_TYPES.index(t)](nodes[t][which]))
            targets.append(graphs[t].x[which])
            owners.append(graphs[t].batch[which])
        padded, where, valid, target = self._pad(
            torch.cat(objects), torch.cat(positions), torch.cat(targets), torch.cat(owners), len(images)
        )
        grid = ours._patch_position(14, 14, tokens.patches)[keep]
        predicted = part.predict_node(self._fuse(ours.patches_in(tokens.patches), grid, padded, where, valid)[valid])
        node_loss = (target[valid] - predicted).square().mean(-1).mean()
        return image_loss, contrastive, node_loss

    def _draw(self, batch: Tensor) -> Tensor:
        chosen = []
        counts = torch.bincount(batch) if len(batch) else torch.zeros(0, dtype=torch.int64)
        starts = counts.cumsum(0) - counts
        for i in range(len(counts)):
            n = counts[i].item()
            if n:
                k = max(1, min(round(n * 0.2), n))
                chosen.append(torch.randperm(n, device=batch.device)[:k] + starts[i].item())
        return torch.cat(chosen) if chosen else batch.new_zeros(0)

    def _position(self, points: Tensor, device: torch.device) -> Tensor:
        quarter = self.ours.settings.fusion_width // 4
        values = points.cpu().numpy() * 14
        steps = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float32) / quarter)
        halves = []
        for axis in (0, 1):
            angles = np.einsum("nk,d->nkd", values[..., axis], steps)
            halves.append(np.concatenate((np.sin(angles), np.cos(angles)), -1))
        return torch.from_numpy(np.concatenate(halves, -1).mean(1)).to(device).float()

    def _pad(self, x: Tensor, where: Tensor, target: Tensor, owner: Tensor, n: int) -> tuple[Tensor, ...]:
        counts = owner.bincount(minlength=n)
        most = int(counts.max())
        limit = self.ours.settings.objects_max
        most = most if limit is None else min(most, limit)
        valid = torch.arange(most, device=x.device)[None] < counts[:, None]
        out = [torch.zeros(n, most, v.shape[1], device=x.device) for v in (x, where, target)]
        for i in range(n):
            mine = (owner == i).nonzero(as_tuple=True)[0]
            if len(mine) > most:
                mine = mine[torch.randperm(len(mine))[:most]]
            for padded, values in zip(out, (x, where, target), strict=True):
                padded[i, : len(mine)] = values[mine]
        return out[0], out[1], valid, out[2]

    def _fuse(self, patches: Tensor, grid: Tensor, objects: Tensor, where: Tensor, valid: Tensor) -> Tensor:
        f = self.ours.fusion
        keys = objects + where
        objects = f.norm_self(objects + self.attention[0](keys, keys, objects, key_padding_mask=~valid)[0])
        keys = objects + where
        seen = self.attention[1](patches + grid, keys, objects, key_padding_mask=~valid)[0]
        patches = f.norm_patches(patches + seen)
        seen = self.attention[2](objects + where, patches + grid, patches)[0]
        return f.norm_out(f.linear(f.norm_objects(objects + seen)))


class PlainStep(nn.Module):
    """Masked autoencoding of the image alone, with the image parts of a model of ours."""

    def __init__(self, ours: GeoLink) -> None:
        super().__init__()
        self.vit, part = ours.vit, ours.pretraining
        self.decoder = nn.ModuleList((part.decoder_in, part.decoder, part.decoder_norm, part.predict_pixels))
        self.token = part.patch_token
        self.part = [part]  # its other parameters are not this step's

    def forward(self, images: Tensor, seeds: Tensor) -> Tensor:
        keep = draws.mix(draws.mix(seeds, 0)[:, None], torch.arange(196, device=images.device)).argsort(1)[:, :49]
        tokens = self.vit(images, keep=keep)
        part = self.part[0]
        return part.image_loss(images, part.decode(tokens.cls, tokens.patches, keep, 14, 14), keep)


def check(goldens: Path, tiles: Path) -> None:
    """Print the published step's losses beside the golden ones; leave with status 1 where they differ."""
    from goldens_of_geolink import read_graphs, read_images, released_state

    from rsosm_cli.models.released import from_released

    spec = json.loads((goldens / "weights_spec_w002.json").read_text())
    settings = ModelSettings(image_encoder="vit_tiny_patch16_224", compat="released", objects_max=None)
    ours = GeoLink(settings, TEXT_WIDTH).eval()
    ours.load_state_dict(from_released(released_state(spec["rows"])).state)
    names = [str(n) for n in np.load(goldens / "batch6_index.npz")["sample_names"]]
    gold = np.load(goldens / "pretrain_w002_nocap.npz")
    hidden = {t: torch.from_numpy(gold[f"mask_nodes__{t}"]) for t in NODE_TYPES}
    with torch.no_grad():
        found = PublishedStep(ours).eval()(
            read_images(goldens, tiles), read_graphs(tiles, names), torch.from_numpy(gold["ids_keep"]), hidden
        )
    wrong = False
    for name, value in zip(("img_loss", "contrastive_loss", "node_loss"), found, strict=True):
        wrong |= abs(value.item() - float(gold[name])) > 1e-5 * abs(float(gold[name]))
        print(f"{name:18} published step {value.item():.6f}   golden {float(gold[name]):.6f}")
    sys.exit(int(wrong))


def waiting(tiles: list[Path]) -> None:
    """Print the share of a pretraining's time that it waits for data, as the run itself measures it."""
    from rsosm_cli.pipeline.pretrain import pretrain
    from rsosm_cli.settings import PretrainSettings, resolve

    settings = resolve(
        PretrainSettings, kind="pretrain", preset="geolink-tiny",
        options={"optim.epochs": 2, "optim.warmup_epochs": 1.0},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        pretrain(root=Path(folder), tiles=tiles, name="waiting", settings=settings, device="cpu", offline=True)
        lines = (Path(folder) / "runs" / "waiting" / "metrics.csv").read_text().splitlines()
    last = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
    print(f"waiting for data: {float(last['waiting_share']):.1%} of the time, {last['samples_per_s']} tiles/s")


def flops_of(loss: Callable[[], Tensor]) -> int:
    """Return the floating-point operations of the matrix products of a forward and backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def product_rate(device: torch.device, precision: str) -> float:
    """Return the operations a second of one large matrix product, the most that a step can hope for here."""
    side = 1024 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    seconds = []
    for _ in range(12):
        synchronise(device)
        start = time.perf_counter()
        a @ a
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(seconds[2:])


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(encoder: str, batch: int, rounds: int, device: torch.device, precision: str) -> None:
    torch.manual_seed(0)
    edges = 0.15  # share of the pairs that are related: about four relations an object
    graphs = join([random_tile((10, 10, 10), i, TEXT_WIDTH, edges) for i in range(batch)])
    graphs.counts = np.full((batch, 3), 10)  # as `to_hetero` sets them
    graphs = graphs.to(device)
    images = torch.randn(batch, 3, 224, 224, device=device)
    seeds = torch.arange(batch, device=device)
    full = GeoLink(ModelSettings(image_encoder=encoder), TEXT_WIDTH).to(device)
    plain = PlainStep(GeoLink(ModelSettings(image_encoder=encoder), TEXT_WIDTH)).to(device)
    base = GeoLink(ModelSettings(image_encoder=encoder, compat="released"), TEXT_WIDTH)
    published = PublishedStep(base).to(device)
    weights = (1.0, 0.01, 0.01)
    losses = {
        "full": lambda: full.losses(images, graphs, seeds=seeds).total,
        "plain": lambda: plain(images, seeds),
        "published": lambda: sum(w * x for w, x in zip(weights, published(images, graphs), strict=True)),
    }
    models = {"full": full, "plain": plain, "published": published}
    # The published training takes AdamW as torch gives it; ours, and the plain step beside it, the fused one.
    optimizers = {
        n: torch.optim.AdamW(m.parameters(), lr=1e-6, fused=None if n == "published" else True)
        for n, m in models.items()
    }

    def step(name: str) -> tuple[float, float]:
        synchronise(device)
        wall, work = time.perf_counter(), time.process_time()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = losses[name]()
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)
        synchronise(device)
        return time.perf_counter() - wall, time.process_time() - work

    names = list(losses)
    for name in names:
        step(name)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % 3 :] + names[: number % 3]:
            times[name].append(step(name))
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name()
    print(f"{encoder}, batch {batch}, 30 objects a tile, {precision}, {where}, {rounds} rounds")
    for name in names:
        print(f"  {name:10} {batch / statistics.median(t[0] for t in times[name]):8.2f} samples/s")
    for other, bar in (("plain", "at most 1.15 with ViT-Base"), ("published", "below 1")):
        pairs = list(zip(times["full"], times[other], strict=True))
        wall = statistics.median(a[0] / b[0] for a, b in pairs)
        work = statistics.median(a[1] / b[1] for a, b in pairs)
        print(f"  full / {other:10} {wall:5.2f} of its time, {work:5.2f} of its processor time ({bar})")
    done = flops_of(losses["full"]) / statistics.median(t[0] for t in times["full"])
    most = product_rate(device, precision)
    print(f"  model FLOPs utilisation of full: {done / most:.0%} of {most / 1e12:.3g} TFLOP/s, one large product here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", action="append", help="timm ViTs (default: Tiny and Base)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--check", type=Path, nargs=2, metavar=("GOLDENS", "TILES"))
    parser.add_argument("--waiting", type=Path, nargs="+", metavar="TILES_H5")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.check:
        check(*given.check)
    elif given.waiting:
        waiting(given.waiting)
    else:
        for encoder in given.encoder or ("vit_tiny_patch16_224", "vit_base_patch16_224"):
            compare(encoder, given.batch, given.rounds, torch.device(given.device), given.precision)


if __name__ == "__main__":
    main()
